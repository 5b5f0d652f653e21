"""Warnings about steps that autograd records."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ._runtime.checks import at
from ._warn import warn


def requires_gradient(tensors: Iterable[Any]) -> bool:
    """Whether one of them requires a gradient."""
    return any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)


def warn_of_growth(params: Sequence[Any], paths: Sequence[str]) -> None:
    """Warns of parameters that a recorded step has made, where nothing but parameters requires a gradient."""
    for path, p in zip(paths, params, strict=True):
        if isinstance(p, torch.Tensor) and p.grad_fn is not None:
            return warn(
                f"params{at(path)} is the result of a step that autograd recorded, and this one is recorded too: the "
                f"graph grows with every step, and steps are slow. Wrap them in `torch.no_grad()`, or start from "
                f"`{{k: p.detach() for k, p in params.items()}}`."
            )
