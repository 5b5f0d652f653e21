"""Adamax: a mean of past updates over their largest size, which decays."""

import torch

from .._compiler.rule import Leaf, Scalar
from .._compiler.slots import slot
from .._rule import elementwise
from ._moments import mean, torch_mean, unbiased, weight


def _largest(nu: Leaf, u: Leaf, b2: Scalar, eps: Scalar) -> Leaf:
    return torch.maximum(b2 * nu, torch.abs(u) + eps)


@elementwise(state={"mu": slot(0.0), "nu": slot(0.0)}, ranges={"b1": "[0, 1)", "b2": "[0, 1)", "eps": "[0, inf)"})
def scale_by_adamax(
    u: Leaf, mu: Leaf, nu: Leaf, *, step: Scalar, b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8
) -> tuple[Leaf, Leaf, Leaf]:
    r"""Adamax: Adam with the largest size of past updates in the place of a root of a mean of squares.

    $$m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad \nu_t = \max(\beta_2 \nu_{t-1}, |g_t| + \epsilon), \quad
      u_t = \frac{m_t}{(1 - \beta_1^t)\, \nu_t}$$

    Args:
      b1: decay of the first moment.
      b2: decay of the largest size.
      eps: term in the denominator.

    Returns:
      The transformation. Its state is `(count, mu, nu)`.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> tx = scale_by_adamax()
      >>> tx.update(torch.tensor([1.0, -3.0]), tx.init(torch.zeros(2)))[0]
      tensor([ 1., -1.])

    Source: Kingma & Ba 2015, arXiv:1412.6980, algorithm 2.
    """
    mu, nu = mean(mu, u, b1), _largest(nu, u, b2, eps)
    return unbiased(mu, b1, step) / nu, mu, nu


@elementwise(state={"exp_avg": slot(0.0), "exp_inf": slot(0.0)})
def adamax_step(
    u: Leaf,
    exp_avg: Leaf,
    exp_inf: Leaf,
    *,
    step: Scalar,
    learning_rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
) -> tuple[Leaf, Leaf, Leaf]:
    r"""A step of Adamax, rounded as in torch.

    Args:
      learning_rate: $\eta$.
      b1: decay of the first moment.
      b2: decay of the largest size.
      eps: term in the denominator.

    Returns:
      The transformation.

    Example:
      >>> tx = adamax_step(0.1)
      >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)))[0]
      tensor([-0.1000])

    Source: Kingma & Ba 2015, arXiv:1412.6980, algorithm 2.
    """
    exp_avg, exp_inf = torch_mean(exp_avg, u, b1), _largest(exp_inf, u, b2, eps)
    return (-(learning_rate / weight(b1, step)) * exp_avg) / exp_inf, exp_avg, exp_inf
