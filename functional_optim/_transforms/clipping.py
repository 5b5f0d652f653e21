"""Clipping: updates kept small, by element, by leaf or all together; NaN taken out."""

import torch

from .._compiler.functions import leaf_amax, leaf_mean, tree_norm
from .._compiler.rule import Leaf, Scalar
from .._compiler.slots import slot
from .._rule import elementwise


def _shorten(u: Leaf, size: Leaf, limit: Scalar) -> Leaf:
    """Updates of some size made no larger than a limit; NaN in the size reaches them all."""
    within = size <= limit
    return u * torch.where(within, 1.0, limit / torch.where(within, 1.0, size))  # a division by 0 has no derivative


@elementwise(ranges={"max_delta": "[0, inf]"})
def clip(u: Leaf, *, max_delta: Scalar) -> Leaf:
    r"""Keeps each element between two bounds, $u_t = \min(\max(g_t, -\delta), \delta)$.

    Args:
      max_delta: $\delta$.

    Returns:
      The transformation.

    Raises:
      ValueError: `max_delta` is negative.

    Example:
      >>> tx = clip(1.0)
      >>> tx.update(torch.tensor([0.5, -3.0]), tx.init(torch.zeros(2)))[0]
      tensor([ 0.5000, -1.0000])
    """
    return torch.clamp(u, -max_delta, max_delta)


@elementwise(ranges={"max_norm": "[0, inf]"})
def clip_by_global_norm(u: Leaf, *, max_norm: Scalar) -> Leaf:
    r"""Shortens all updates together if their norm is too large.

    $$u_t = g_t \min(1, c / \lVert g_t \rVert), \quad \lVert \cdot \rVert \text{ over all leaves}$$

    The norm spans the leaves that this transformation sees: a mask or a partition narrows it. Squares are computed
    and summed in double precision.

    Args:
      max_norm: c.

    Returns:
      The transformation.

    Raises:
      ValueError: `max_norm` is negative.

    Example:
      >>> tx = clip_by_global_norm(1.0)
      >>> tx.update([torch.tensor([3.0]), torch.tensor([4.0])], tx.init([torch.zeros(1)] * 2))[0]
      [tensor([0.6000]), tensor([0.8000])]

    Source: Pascanu et al. 2013, arXiv:1211.5063, algorithm 1.
    """
    return _shorten(u, tree_norm(u), max_norm)


@elementwise(ranges={"threshold": "(0, inf]"})
def clip_by_block_rms(u: Leaf, *, threshold: Scalar) -> Leaf:
    r"""Shortens each leaf's update if its root mean square is too large.

    $$u_t = g_t / \max(1, \operatorname{RMS}(g_t) / d)$$

    Args:
      threshold: d.

    Returns:
      The transformation.

    Raises:
      ValueError: `threshold` is not positive.

    Example:
      >>> tx = clip_by_block_rms(1.0)
      >>> tx.update(torch.tensor([2.0, -2.0]), tx.init(torch.zeros(2)))[0]
      tensor([ 1., -1.])

    Source: Shazeer & Stern 2018, arXiv:1804.04235, section 6.
    """
    return _shorten(u, torch.sqrt(leaf_mean(u * u)), threshold)


@elementwise(state={"found_nan": slot(0.0, per="leaf")})
def zero_nans(u: Leaf, found_nan: Leaf) -> tuple[Leaf, Leaf]:
    r"""Replaces NaN by 0; infinities stay.

    Returns:
      The transformation. Its state is `(found_nan,)`: for each leaf 1.0 if its last update held NaN, else 0.0.

    Example:
      >>> tx = zero_nans()
      >>> updates, state = tx.update(torch.tensor([1.0, torch.nan]), tx.init(torch.zeros(2)))
      >>> updates, state.found_nan
      (tensor([1., 0.]), tensor(1.))
    """
    return torch.where(torch.isnan(u), 0.0, u), leaf_amax(torch.isnan(u))
