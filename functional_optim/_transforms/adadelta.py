"""Adadelta: updates in the units of the parameters, by a mean of the squares of past steps."""

from collections.abc import Callable

import torch

from .._compiler.rule import Leaf, Scalar
from .._compiler.slots import slot
from .._rule import elementwise
from ._moments import mean_square, torch_mean_square


RANGES = {"rho": "[0, 1]", "eps": "[0, inf)"}


def _adadelta(
    u: Leaf, e_g: Leaf, e_x: Leaf, rho: Scalar, eps: Scalar, mean: Callable[[Leaf, Leaf, Scalar], Leaf]
) -> tuple[Leaf, Leaf, Leaf]:
    e_g = mean(e_g, u, rho)
    u = torch.sqrt(e_x + eps) / torch.sqrt(e_g + eps) * u
    return u, e_g, mean(e_x, u, rho)


@elementwise(state={"e_g": slot(0.0, square=True), "e_x": slot(0.0, square=True)}, ranges=RANGES)
def scale_by_adadelta(
    u: Leaf, e_g: Leaf, e_x: Leaf, *, rho: Scalar = 0.9, eps: Scalar = 1e-6
) -> tuple[Leaf, Leaf, Leaf]:
    r"""Adadelta: an update over the root of a mean of past squares, times that of past steps.

    $$v_t = \rho v_{t-1} + (1 - \rho) g_t^2, \quad
      u_t = \frac{\sqrt{x_{t-1} + \epsilon}}{\sqrt{v_t + \epsilon}} g_t, \quad
      x_t = \rho x_{t-1} + (1 - \rho) u_t^2$$

    Args:
      rho: $\rho$, the decay of both means.
      eps: $\epsilon$; with 0 nothing ever moves, since no step has been taken before the first.

    Returns:
      The transformation. Its state is `(e_g, e_x)`.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> tx = scale_by_adadelta(rho=0.75, eps=0.75)
      >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)))[0]
      tensor([0.8660])

    Source: Zeiler 2012, arXiv:1212.5701, algorithm 1.
    """
    return _adadelta(u, e_g, e_x, rho, eps, mean_square)


@elementwise(state={"square_avg": slot(0.0), "acc_delta": slot(0.0)})
def adadelta_ratio(
    u: Leaf, square_avg: Leaf, acc_delta: Leaf, *, step: Scalar, rho: Scalar, eps: Scalar
) -> tuple[Leaf, Leaf, Leaf]:
    r"""torch's Adadelta before its learning rate, the same formula.

    Args:
      rho: $\rho$, the decay of both means.
      eps: $\epsilon$.

    Returns:
      The transformation. It counts steps, as torch does, though nothing depends on them.

    Example:
      >>> tx = adadelta_ratio(0.75, 0.75)
      >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)))[0]
      tensor([0.8660])

    Source: Zeiler 2012, arXiv:1212.5701, algorithm 1.
    """
    return _adadelta(u, square_avg, acc_delta, rho, eps, torch_mean_square)
