"""The Polyak step: a learning rate from the value of the objective."""

import torch

from .._compiler.functions import tree_sum
from .._compiler.rule import NUMBER, Leaf, Scalar
from .._rule import elementwise


@elementwise(
    static=("variant",),
    extra=("value",),
    ranges={"f_min": NUMBER, "max_learning_rate": "(0, inf]", "eps": "[0, inf)", "variant": ("sps", "sps+")},
)
def scale_by_polyak(
    u: Leaf,
    *,
    value: Scalar,
    f_min: Scalar = 0.0,
    max_learning_rate: Scalar = 1.0,
    eps: Scalar = 0.0,
    variant: str = "sps",
) -> Leaf:
    r"""Multiplies by the Polyak step size, which reaches the least value of a function that is linear.

    $$u_t = g_t \min\left( \frac{f(\theta) - f_*}{\lVert g_t \rVert^2 + \epsilon}, \gamma_{\max} \right), \quad
      \lVert \cdot \rVert \text{ over all leaves}$$

    The step size is 0 where the denominator is no more than $2^{-52}$.

    Args:
      f_min: $f_*$, the least value of the objective, or a bound.
      max_learning_rate: $\gamma_{\max}$.
      eps: term in the denominator.
      variant: `"sps"`, or `"sps+"`, whose step size is never negative.

    Returns:
      The transformation. It has no state; `update` takes the objective as `value`.

    Raises:
      ValueError: a number is out of its range, or `variant` is unknown.

    Example:
      >>> tx = scale_by_polyak()
      >>> tx.update(torch.tensor([2.0]), tx.init(torch.zeros(1)), value=1.0)[0]
      tensor([0.5000])

    Source: Loizou et al. 2021, arXiv:2002.10542, equation 2; Garrigos et al. 2023, arXiv:2307.14528 for `"sps+"`.
    """
    gap = torch.clamp(value - f_min, min=0.0) if variant == "sps+" else value - f_min
    square = tree_sum(u * u) + eps
    vanishes = square <= torch.finfo(torch.float64).eps
    rate = torch.clamp(gap / torch.where(vanishes, 1.0, square), max=max_learning_rate)
    return torch.where(vanishes, 0.0, rate) * u
