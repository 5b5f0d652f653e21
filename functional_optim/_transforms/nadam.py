"""NAdam: Adam whose momentum looks one step ahead, with a schedule of the momentum."""

import torch

from .._compiler.rule import Leaf, OptionalDtype, Scalar
from .._compiler.slots import slot
from .._rule import elementwise
from ._moments import mean, mean_square, stored, torch_mean, torch_mean_square, torch_root, unbiased


def _momentum(step: Scalar, b1: Scalar, momentum_decay: Scalar) -> Leaf:
    return b1 * (1 - 0.5 * 0.96 ** (step * momentum_decay))


@elementwise(
    state={
        "mu_product": slot(1.0, per="leaf"),
        "mu": slot(0.0, dtype="mu_dtype"),
        "nu": slot(0.0, dtype="nu_dtype", square=True),
    },
    ranges={
        "b1": "[0, 1)",
        "b2": "[0, 1)",
        "eps": "[0, inf)",
        "eps_root": "[0, inf)",
        "momentum_decay": "[0, inf)",
    },
)
def scale_by_nadam(
    u: Leaf,
    mu_product: Leaf,
    mu: Leaf,
    nu: Leaf,
    *,
    step: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    momentum_decay: Scalar = 4e-3,
    mu_dtype: OptionalDtype = None,
    nu_dtype: OptionalDtype = None,
) -> tuple[Leaf, Leaf, Leaf, Leaf]:
    r"""NAdam with a schedule of the momentum, as in torch; `scale_by_adam(nesterov=True)` has a constant one.

    $$\mu_t = \beta_1 (1 - \tfrac12\, 0.96^{t \psi}), \quad P_t = \textstyle\prod_{i \le t} \mu_i, \quad
      m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2$$
    $$u_t = \left( \frac{\mu_{t+1}}{1 - P_{t+1}} m_t + \frac{1 - \mu_t}{1 - P_t} g_t \right) /
      (\sqrt{v_t / (1 - \beta_2^t) + \bar\epsilon} + \epsilon)$$

    Args:
      b1: decay of the first moment, and the limit of the momentum.
      b2: decay of the second moment.
      eps: term outside the root.
      eps_root: term inside the root, for gradients through the update at 0.
      momentum_decay: $\psi$; the momentum grows from $\beta_1 / 2$ to $\beta_1$, the faster the larger it is.
      mu_dtype: how the first moment is stored; by default as the parameter.
      nu_dtype: how the second moment is stored; by default as the parameter, or as float32 for one in float16.

    Returns:
      The transformation. Its state is `(count, mu_product, mu, nu)`; `mu_product`, $P_t$, is one number per leaf.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> tx = scale_by_nadam(momentum_decay=0.0)
      >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)))[0]
      tensor([1.0564])

    Source: Dozat 2016, "Incorporating Nesterov Momentum into Adam", algorithm 2.
    """
    momentum, following = _momentum(step, b1, momentum_decay), _momentum(step + 1, b1, momentum_decay)
    mu_product = mu_product * momentum
    mu, nu = mean(mu, u, b1), mean_square(nu, u, b2)
    ahead = following / (1 - mu_product * following) * mu + (1 - momentum) / (1 - mu_product) * u
    return ahead / (torch.sqrt(unbiased(nu, b2, step) + eps_root) + eps), mu_product, mu, nu


@elementwise(
    state={
        "mu_product": slot(1.0, dtype="product_dtype", per="leaf"),
        "exp_avg": slot(0.0),
        "exp_avg_sq": slot(0.0),
    }
)
def nadam_step(
    u: Leaf,
    mu_product: Leaf,
    exp_avg: Leaf,
    exp_avg_sq: Leaf,
    *,
    step: Scalar,
    learning_rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    momentum_decay: Scalar = 4e-3,
    product_dtype: OptionalDtype = None,
) -> tuple[Leaf, Leaf, Leaf, Leaf]:
    r"""A step of NAdam as torch has it.

    torch divides both terms of the numerator, one after another; here their sum is divided, once.

    Args:
      learning_rate: $\eta$.
      b1: decay of the first moment, and the limit of the momentum.
      b2: decay of the second moment.
      eps: term outside the root.
      momentum_decay: $\psi$.
      product_dtype: how the product of all momenta is stored; what is stored is what is computed with, as in torch.

    Returns:
      The transformation.

    Example:
      >>> tx = nadam_step(0.1, momentum_decay=0.0)
      >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)))[0]
      tensor([-0.1056])

    Source: Dozat 2016, "Incorporating Nesterov Momentum into Adam", algorithm 2.
    """
    momentum, following = _momentum(step, b1, momentum_decay), _momentum(step + 1, b1, momentum_decay)
    mu_product = stored(mu_product * stored(momentum, product_dtype), product_dtype)
    exp_avg, exp_avg_sq = torch_mean(exp_avg, u, b1), torch_mean_square(exp_avg_sq, u, b2)
    of_update = (-learning_rate * (1 - momentum)) / (1 - mu_product)
    of_moment = (-learning_rate * following) / (1 - mu_product * following)
    ahead = torch.addcmul(of_update * u, exp_avg, of_moment)
    return ahead / torch_root(exp_avg_sq, b2, step, eps), mu_product, exp_avg, exp_avg_sq
