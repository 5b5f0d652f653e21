"""Meta-learning of an initialisation (MAML): a network that learns a new sine wave in a few steps of Adam.

    python examples/maml_sinusoid.py
    python examples/maml_sinusoid.py --meta-steps 2000

The inner steps are steps of this package, and autograd follows them: `loss.backward()` of the loss after them gives
the gradient of the initialisation. Kernels compute the inner steps, and their derivatives too.
"""

import argparse
import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from turns import compare

import functional_optim as fo


INNER_STEPS, TASKS, SHOTS = 5, 4, 10
Params = dict[str, torch.Tensor]


class Task(NamedTuple):
    """A wave: points to learn it from, and points to test what was learned."""

    x: torch.Tensor
    y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))


def draw(n: int, seed: int) -> list[Task]:
    """Waves with an amplitude and a phase of their own."""
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for _ in range(n):
        amplitude, phase = torch.rand(2, generator=generator).mul(torch.tensor([4.9, math.pi])).tolist()
        points = [10 * torch.rand(k, 1, generator=generator) - 5 for k in (SHOTS, 50)]
        x, y, test_x, test_y = [z for x in points for z in (x, (amplitude + 0.1) * torch.sin(x + phase))]
        tasks.append(Task(x, y, test_x, test_y))
    return tasks


def loss_of(model: nn.Module, params: Params, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (functional_call(model, params, (x,)) - y).square().mean()


def inner_optimizer() -> fo.GradientTransformation:
    """Adam. A first step divides a gradient by its size; `eps_root` bounds the derivative of that near zero."""
    return fo.adam(0.02, eps_root=1e-4)


def adapt(model: nn.Module, params: Params, task: Task, tx: fo.GradientTransformation) -> Params:
    """Parameters after the inner steps. They are functions of those before, which autograd follows."""
    state: Any = tx.init(params)
    for _ in range(INNER_STEPS):
        loss = loss_of(model, params, task.x, task.y)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params, state = fo.apply_gradients(tx, params, dict(zip(params, grads, strict=True)), state)
    return params


def meta_loss(model: nn.Module, tasks: list[Task]) -> torch.Tensor:
    """The mean loss on the test points, after the inner steps of each task."""
    params, tx = dict(model.named_parameters()), inner_optimizer()
    losses = [loss_of(model, adapt(model, params, task, tx), task.test_x, task.test_y) for task in tasks]
    return torch.stack(losses).mean()


def meta_train(model: nn.Module, steps: int) -> None:
    """Steps of the initialisation."""
    outer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for k in range(steps):
        outer.zero_grad()
        meta_loss(model, draw(TASKS, 1000 + k)).backward()
        outer.step()


def losses(model: nn.Module) -> tuple[float, float]:
    """The mean loss on new waves, before and after the inner steps."""
    params, tasks = dict(model.named_parameters()), draw(50, 1)
    before = [loss_of(model, params, task.test_x, task.test_y).item() for task in tasks]
    return sum(before) / len(before), meta_loss(model, tasks).item()


def meta_gradient(model: nn.Module, tasks: list[Task], backend: str | None = None) -> list[torch.Tensor]:
    """The gradient of the initialisation."""
    with fo.use_backend(backend) if backend else contextlib.nullcontext():
        return list(torch.autograd.grad(meta_loss(model, tasks), list(model.parameters())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meta-steps", type=int, default=150, help="steps of the initialisation")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model()

    print(f"{'mean loss on 50 new waves':<28} before {INNER_STEPS} inner steps   after")
    for title, steps in (("a random initialisation", 0), (f"after {args.meta_steps} meta-steps", args.meta_steps)):
        meta_train(model, steps)
        before, after = losses(model)
        print(f"{title:<28} {before:20.3f}   {after:.3f}")

    tasks = draw(TASKS, 2)
    ours, theirs = (meta_gradient(model, tasks, backend) for backend in (None, "reference"))
    gap = max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(ours, theirs, strict=True))
    print(f"gradients of the initialisation by kernels and by torch operations differ by {gap:.0e} of the largest")
    print(
        compare(
            lambda: meta_gradient(model, tasks),
            lambda: meta_gradient(model, tasks, "reference"),
            other="torch operations",
        )
    )


if __name__ == "__main__":
    main()
