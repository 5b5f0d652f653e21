"""RMSProp: updates divided by a root mean square, about 0 or about their mean."""

from .._compiler.rule import Leaf, Scalar
from .._compiler.slots import slot
from .._rule import elementwise
from ._moments import mean, mean_square, over_root, torch_mean, torch_mean_square, torch_variance, unbiased, variance


RANGES = {
    "decay": "[0, 1]",
    "decay if bias_correction": "[0, 1)",  # with 1, the correction would be 0 / 0
    "eps": "[0, inf)",
    "initial_scale": "[0, inf)",
}
STATIC = ("eps_in_sqrt", "bias_correction")


@elementwise(state={"nu": slot("initial_scale", square=True)}, static=STATIC, ranges=RANGES)
def scale_by_rms(
    u: Leaf,
    nu: Leaf,
    *,
    step: Scalar,
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: float = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
) -> tuple[Leaf, Leaf]:
    r"""RMSProp: divides by the root of a mean of past squares.

    $$v_t = \beta v_{t-1} + (1 - \beta) g_t^2, \quad u_t = g_t / \sqrt{v_t + \epsilon}$$

    Args:
      decay: decay of the mean of squares.
      eps: term in the denominator.
      initial_scale: the first value of the mean of squares.
      eps_in_sqrt: whether `eps` stands inside the root, as here, or outside.
      bias_correction: whether the mean is divided by $1 - \beta^t$; `decay` is then less than 1.

    Returns:
      The transformation. Its state is `(count, nu)`.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> import torch
      >>> tx = scale_by_rms(decay=0.75)
      >>> updates, state = tx.update(torch.tensor([1.0, -3.0]), tx.init(torch.zeros(2)))
      >>> updates
      tensor([ 2., -2.])

    Source: Tieleman & Hinton 2012, lecture 6.5 of "Neural Networks for Machine Learning".
    """
    nu = mean_square(nu, u, decay)
    nu_hat = unbiased(nu, decay, step) if bias_correction else nu
    return over_root(u, nu_hat, eps, eps_in_sqrt), nu


@elementwise(state={"mu": slot(0.0), "nu": slot("initial_scale", square=True)}, static=STATIC, ranges=RANGES)
def scale_by_stddev(
    u: Leaf,
    mu: Leaf,
    nu: Leaf,
    *,
    step: Scalar,
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: float = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
) -> tuple[Leaf, Leaf, Leaf]:
    r"""Centred RMSProp: divides by the root of a variance.

    $$u_t = g_t / \sqrt{\max(v_t - m_t^2, 0) + \epsilon}$$

    The variance is a difference, of which rounding leaves little where updates hardly vary; less than 0 counts as 0.

    Args:
      decay: decay of the means of updates and of their squares.
      eps: term in the denominator.
      initial_scale: the first value of the mean of squares.
      eps_in_sqrt: whether `eps` stands inside the root, as here, or outside.
      bias_correction: whether both means are divided by $1 - \beta^t$; `decay` is then less than 1.

    Returns:
      The transformation. Its state is `(count, mu, nu)`.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> import torch
      >>> tx = scale_by_stddev(decay=0.5)
      >>> updates, state = tx.update(torch.tensor([1.0, -3.0]), tx.init(torch.zeros(2)))
      >>> updates
      tensor([ 2., -2.])

    Source: Graves 2013, arXiv:1308.0850, equations 38 to 45.
    """
    mu, nu = mean(mu, u, decay), mean_square(nu, u, decay)
    mu_hat = unbiased(mu, decay, step) if bias_correction else mu
    nu_hat = unbiased(nu, decay, step) if bias_correction else nu
    return over_root(u, variance(nu_hat, mu_hat), eps, eps_in_sqrt), mu, nu


@elementwise(state={"square_avg": slot(0.0)})
def rmsprop_ratio(u: Leaf, square_avg: Leaf, *, step: Scalar, alpha: Scalar, eps: Scalar) -> tuple[Leaf, Leaf]:
    r"""torch's RMSprop before its learning rate, $u_t = g_t / (\sqrt{v_t} + \epsilon)$.

    Args:
      alpha: decay of the mean of squares.
      eps: $\epsilon$.

    Returns:
      The transformation. It counts steps, as torch does, though nothing depends on them.

    Example:
      >>> import torch
      >>> tx = rmsprop_ratio(0.75, 0.0)
      >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)))[0]
      tensor([2.])

    Source: Tieleman & Hinton 2012, lecture 6.5 of "Neural Networks for Machine Learning".
    """
    square_avg = torch_mean_square(square_avg, u, alpha)
    return over_root(u, square_avg, eps, eps_in_sqrt=False), square_avg


@elementwise(state={"square_avg": slot(0.0), "grad_avg": slot(0.0)})
def centered_rmsprop_ratio(
    u: Leaf, square_avg: Leaf, grad_avg: Leaf, *, step: Scalar, alpha: Scalar, eps: Scalar
) -> tuple[Leaf, Leaf, Leaf]:
    r"""torch's centred RMSprop before its learning rate, $u_t = g_t / (\sqrt{v_t - \bar g_t^2} + \epsilon)$.

    Args:
      alpha: decay of both means.
      eps: $\epsilon$.

    Returns:
      The transformation.

    Example:
      >>> import torch
      >>> tx = centered_rmsprop_ratio(0.5, 0.0)
      >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)))[0]
      tensor([2.])

    Source: Graves 2013, arXiv:1308.0850, equations 38 to 45.
    """
    square_avg, grad_avg = torch_mean_square(square_avg, u, alpha), torch_mean(grad_avg, u, alpha)
    centered = torch_variance(square_avg, grad_avg)
    return over_root(u, centered, eps, eps_in_sqrt=False), square_avg, grad_avg
