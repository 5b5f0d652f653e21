"""Compiles a whole train step with `torch.compile(fullgraph=True)`, optimizer and all, in four forms.

The forms are: torch.optim.AdamW, whose step is a function of its own beside the compiled loss, because torch breaks the
graph there; a chain whose step is one operation, pure and in place; and the same chain traced into the graph. A model
as small as this one shows the price of an operation, which Python computes; `docs/compiled.md` says what each is for.

    python examples/compiled_step.py
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.func import functional_call, grad_and_value

import functional_optim as fo


LAYERS, WIDTH, STEPS = 4, 64, 50
Params = dict[str, torch.Tensor]


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())]
    return torch.nn.Sequential(*layers)


def torch_optim(model: torch.nn.Module, rate: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """torch's own, compiled: the loss in one graph, the step in another."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(rate), weight_decay=1e-4)
    loss_of = torch.compile(lambda x, y: (model(x) - y).square().mean())
    take = torch.compile(optimizer.step)

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(x, y)
        loss.backward()
        take()
        return loss.detach()

    return step


def chain(model: torch.nn.Module, rate: float, donate: bool) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Loss, gradients and step in one graph."""
    tx = fo.adamw(rate, weight_decay=1e-4)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    trees = [params, tx.init(params)]

    def loss_of(params: Params, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (functional_call(model, params, (x,)) - y).square().mean()

    @torch.compile(fullgraph=True)
    def train_step(params: Params, state: Any, x: torch.Tensor, y: torch.Tensor) -> tuple[Params, Any, torch.Tensor]:
        grads, loss = grad_and_value(loss_of)(params, x, y)
        params, state = fo.apply_gradients(tx, params, grads, state, donate=donate)
        return params, state, loss

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        *trees[:], loss = train_step(*trees, x, y)
        return loss  # type: ignore[no-any-return]

    return step


def traced(model: torch.nn.Module, rate: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The same, with the formulas in the graph in place of the operation."""
    take = chain(model, rate, donate=True)

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with fo.use_backend("reference"):
            return take(x, y)

    return step


def main() -> None:
    torch.set_num_threads(1)
    x, y = torch.randn(32, WIDTH), torch.randn(32, WIDTH)
    forms = {
        "torch.optim.AdamW": lambda model: torch_optim(model, 1e-3),
        "one operation": lambda model: chain(model, 1e-3, donate=False),
        "one operation, in place": lambda model: chain(model, 1e-3, donate=True),
        "traced, in place": lambda model: traced(model, 1e-3),
    }
    torch.compile(torch.sin)(torch.ones(3))  # the compiler starts, which takes seconds
    print(f"{2 * LAYERS} tensors, {STEPS} steps")
    for name, make in forms.items():
        torch.compiler.reset()
        step = make(make_model())
        times, losses = [], []
        for _ in range(STEPS):
            start = time.perf_counter()
            losses.append(step(x, y))
            times.append(time.perf_counter() - start)
        print(
            f"{name:24} compiles in {times[0]:5.1f} s, then {1e3 * median(times[3:]):6.3f} ms a step; "
            f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"
        )


if __name__ == "__main__":
    main()
