"""Functions for rules that torch has no name for: reductions over a leaf or over the tree, and the cube root.

On tensors the leaf functions compute in double precision, and return a number as wide as it may have to be: in float32
for half types, which hold no large sums, in float64 for conditions and integers, and a complex number where a sum or a
mean of complex ones is. The tree functions have a meaning only inside an `elementwise` rule, where their scope is every
leaf that the transformation sees.

The functions that begin with `fused_` are one formula with the roundings of torch's fused kernels, on a CPU and on
CUDA; the columns of the operation table hold both.
"""

import functools
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from .errors import RuleError, where
from .ops import OPS


Function = TypeVar("Function", bound=Callable[[torch.Tensor], torch.Tensor])


def _of_tensors(function: Function) -> Function:
    """A function that is recorded while a rule is traced, and refuses a number in the place of a tensor."""

    @functools.wraps(function)
    def checked(x: torch.Tensor) -> torch.Tensor:
        if has_torch_function_unary(x):
            result: torch.Tensor = handle_torch_function(checked, (x,), x)
            return result
        if not isinstance(x, torch.Tensor):
            raise RuleError(f"{where()} calls `{function.__name__}` of {x!r:.60}, expected a tensor, such as `u`.")
        return function(x)

    return cast("Function", checked)


@_of_tensors
def cbrt(x: torch.Tensor) -> torch.Tensor:
    """The real cube root of every element."""
    return OPS["cbrt"].eager(x)


def _number_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a number that follows from all elements of a leaf."""
    keeps = x.is_floating_point() or x.is_complex()
    return torch.promote_types(x.dtype, torch.float32) if keeps else torch.float64


def _wide(x: torch.Tensor) -> torch.Tensor:
    """A tensor in double precision, complex where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float64))


@_of_tensors
def leaf_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over the elements of one leaf."""
    return _wide(x).sum().to(_number_dtype(x))


@_of_tensors
def leaf_mean(x: torch.Tensor) -> torch.Tensor:
    """The mean over the elements of one leaf."""
    return _wide(x).mean().to(_number_dtype(x))


@_of_tensors
def leaf_norm(x: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm of one leaf."""
    norm: torch.Tensor = torch.linalg.vector_norm(_wide(x))
    return norm.to(_number_dtype(x).to_real())


@_of_tensors
def leaf_amax(x: torch.Tensor) -> torch.Tensor:
    """The largest element of one leaf; NaN if there is one."""
    return torch.amax(x)


@_of_tensors
def leaf_size(x: torch.Tensor) -> torch.Tensor:
    """The number of elements of one leaf."""
    return torch.full((), x.numel(), dtype=_number_dtype(x).to_real(), device=x.device)


def _only_in_rules(name: str) -> TypeError:
    return TypeError(
        f"`{name}` spans every leaf that a transformation sees, so it can only be called inside an `elementwise` rule; "
        f"a `leafwise` rule, and a formula that is called on tensors, see one leaf."
    )


@_of_tensors
def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over the elements of every leaf that the transformation sees."""
    raise _only_in_rules("tree_sum")


@_of_tensors
def tree_amax(x: torch.Tensor) -> torch.Tensor:
    """The largest element over every leaf that the transformation sees; NaN if there is one."""
    raise _only_in_rules("tree_amax")


@_of_tensors
def tree_norm(x: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm over every leaf that the transformation sees, the global norm."""
    raise _only_in_rules("tree_norm")


def _fused(function: Callable[..., torch.Tensor], *xs: torch.Tensor) -> torch.Tensor:
    """The row of the operation table that has the name of a function, of tensors or of symbols."""
    if has_torch_function(xs):
        result: torch.Tensor = handle_torch_function(function, xs, *xs)
        return result
    return OPS[function.__name__].eager(*xs)


def fused_mean(moment: torch.Tensor, u: torch.Tensor, decay: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    r"""The first moment, $\beta m_{t-1} + (1 - \beta) g_t$; `rest` is $1 - \beta$."""
    return _fused(fused_mean, moment, u, decay, rest)


def fused_mean_square(moment: torch.Tensor, u: torch.Tensor, decay: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    r"""The second moment, $\beta v_{t-1} + (1 - \beta) g_t^2$; `rest` is $1 - \beta$."""
    return _fused(fused_mean_square, moment, u, decay, rest)


def fused_weight(decay: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    r"""The weight of all updates so far in a moment, $1 - \beta^t$: in the dtype of the elements on CUDA."""
    return _fused(fused_weight, decay, step)


def fused_shrink(p: torch.Tensor, rate: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    r"""A parameter after decay, $(1 - \eta\lambda)\, \theta$; `rest` is $1 - \eta\lambda$."""
    return _fused(fused_shrink, p, rate, rest)


def fused_number(x: torch.Tensor) -> torch.Tensor:
    """A number that is the same for all elements: rounded to the dtype of the elements on CUDA."""
    return _fused(fused_number, x)
