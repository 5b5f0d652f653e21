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
    r"""The real cube root of every element.

    $$y_i = \sqrt[3]{x_i}$$

    Args:
      x: a tensor or, in a rule, an expression of the elements of a leaf.

    Returns:
      A tensor like `x`, in its dtype, or in the default dtype for integers.

    Raises:
      RuleError: `x` is a number.

    Example:
      >>> cbrt(torch.tensor([8.0, -27.0]))
      tensor([ 2., -3.])
    """
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
    r"""The sum over the elements of one leaf.

    $$\textstyle\sum_i x_i$$

    Args:
      x: a tensor or, in a rule, an expression of the elements of a leaf.

    Returns:
      A 0-d tensor in the dtype of `x`, or in float32 for half types; in float64 for integers and conditions.

    Raises:
      RuleError: `x` is a number.

    Example:
      >>> leaf_sum(torch.tensor([1.0, 2.0, 4.0]))
      tensor(7.)
    """
    return _wide(x).sum().to(_number_dtype(x))


@_of_tensors
def leaf_mean(x: torch.Tensor) -> torch.Tensor:
    r"""The mean over the elements of one leaf.

    $$\textstyle\frac{1}{n} \sum_i x_i$$

    Args:
      x: a tensor or, in a rule, an expression of the elements of a leaf.

    Returns:
      A 0-d tensor in the dtype of `x`, or in float32 for half types; in float64 for integers and conditions.

    Raises:
      RuleError: `x` is a number.

    Example:
      >>> leaf_mean(torch.tensor([1.0, 2.0, 6.0]))
      tensor(3.)
    """
    return _wide(x).mean().to(_number_dtype(x))


@_of_tensors
def leaf_norm(x: torch.Tensor) -> torch.Tensor:
    r"""The Euclidean norm of one leaf.

    $$\textstyle\lVert x \rVert_2 = \sqrt{\sum_i |x_i|^2}$$

    Args:
      x: a tensor or, in a rule, an expression of the elements of a leaf.

    Returns:
      A 0-d tensor in the real dtype of `x`, or in float32 for half types; in float64 for integers and conditions.

    Raises:
      RuleError: `x` is a number.

    Example:
      >>> from functional_optim import elementwise
      >>> @elementwise
      ... def normalize(u):
      ...     return u / leaf_norm(u)
      >>> tx, u = normalize(), torch.tensor([3.0, 4.0])
      >>> tx.update(u, tx.init(u))[0]
      tensor([0.6000, 0.8000])
    """
    norm: torch.Tensor = torch.linalg.vector_norm(_wide(x))
    return norm.to(_number_dtype(x).to_real())


@_of_tensors
def leaf_amax(x: torch.Tensor) -> torch.Tensor:
    r"""The largest element of one leaf; NaN if there is one.

    $$\max_i x_i$$

    Args:
      x: a tensor or, in a rule, an expression of the elements of a leaf.

    Returns:
      A 0-d tensor in the dtype of `x`.

    Raises:
      RuleError: `x` is a number.
      RuntimeError: a tensor has no elements.

    Example:
      >>> leaf_amax(torch.tensor([1.0, 5.0, 2.0]))
      tensor(5.)
    """
    return torch.amax(x)


@_of_tensors
def leaf_size(x: torch.Tensor) -> torch.Tensor:
    r"""The number of elements of one leaf.

    $$n$$

    Args:
      x: a tensor or, in a rule, an expression of the elements of a leaf.

    Returns:
      A 0-d tensor in the dtype of `x`, or in float32 for half types; in float64 for integers and conditions.

    Raises:
      RuleError: `x` is a number.

    Example:
      >>> leaf_size(torch.zeros(2, 3))
      tensor(6.)
    """
    return torch.full((), x.numel(), dtype=_number_dtype(x).to_real(), device=x.device)


def _only_in_rules(name: str) -> TypeError:
    return TypeError(
        f"`{name}` spans every leaf that a transformation sees, so it can only be called inside an `elementwise` rule; "
        f"a `leafwise` rule, and a formula that is called on tensors, see one leaf."
    )


@_of_tensors
def tree_sum(x: torch.Tensor) -> torch.Tensor:
    r"""The sum over the elements of every leaf that the transformation sees.

    $$\textstyle\sum_l \sum_i x_{l,i}$$

    Args:
      x: an expression of the elements of a leaf, in an `elementwise` rule.

    Returns:
      A number that is the same for every leaf.

    Raises:
      TypeError: the function is called outside of such a rule.
      RuleError: `x` is a number.

    Example:
      >>> from functional_optim import elementwise
      >>> @elementwise
      ... def share(u):
      ...     return u / tree_sum(u)
      >>> tx, u = share(), {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0])}
      >>> tx.update(u, tx.init(u))[0]["b"]
      tensor([0.6250])
    """
    raise _only_in_rules("tree_sum")


@_of_tensors
def tree_amax(x: torch.Tensor) -> torch.Tensor:
    r"""The largest element over every leaf that the transformation sees; NaN if there is one.

    $$\max_l \max_i x_{l,i}$$

    Args:
      x: an expression of the elements of a leaf, in an `elementwise` rule.

    Returns:
      A number that is the same for every leaf.

    Raises:
      TypeError: the function is called outside of such a rule.
      RuleError: `x` is a number.

    Example:
      >>> from functional_optim import elementwise
      >>> @elementwise
      ... def scale_to_one(u):
      ...     return u / tree_amax(torch.abs(u))
      >>> tx, u = scale_to_one(), {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([2.0])}
      >>> tx.update(u, tx.init(u))[0]["b"]
      tensor([0.5000])
    """
    raise _only_in_rules("tree_amax")


@_of_tensors
def tree_norm(x: torch.Tensor) -> torch.Tensor:
    r"""The Euclidean norm over every leaf that the transformation sees, the global norm.

    $$\textstyle\sqrt{\sum_l \lVert x_l \rVert_2^2}$$

    Args:
      x: an expression of the elements of a leaf, in an `elementwise` rule.

    Returns:
      A number that is the same for every leaf.

    Raises:
      TypeError: the function is called outside of such a rule.
      RuleError: `x` is a number.

    Example:
      >>> from functional_optim import elementwise
      >>> @elementwise
      ... def normalize(u):
      ...     return u / tree_norm(u)
      >>> tx, u = normalize(), {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
      >>> tx.update(u, tx.init(u))[0]["b"]
      tensor([0.8000])
    """
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
