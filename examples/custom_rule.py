"""Writes a new optimizer as a formula of five lines, trains with it, and shows what the compiler makes of it.

The formula is cautious Lion (Liang et al. 2024, arXiv:2411.16085): Lion, except that an element whose update would go
against its gradient stays where it is, and the others of its leaf go further to make up for it.
"""

import torch
from torch.func import grad_and_value

import functional_optim as fo


Params = dict[str, torch.Tensor]


@fo.elementwise(state={"mu": fo.zeros}, ranges={"b1": "[0, 1)", "b2": "[0, 1)"})
def scale_by_cautious_lion(
    u: torch.Tensor, mu: torch.Tensor, *, b1: float = 0.9, b2: float = 0.99
) -> tuple[torch.Tensor, torch.Tensor]:
    update = torch.sign(b1 * mu + (1 - b1) * u)
    agrees = update * u > 0
    update = torch.where(agrees, update / torch.clamp(fo.leaf_mean(agrees), min=1e-3), 0.0)
    mu = b2 * mu + (1 - b2) * u
    return update, mu


def loss_of(params: Params, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.mean((x @ params["weights"] + params["bias"] - y) ** 2)


def train(tx: fo.GradientTransformation, x: torch.Tensor, y: torch.Tensor, steps: int) -> tuple[Params, list[float]]:
    params = {"weights": torch.zeros(x.shape[1]), "bias": torch.zeros(())}
    state = tx.init(params)
    losses = []
    for _ in range(steps):
        grads, loss = grad_and_value(loss_of)(params, x, y)
        params, state = fo.apply_gradients(tx, params, grads, state)
        losses.append(loss.item())
    return params, losses


def main() -> None:
    # A linear function of 20 numbers, plus noise of variance 0.01: about as low as the mean squared error can get.
    torch.manual_seed(0)
    truth, x = torch.randn(20), torch.randn(500, 20)
    y = x @ truth + 3.0 + 0.1 * torch.randn(500)

    # The new transformation stands in a chain like any other: here with weight decay and a schedule.
    steps = 300
    tx = fo.chain(
        scale_by_cautious_lion(b2=0.98),
        fo.add_decayed_weights(1e-4),
        fo.scale_by_learning_rate(fo.cosine_decay_schedule(0.05, steps)),
    )
    params, losses = train(tx, x, y, steps)
    print(tx)
    print("mean squared error:", ", ".join(f"{losses[k]:.4f} at step {k}" for k in (0, 50, 100, steps - 1)))
    print(f"largest error of a weight: {(params['weights'] - truth).abs().max():.4f}")

    explanation = fo.explain(tx, params)
    print(f"\n{explanation}")
    print(f"\nthe program, as every backend reads it:\n{explanation.kernels[0].program}")
    source = explanation.kernels[0].source
    print(f"\nthe C that is generated from it, without its header:\n{source[source.index('/* ---- pass 1') :]}")

    # Every backend computes the same numbers: the reference in plain torch, torch._foreach_* and the generated C, which
    # is the one that is chosen where there is a compiler.
    for backend in dict.fromkeys(("reference", "foreach", *explanation.backends)):
        with fo.use_backend(backend):
            again, _ = train(tx, x, y, steps)
        torch.testing.assert_close(again, params)
        difference = max((again[name] - params[name]).abs().max().item() for name in params)
        print(f"{backend:>9}: largest difference of a parameter after {steps} steps is {difference:g}")


if __name__ == "__main__":
    main()
