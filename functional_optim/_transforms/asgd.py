"""ASGD: gradient descent with a learning rate that decays, whose parameters are averaged."""

import torch

from .._compiler.rule import NUMBER, Leaf, OptionalDtype, Scalar
from .._compiler.slots import slot
from .._rule import elementwise
from ._moments import stored


def _rate(step: Scalar, learning_rate: Scalar, lambd: Scalar, alpha: Scalar) -> Leaf:
    """The learning rate after some steps."""
    return learning_rate / (1 + lambd * learning_rate * step) ** alpha


@elementwise(ranges={"learning_rate": NUMBER, "lambd": "[0, inf)", "alpha": NUMBER})
def scale_by_asgd(
    u: Leaf, p: Leaf, *, step: Scalar, learning_rate: Scalar, lambd: Scalar = 1e-4, alpha: Scalar = 0.75
) -> Leaf:
    r"""A step of gradient descent on a loss with an L2 penalty, with the learning rate that suits an average.

    $$u_t = -\eta_t (g_t + \lambda \theta_{t-1}), \quad \eta_t = \eta / (1 + \lambda \eta (t - 1))^\alpha$$

    Args:
      learning_rate: $\eta$.
      lambd: $\lambda$.
      alpha: $\alpha$.

    Returns:
      The transformation. Its state is `(count,)`. It needs the parameters. Its updates are steps down, to be added
      to the parameters as they are.

    Raises:
      ValueError: `lambd` is negative.

    Example:
      >>> tx = scale_by_asgd(0.5, lambd=0.0)
      >>> params = torch.ones(1)
      >>> tx.update(torch.ones(1), tx.init(params), params)[0]
      tensor([-0.5000])

    Source: Bottou 2012, "Stochastic Gradient Descent Tricks"; Polyak & Juditsky 1992.
    """
    return -_rate(step - 1, learning_rate, lambd, alpha) * (u + lambd * p)


@elementwise(
    state={
        "eta": slot("learning_rate", dtype="number_dtype", per="leaf"),
        "mu": slot(1.0, dtype="number_dtype", per="leaf"),
        "ax": slot("param", evaluate=True),  # in torch 0, until the first step, which puts the parameter there
    },
    final=True,
)
def asgd_step(
    u: Leaf,
    p: Leaf,
    eta: Leaf,
    mu: Leaf,
    ax: Leaf,
    *,
    step: Scalar,
    first: Scalar,
    learning_rate: Scalar,
    lambd: Scalar = 1e-4,
    alpha: Scalar = 0.75,
    t0: Scalar = 1e6,
    number_dtype: OptionalDtype = None,
) -> tuple[Leaf, Leaf, Leaf, Leaf]:
    r"""A step of ASGD, rounded as in torch, which keeps the numbers of the next step.

    $$\theta_t = (1 - \lambda \eta_t)\, \theta_{t-1} - \eta_t g_t, \quad
      \bar\theta_t = \bar\theta_{t-1} + \mu_t (\theta_t - \bar\theta_{t-1})$$
    $$\eta_{t+1} = \eta / (1 + \lambda \eta t)^\alpha, \quad \mu_{t+1} = 1 / \max(1, t - t_0)$$

    Args:
      learning_rate: $\eta$.
      lambd: $\lambda$.
      alpha: $\alpha$.
      t0: the step at which the average begins.
      number_dtype: how $\eta$ and $\mu$ are stored; what is stored is what is computed with, as in torch.

    Returns:
      The transformation; its update is the difference of the parameters.

    Example:
      >>> tx = asgd_step(0.5, lambd=0.0)
      >>> params = torch.ones(1)
      >>> tx.update(torch.ones(1), tx.init(params), params)[0]
      tensor([-0.5000])

    Source: Polyak & Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging".
    """
    eta = torch.where(first, stored(learning_rate, number_dtype), eta)
    new = torch.addcmul(p * (1 - lambd * eta), u, -eta)
    ax = torch.where(mu == 1, new, ax + (new - ax) * mu)
    return new - p, _rate(step, learning_rate, lambd, alpha), 1 / torch.clamp(step - t0, min=1), ax
