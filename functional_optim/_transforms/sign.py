"""Signs: updates of equal size, and Lion."""

import torch

from .._compiler.rule import NUMBER, Leaf, OptionalDtype, Scalar
from .._compiler.slots import slot
from .._rule import elementwise
from ._moments import mean


@elementwise
def scale_by_sign(u: Leaf) -> Leaf:
    r"""Keeps only the sign of each element, $u_t = \operatorname{sign} g_t$.

    Returns:
      The transformation. It has no state.

    Example:
      >>> tx = scale_by_sign()
      >>> tx.update(torch.tensor([1.0, -3.0, 0.0]), tx.init(torch.zeros(3)))[0]
      tensor([ 1., -1.,  0.])

    Source: Bernstein et al. 2018, arXiv:1802.04434, algorithm 1.
    """
    return torch.sign(u)


@elementwise(
    state={"mu": slot(0.0, dtype="mu_dtype")},
    static=("mode",),
    ranges={"b1": "[0, 1]", "b2": "[0, 1]", "mode": ("hard", "smooth", "refined"), "smooth_beta": NUMBER},
)
def scale_by_lion(
    u: Leaf,
    mu: Leaf,
    *,
    step: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: OptionalDtype = None,
    mode: str = "hard",
    smooth_beta: Scalar = 1.0,
) -> tuple[Leaf, Leaf]:
    r"""Lion: the sign of an interpolation between momentum and update.

    $$u_t = \operatorname{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t), \quad
      m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t$$

    Args:
      b1: share of the momentum in the step.
      b2: decay of the momentum.
      mu_dtype: how the momentum is stored; by default as the parameter.
      mode: `"hard"`, the sign; `"smooth"`, $\tanh(c\,x)$ in its place; `"refined"`, x itself between -1 and 1.
      smooth_beta: c.

    Returns:
      The transformation. Its state is `(count, mu)`.

    Raises:
      ValueError: a number is out of its range, or `mode` is unknown.

    Example:
      >>> tx = scale_by_lion()
      >>> tx.update(torch.tensor([1.0, -3.0]), tx.init(torch.zeros(2)))[0]
      tensor([ 1., -1.])

    Source: Chen et al. 2023, arXiv:2302.06675, algorithm 2.
    """
    x = (1 - b1) * u + b1 * mu
    mu = mean(mu, u, b2)
    if mode == "smooth":
        return torch.tanh(smooth_beta * x), mu
    if mode == "refined":
        return torch.where(torch.abs(x) < 1, x, torch.sign(x)), mu
    return torch.sign(x), mu
