"""Fromage: a step that keeps the length of parameters from growing."""

import torch

from .._compiler.rule import Leaf, Scalar
from .._rule import elementwise


@elementwise
def descend_and_shrink(u: Leaf, p: Leaf, *, learning_rate: Scalar) -> Leaf:
    r"""A step down and onto the sphere, $\theta_t = (\theta_{t-1} - \eta g_t) / \sqrt{1 + \eta^2}$.

    Args:
      learning_rate: $\eta$.

    Returns:
      The transformation; its update is the difference of the parameters.

    Example:
      >>> tx = descend_and_shrink(0.75)
      >>> params = torch.ones(1)
      >>> tx.update(torch.ones(1), tx.init(params), params)[0]
      tensor([-0.8000])

    Source: Bernstein et al. 2020, arXiv:2002.03432, algorithm 1.
    """
    shrinking = 1 / torch.sqrt(1 + learning_rate * learning_rate)
    return (shrinking - 1) * p - shrinking * learning_rate * u
