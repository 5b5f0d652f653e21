"""Warnings about steps that autograd records."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ._runtime.checks import at
from ._tree import Spec, paths
from ._warn import warn


def requires_gradient(tensors: Iterable[Any]) -> bool:
    """Whether one of them requires a gradient."""
    return any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)


def warn_of_growth(params: Sequence[Any], spec: Spec) -> None:
    """Warns of parameters that a recorded step has made, where nothing but parameters requires a gradient.

    Args:
      params: the leaves, None where one takes no part.
      spec: the structure that they are leaves of.
    """
    for k, p in enumerate(params):
        if isinstance(p, torch.Tensor) and p.grad_fn is not None:
            warn(
                f"params{at(paths(spec)[k])} is the result of a step that autograd recorded, and this one is recorded "
                f"too: the graph grows with every step, and steps are slow. Wrap them in `torch.no_grad()`, or start "
                f"from `{{k: p.detach() for k, p in params.items()}}`."
            )
            return
