"""Learning rate, weight decay and b1 of AdamW, learned by gradient through training.

    python examples/hypergradient.py
    python examples/hypergradient.py --rounds 60

A regression with more weights than points to learn from is trained for some steps. The loss on other points after
them is a function of the hyper-parameters, and autograd follows all steps back to these.
"""

import argparse
from typing import Any, NamedTuple

import torch

import functional_optim as fo


STEPS = 20


class Problem(NamedTuple):
    """Points to learn from, and points to test."""

    x: torch.Tensor
    y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor


class Round(NamedTuple):
    """Hyper-parameters, and the losses after a training with them, on the points learned from and on the others."""

    lr: float
    decay: float
    b1: float
    loss: float
    test_loss: float


def make_problem() -> Problem:
    """A few weights that count among 40, and noise."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.zeros(40, 1)
    weights[:5] = 1.0
    x, test_x = (torch.randn(n, 40, generator=generator) for n in (30, 200))
    y, test_y = (x @ weights + 0.5 * torch.randn(len(x), 1, generator=generator) for x in (x, test_x))
    return Problem(x, y, test_x, test_y)


def hyperparams(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Learning rate, weight decay and b1: positive numbers, and one between 0 and 1, of any numbers."""
    return raw[0].exp(), raw[1].exp(), raw[2].sigmoid()


def train(problem: Problem, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses after some steps of AdamW, on the points learned from and on the others."""
    lr, decay, b1 = hyperparams(raw)
    # at the first step, the derivative of a root of a square is bounded by eps_root
    tx = fo.adamw(lr, b1, eps_root=1e-8, weight_decay=decay)
    params = {"w": torch.zeros(40, 1, requires_grad=True)}
    state: Any = tx.init(params)

    def loss_of(w: torch.Tensor) -> torch.Tensor:
        return (problem.x @ w - problem.y).square().mean()

    for _ in range(STEPS):
        (grad,) = torch.autograd.grad(loss_of(params["w"]), params["w"], create_graph=True)
        params, state = fo.apply_gradients(tx, params, {"w": grad}, state)
    return loss_of(params["w"]), (problem.test_x @ params["w"] - problem.test_y).square().mean()


def learn(problem: Problem, rounds: int) -> list[Round]:
    """Steps of the hyper-parameters, each after a whole training."""
    raw = torch.tensor([0.002, 0.01, 0.9], dtype=torch.float64)
    raw = torch.stack([raw[0].log(), raw[1].log(), raw[2].logit()]).requires_grad_()
    outer = torch.optim.Adam([raw], lr=0.2)
    found = []
    for _ in range(rounds):
        loss, test_loss = train(problem, raw)
        lr, decay, b1 = (x.item() for x in hyperparams(raw))
        found.append(Round(lr, decay, b1, loss.item(), test_loss.item()))
        outer.zero_grad()
        test_loss.backward()
        outer.step()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41, help="trainings, each with a step of the hyper-parameters")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rounds = learn(make_problem(), args.rounds)
    print(f"round  learning rate  weight decay     b1   loss after {STEPS} steps   on other points")
    for k, found in enumerate(rounds):
        if k % 5 == 0 or k == len(rounds) - 1:
            print(
                f"{k:5}  {found.lr:13.4f}  {found.decay:12.4f}  {found.b1:5.3f}   {found.loss:19.3f}   "
                f"{found.test_loss:15.3f}"
            )
    print(f"the loss on other points falls from {rounds[0].test_loss:.3f} to {rounds[-1].test_loss:.3f}")


if __name__ == "__main__":
    main()
