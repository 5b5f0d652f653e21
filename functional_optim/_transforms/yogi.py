"""Yogi: Adam whose second moment grows and shrinks by no more than a share of the squared update."""

import torch

from .._compiler.rule import Leaf, Scalar
from .._compiler.slots import slot
from .._rule import elementwise
from ._moments import mean, unbiased


@elementwise(
    state={"mu": slot("initial_accumulator_value"), "nu": slot("initial_accumulator_value", square=True)},
    ranges={
        "b1": "[0, 1)",
        "b2": "[0, 1)",
        "eps": "[0, inf)",
        "eps_root": "[0, inf)",
        "initial_accumulator_value": "[0, inf)",
    },
)
def scale_by_yogi(
    u: Leaf,
    mu: Leaf,
    nu: Leaf,
    *,
    step: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-3,
    eps_root: Scalar = 0.0,
    initial_accumulator_value: float = 1e-6,
) -> tuple[Leaf, Leaf, Leaf]:
    r"""Yogi: Adam whose second moment moves towards the squared update at a speed that does not depend on the distance.

    $$m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
      v_t = v_{t-1} - (1 - \beta_2) \operatorname{sign}(v_{t-1} - g_t^2)\, g_t^2$$
    $$u_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t) + \bar\epsilon} + \epsilon}$$

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: term outside the root.
      eps_root: term inside the root.
      initial_accumulator_value: first value of both moments, a number.

    Returns:
      The transformation. Its state is `(count, mu, nu)`.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> tx = scale_by_yogi()
      >>> tx.update(torch.tensor([1.0, -3.0]), tx.init(torch.zeros(2)))[0]
      tensor([ 0.9985, -0.9996])

    Source: Zaheer et al. 2018, "Adaptive Methods for Nonconvex Optimization", algorithm 2.
    """
    mu, square = mean(mu, u, b1), u * u
    nu = nu - (1 - b2) * torch.sign(nu - square) * square
    return unbiased(mu, b1, step) / (torch.sqrt(unbiased(nu, b2, step) + eps_root) + eps), mu, nu
