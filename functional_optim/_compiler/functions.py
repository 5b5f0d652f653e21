"""Functions for rules that torch has no name for: reductions over a leaf or over the tree, and the cube root.

On tensors the leaf functions compute what they say, in double precision. The tree functions have a meaning only inside
a rule, where their scope is every leaf that the transformation sees.
"""

from collections.abc import Callable
from typing import NoReturn

import torch
from torch.overrides import handle_torch_function, has_torch_function_unary

from .ops import OPS


def _overridden(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The result that the class of `x` has for a function: while a rule is traced, a symbol."""
    result: torch.Tensor = handle_torch_function(function, (x,), x)
    return result


def cbrt(x: torch.Tensor) -> torch.Tensor:
    """The real cube root of every element."""
    if has_torch_function_unary(x):
        return _overridden(cbrt, x)
    return OPS["cbrt"].eager(x)


def leaf_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over the elements of one leaf."""
    if has_torch_function_unary(x):
        return _overridden(leaf_sum, x)
    return x.double().sum().to(x.dtype)


def leaf_mean(x: torch.Tensor) -> torch.Tensor:
    """The mean over the elements of one leaf."""
    if has_torch_function_unary(x):
        return _overridden(leaf_mean, x)
    return x.double().mean().to(x.dtype)


def leaf_norm(x: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm of one leaf."""
    if has_torch_function_unary(x):
        return _overridden(leaf_norm, x)
    norm: torch.Tensor = torch.linalg.vector_norm(x.double())
    return norm.to(x.dtype)


def leaf_amax(x: torch.Tensor) -> torch.Tensor:
    """The largest element of one leaf; NaN if there is one."""
    if has_torch_function_unary(x):
        return _overridden(leaf_amax, x)
    return torch.amax(x)


def leaf_size(x: torch.Tensor) -> torch.Tensor:
    """The number of elements of one leaf."""
    if has_torch_function_unary(x):
        return _overridden(leaf_size, x)
    return torch.full((), x.numel(), dtype=x.dtype, device=x.device)


def _only_in_rules(name: str) -> NoReturn:
    raise TypeError(f"`{name}` spans every leaf that a transformation sees, so it can only be called inside a rule.")


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over the elements of every leaf that the transformation sees."""
    if has_torch_function_unary(x):
        return _overridden(tree_sum, x)
    _only_in_rules("tree_sum")


def tree_amax(x: torch.Tensor) -> torch.Tensor:
    """The largest element over every leaf that the transformation sees; NaN if there is one."""
    if has_torch_function_unary(x):
        return _overridden(tree_amax, x)
    _only_in_rules("tree_amax")


def tree_norm(x: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm over every leaf that the transformation sees, the global norm."""
    if has_torch_function_unary(x):
        return _overridden(tree_norm, x)
    _only_in_rules("tree_norm")
