"""Optimizers that have taken two steps, so that the next one may be captured."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import functional_optim as fo
from functional_optim import adapters


SIZES = (5, 33, 8)


def make(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(n, generator=generator)) for n in SIZES]


def grads(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(n, generator=generator) for n in SIZES]


def set_grads(params: list[nn.Parameter], new: list[torch.Tensor]) -> None:
    for p, g in zip(params, new, strict=True):
        p.grad = g


def chain() -> fo.GradientTransformation:
    return fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-2))


def warm(seed: int = 0, **options: Any) -> tuple[list[nn.Parameter], Any]:
    """Parameters and an optimizer that has taken two steps, the second and later ones alike."""
    params = make(seed)
    opt = adapters.AdamW(params, **{"lr": 0.1, **options})
    for step in range(2):
        set_grads(params, grads(step))
        opt.step()
    return params, opt


class Running:
    """A transformation in Python, with a running mean of the updates and the number of steps.

    Args:
      counts: the number, from the one before.
    """

    def __init__(self, counts: Callable[[Any], Any]) -> None:
        self.counts = counts

    def init(self, params: Any) -> Any:
        return {"mean": {k: torch.zeros_like(p) for k, p in params.items()}, "steps": 0}

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        mean = {k: 0.5 * state["mean"][k] + u for k, u in updates.items()}
        return mean, {"mean": mean, "steps": self.counts(state["steps"])}
