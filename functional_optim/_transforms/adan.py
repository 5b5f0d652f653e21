"""Adan: Adam whose momentum looks ahead by a mean of differences of updates."""

import torch

from .._compiler.rule import Leaf, Scalar
from .._compiler.slots import slot
from .._rule import elementwise
from ._moments import mean, mean_square, unbiased


@elementwise(
    state={"m": slot(0.0), "v": slot(0.0), "n": slot(0.0, square=True), "g": slot("first_update")},
    ranges={"b1": "[0, 1)", "b2": "[0, 1)", "b3": "[0, 1)", "eps": "[0, inf)", "eps_root": "[0, inf)"},
)
def scale_by_adan(
    u: Leaf,
    m: Leaf,
    v: Leaf,
    n: Leaf,
    g: Leaf,
    *,
    step: Scalar,
    b1: Scalar = 0.98,
    b2: Scalar = 0.92,
    b3: Scalar = 0.99,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
) -> tuple[Leaf, Leaf, Leaf, Leaf, Leaf]:
    r"""Adan: means of updates and of their differences over the root of a mean of squares.

    $$d_t = g_t - g_{t-1}, \quad m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
      v_t = \beta_2 v_{t-1} + (1 - \beta_2) d_t$$
    $$n_t = \beta_3 n_{t-1} + (1 - \beta_3) (g_t + \beta_2 d_t)^2, \quad
      u_t = \frac{\hat m_t + \beta_2 \hat v_t}{\sqrt{\hat n_t + \bar\epsilon} + \epsilon}$$

    with $\hat m_t = m_t / (1 - \beta_1^t)$ and so on; the first difference is 0. The betas are decays, as in optax and
    in the authors' code; the paper's are 1 minus these. optax has $1 - \beta_2$ for both $\beta_2$ of the second line.

    Args:
      b1: decay of the mean of updates.
      b2: decay of the mean of differences.
      b3: decay of the mean of squares.
      eps: term outside the root.
      eps_root: term inside the root.

    Returns:
      The transformation. Its state is `(count, m, v, n, g)`; optax calls the count `t`, and has it last.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> tx = scale_by_adan()
      >>> tx.update(torch.tensor([1.0, -3.0]), tx.init(torch.zeros(2)))[0]
      tensor([ 1., -1.])

    Source: Xie et al. 2022, arXiv:2208.06677, algorithm 1.
    """
    difference = u - g
    m, v = mean(m, u, b1), mean(v, difference, b2)
    n = mean_square(n, u + b2 * difference, b3)
    ahead = unbiased(m, b1, step) + b2 * unbiased(v, b2, step)
    return ahead / (torch.sqrt(unbiased(n, b3, step) + eps_root) + eps), m, v, n, u
