"""Learns the learning rate and the decay of AdamW by gradient, through the steps of training.

A linear model with more inputs than matter overfits unless its weights decay. The loss on held-out data after forty
steps is a function of both numbers, so it is differentiated with respect to them, and they take steps of their own.

    python examples/hypergradient.py
"""

import torch

import functional_optim as fo


STEPS, OUTER = 40, 30
Params = dict[str, torch.Tensor]


def make_data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(30, 1)
    truth[:3] = 1.0
    x = torch.randn(120, 30, generator=generator)
    y = x @ truth + torch.randn(120, 1, generator=generator)
    return x[:40], y[:40], x[40:], y[40:]


def loss_of(params: Params, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ params["weight"] - y).square().mean()


def main() -> None:
    torch.set_num_threads(1)
    x, y, held_x, held_y = make_data()
    start = {"weight": torch.zeros(30, 1)}

    def held_out_loss(log_rate: torch.Tensor, log_decay: torch.Tensor) -> torch.Tensor:
        tx = fo.adamw(log_rate.exp(), weight_decay=log_decay.exp(), eps_root=1e-8)
        params, state = start, tx.init(start)
        for _ in range(STEPS):
            grads = torch.func.grad(loss_of)(params, x, y)
            params, state = fo.apply_gradients(tx, params, grads, state)
        return loss_of(params, held_x, held_y)

    hypers = {"log_rate": torch.tensor(0.01).log(), "log_decay": torch.tensor(0.01).log()}
    outer = fo.adam(0.1)
    state = outer.init(hypers)
    for k in range(OUTER + 1):
        grads, loss = torch.func.grad_and_value(lambda h: held_out_loss(h["log_rate"], h["log_decay"]))(hypers)
        if k % 10 == 0:
            rate, decay = (hypers[name].exp().item() for name in ("log_rate", "log_decay"))
            print(f"step {k:2}: learning rate {rate:.4f}, decay {decay:.4f}, held-out loss {loss.item():.3f}")
        hypers, state = fo.apply_gradients(outer, hypers, grads, state)


if __name__ == "__main__":
    main()
