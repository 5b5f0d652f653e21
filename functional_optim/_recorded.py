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
    """Warns of parameters that autograd has recorded, as steps do, where nothing but parameters requires a gradient.

    Args:
      params: the leaves, None where one takes no part.
      spec: the structure that they are leaves of.
    """
    for k, p in enumerate(params):
        if isinstance(p, torch.Tensor) and p.grad_fn is not None:
            warn(
                f"params{at(paths(spec)[k])} is the result of operations that autograd recorded, as a step, and this "
                f"step is recorded too, with gradients that are constants: in training the graph grows with every "
                f"step, and steps are slow. Wrap them in `torch.no_grad()`, or start from `{{k: p.detach() for k, p in "
                f"params.items()}}`. A derivative through these steps needs no change."
            )
            return
