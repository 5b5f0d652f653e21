"""AdaBelief: Adam that divides by how far updates are from their mean."""

import torch

from .._compiler.rule import Leaf, Scalar
from .._compiler.slots import slot
from .._rule import elementwise
from ._moments import looking_ahead, mean, mean_square, unbiased


@elementwise(
    state={"mu": slot(0.0), "nu": slot(0.0, square=True)},
    static=("nesterov",),
    ranges={"b1": "[0, 1)", "b2": "[0, 1)", "eps": "[0, inf)", "eps_root": "[0, inf)"},
)
def scale_by_belief(
    u: Leaf,
    mu: Leaf,
    nu: Leaf,
    *,
    step: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-16,
    eps_root: Scalar = 1e-16,
    nesterov: bool = False,
) -> tuple[Leaf, Leaf, Leaf]:
    r"""AdaBelief: a mean of past updates over the root of a mean of squared differences from it.

    $$m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
      s_t = \beta_2 s_{t-1} + (1 - \beta_2) (g_t - m_t)^2 + \bar\epsilon$$
    $$u_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{s_t / (1 - \beta_2^t)} + \epsilon}$$

    With `nesterov`, the numerator is $\beta_1 m_t / (1 - \beta_1^{t+1}) + (1 - \beta_1) g_t / (1 - \beta_1^t)$.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: term outside the root.
      eps_root: term that is added to the second moment at every step.
      nesterov: whether the numerator looks one step ahead, as in NAdam.

    Returns:
      The transformation. Its state is `(count, mu, nu)`.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> tx = scale_by_belief()
      >>> tx.update(torch.tensor([1.0, -3.0]), tx.init(torch.zeros(2)))[0]
      tensor([ 1.1111, -1.1111])

    Source: Zhuang et al. 2020, arXiv:2010.07468, algorithm 2.
    """
    mu = mean(mu, u, b1)
    nu = mean_square(nu, u - mu, b2) + eps_root
    mu_hat = looking_ahead(mu, u, b1, step) if nesterov else unbiased(mu, b1, step)
    return mu_hat / (torch.sqrt(unbiased(nu, b2, step)) + eps), mu, nu
