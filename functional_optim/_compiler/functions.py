"""Functions for rules that torch has no name for: reductions over a leaf or over the tree, and the cube root.

On tensors the leaf functions compute in double precision, and return a number as wide as it may have to be: in float32
for half types, which hold no large sums, in float64 for conditions and integers, and a complex number where a sum or a
mean of complex ones is. The tree functions have a meaning only inside an `elementwise` rule, where their scope is every
leaf that the transformation sees.

The functions that begin with `fused_` are one formula with the roundings of torch's fused kernels, on a CPU and on
CUDA; the columns of the operation table hold both.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from .errors import RuleError, where
from .ops import OPS


def _overridden(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The result that the class of `x` has for a function: while a rule is traced, a symbol."""
    result: torch.Tensor = handle_torch_function(function, (x,), x)
    return result


def _check(name: str, x: Any) -> None:
    """Refuses a number in the place of a tensor.

    Raises:
      RuleError: with the name of the function, and the number.
    """
    if not isinstance(x, torch.Tensor):
        raise RuleError(f"{where()} calls `{name}` of {x!r:.60}, expected a tensor, such as `u`.")


def cbrt(x: torch.Tensor) -> torch.Tensor:
    """The real cube root of every element."""
    if has_torch_function_unary(x):
        return _overridden(cbrt, x)
    _check("cbrt", x)
    return OPS["cbrt"].eager(x)


def _number_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a number that follows from all elements of a leaf."""
    keeps = x.is_floating_point() or x.is_complex()
    return torch.promote_types(x.dtype, torch.float32) if keeps else torch.float64


def _wide(x: torch.Tensor) -> torch.Tensor:
    """A tensor in double precision, complex where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float64))


def leaf_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over the elements of one leaf."""
    if has_torch_function_unary(x):
        return _overridden(leaf_sum, x)
    _check("leaf_sum", x)
    return _wide(x).sum().to(_number_dtype(x))


def leaf_mean(x: torch.Tensor) -> torch.Tensor:
    """The mean over the elements of one leaf."""
    if has_torch_function_unary(x):
        return _overridden(leaf_mean, x)
    _check("leaf_mean", x)
    return _wide(x).mean().to(_number_dtype(x))


def leaf_norm(x: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm of one leaf."""
    if has_torch_function_unary(x):
        return _overridden(leaf_norm, x)
    _check("leaf_norm", x)
    norm: torch.Tensor = torch.linalg.vector_norm(_wide(x))
    return norm.to(_number_dtype(x).to_real())


def leaf_amax(x: torch.Tensor) -> torch.Tensor:
    """The largest element of one leaf; NaN if there is one."""
    if has_torch_function_unary(x):
        return _overridden(leaf_amax, x)
    _check("leaf_amax", x)
    return torch.amax(x)


def leaf_size(x: torch.Tensor) -> torch.Tensor:
    """The number of elements of one leaf."""
    if has_torch_function_unary(x):
        return _overridden(leaf_size, x)
    _check("leaf_size", x)
    return torch.full((), x.numel(), dtype=_number_dtype(x).to_real(), device=x.device)


def _only_in_rules(name: str, x: Any) -> NoReturn:
    _check(name, x)
    raise TypeError(
        f"`{name}` spans every leaf that a transformation sees, so it can only be called inside an `elementwise` rule; "
        f"a `leafwise` rule, and a formula that is called on tensors, see one leaf."
    )


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over the elements of every leaf that the transformation sees."""
    if has_torch_function_unary(x):
        return _overridden(tree_sum, x)
    _only_in_rules("tree_sum", x)


def tree_amax(x: torch.Tensor) -> torch.Tensor:
    """The largest element over every leaf that the transformation sees; NaN if there is one."""
    if has_torch_function_unary(x):
        return _overridden(tree_amax, x)
    _only_in_rules("tree_amax", x)


def tree_norm(x: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm over every leaf that the transformation sees, the global norm."""
    if has_torch_function_unary(x):
        return _overridden(tree_norm, x)
    _only_in_rules("tree_norm", x)


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
