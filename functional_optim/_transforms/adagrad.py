"""Adagrad: updates divided by the root of the sum of all squares so far."""

import torch

from .._compiler.rule import Leaf, Scalar
from .._compiler.slots import slot
from .._rule import elementwise
from ._moments import over_root


@elementwise(
    state={"sum_of_squares": slot("initial_accumulator_value", square=True)},
    static=("eps_in_sqrt",),
    ranges={"initial_accumulator_value": "[0, inf)", "eps": "[0, inf)"},
)
def scale_by_rss(
    u: Leaf,
    sum_of_squares: Leaf,
    *,
    initial_accumulator_value: float = 0.1,
    eps: Scalar = 1e-7,
    eps_in_sqrt: bool = True,
) -> tuple[Leaf, Leaf]:
    r"""Adagrad: divides by the root of the sum of all squares so far.

    $$s_t = s_{t-1} + g_t^2, \quad u_t = g_t / \sqrt{s_t + \epsilon}$$

    Args:
      initial_accumulator_value: $s_0$. The default is optax's; torch.optim.Adagrad has 0.
      eps: $\epsilon$. The default is optax's; torch.optim.Adagrad has 1e-10.
      eps_in_sqrt: whether `eps` stands inside the root, as here, or outside, as in torch.

    Returns:
      The transformation. Its state is `(sum_of_squares,)`. Where the sum and `eps` are 0 the update is 0.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> tx = scale_by_rss(initial_accumulator_value=3.0)
      >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)))[0]
      tensor([0.5000])

    Source: Duchi et al. 2011, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization".
    """
    sum_of_squares = u * u + sum_of_squares
    divisor = torch.where(sum_of_squares + eps == 0, 1.0, sum_of_squares)
    return over_root(u, divisor, eps, eps_in_sqrt), sum_of_squares


def _decayed(learning_rate: Scalar, lr_decay: Scalar, step: Scalar) -> Leaf:
    r"""torch's decay of the learning rate, $\eta / (1 + (t - 1)\, \eta_d)$."""
    return learning_rate / (1 + (step - 1) * lr_decay)


@elementwise(state={"sum": slot("initial_accumulator_value")})
def adagrad_step(
    u: Leaf,
    sum: Leaf,
    *,
    step: Scalar,
    learning_rate: Scalar,
    lr_decay: Scalar = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: Scalar = 1e-10,
) -> tuple[Leaf, Leaf]:
    r"""A step of Adagrad, rounded as in torch, with its decay of the learning rate.

    $$u_t = -\frac{\eta}{1 + (t - 1)\, \eta_d}\, g_t / (\sqrt{s_t} + \epsilon)$$

    Args:
      learning_rate: $\eta$.
      lr_decay: $\eta_d$.
      initial_accumulator_value: $s_0$.
      eps: $\epsilon$.

    Returns:
      The transformation.

    Example:
      >>> tx = adagrad_step(0.1)
      >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)))[0]
      tensor([-0.1000])

    Source: Duchi et al. 2011, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization".
    """
    sum = torch.addcmul(sum, u, u)
    return over_root(-_decayed(learning_rate, lr_decay, step) * u, sum, eps, eps_in_sqrt=False), sum


@elementwise(state={"sum": slot("initial_accumulator_value")})
def sparse_adagrad_step(
    u: Leaf,
    p: Leaf,
    sum: Leaf,
    *,
    step: Scalar,
    learning_rate: Scalar,
    lr_decay: Scalar = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: Scalar = 1e-10,
) -> tuple[Leaf, Leaf]:
    r"""The same step of Adagrad, rounded as torch rounds it for sparse gradients: quotients first, then the rate.

    Args:
      learning_rate: $\eta$.
      lr_decay: $\eta_d$.
      initial_accumulator_value: $s_0$.
      eps: $\epsilon$.

    Returns:
      The transformation; its update is the difference of the parameters.

    Example:
      >>> tx = sparse_adagrad_step(0.1)
      >>> params = torch.zeros(1)
      >>> tx.update(torch.ones(1), tx.init(params), params)[0]
      tensor([-0.1000])

    Source: Duchi et al. 2011, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization".
    """
    sum = sum + u * u
    quotient = over_root(u, sum, eps, eps_in_sqrt=False)
    return torch.addcmul(p, quotient, -_decayed(learning_rate, lr_decay, step)) - p, sum
