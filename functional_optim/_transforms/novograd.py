"""NovoGrad: momentum of updates that are divided by a norm per leaf."""

import torch

from .._compiler.functions import leaf_sum
from .._compiler.rule import NUMBER, Leaf, OptionalDtype, Scalar
from .._compiler.slots import slot
from .._rule import elementwise
from ._moments import mean


@elementwise(
    # a number per leaf takes no room, and a sum of squares leaves the range of float32
    state={"mu": slot(0.0, dtype="mu_dtype"), "nu": slot(0.0, dtype=torch.float64, per="leaf")},
    ranges={
        "b1": "[0, 1)",
        "b2": "[0, 1)",
        "eps": "[0, inf)",
        "eps_root": "[0, inf)",
        "weight_decay": NUMBER,
    },
)
def scale_by_novograd(
    u: Leaf,
    p: Leaf,
    mu: Leaf,
    nu: Leaf,
    *,
    step: Scalar,
    first: Leaf,
    b1: Scalar = 0.9,
    b2: Scalar = 0.25,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    mu_dtype: OptionalDtype = None,
) -> tuple[Leaf, Leaf, Leaf]:
    r"""NovoGrad: momentum of updates over the root of a mean of their squared norms, and of decay.

    $$v_t = \beta_2 v_{t-1} + (1 - \beta_2) \lVert g_t \rVert^2, \quad v_1 = \lVert g_1 \rVert^2$$
    $$u_t = m_t = \beta_1 m_{t-1} + \frac{g_t}{\sqrt{v_t + \bar\epsilon} + \epsilon} + \lambda \theta$$

    Args:
      b1: decay of the momentum.
      b2: decay of the mean of squared norms.
      eps: term outside the root.
      eps_root: term inside the root.
      weight_decay: $\lambda$.
      mu_dtype: how the momentum is stored; by default as the parameter.

    Returns:
      The transformation. It needs the parameters. Its state is `(count, mu, nu)`; `nu` is one number per leaf,
      in float64.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> tx = scale_by_novograd()
      >>> params = torch.zeros(2)
      >>> tx.update(torch.tensor([3.0, -4.0]), tx.init(params), params)[0]
      tensor([ 0.6000, -0.8000])

    Source: Ginsburg et al. 2019, arXiv:1905.11286, algorithm 1.
    """
    square = leaf_sum(u * u)
    nu = torch.where(first, square, mean(nu, square, b2))
    mu = b1 * mu + u / (torch.sqrt(nu + eps_root) + eps) + weight_decay * p
    return mu, mu, nu
