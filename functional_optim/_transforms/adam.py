"""Adam: updates divided by the root of their second moment."""

import torch

from .._compiler.functions import fused_mean, fused_mean_square, fused_number, fused_weight
from .._compiler.rule import Leaf, OptionalDtype, Scalar
from .._compiler.slots import slot
from .._rule import elementwise
from ._moments import (
    looking_ahead,
    mean,
    mean_square,
    unbiased,
    weight,
)


RANGES = {"b1": "[0, 1)", "b2": "[0, 1)", "eps": "[0, inf)", "eps_root": "[0, inf)"}


@elementwise(
    state={"mu": slot(0.0, dtype="mu_dtype"), "nu": slot(0.0, dtype="nu_dtype", square=True)},
    static=("nesterov",),
    ranges=RANGES,
)
def scale_by_adam(
    u: Leaf,
    mu: Leaf,
    nu: Leaf,
    *,
    step: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: OptionalDtype = None,
    nesterov: bool = False,
    nu_dtype: OptionalDtype = None,
) -> tuple[Leaf, Leaf, Leaf]:
    r"""Adam: a mean of past updates over the root of a mean of their squares.

    $$m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2$$
    $$u_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t) + \bar\epsilon} + \epsilon}$$

    With `nesterov`, the numerator is $\beta_1 m_t / (1 - \beta_1^{t+1}) + (1 - \beta_1) g_t / (1 - \beta_1^t)$.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: term outside the root.
      eps_root: term inside the root, for gradients through the update at 0.
      mu_dtype: how the first moment is stored; by default as the parameter.
      nesterov: whether the numerator looks one step ahead, as in NAdam.
      nu_dtype: how the second moment is stored; by default as the parameter, or as float32 for one in float16.

    Returns:
      The transformation. Its state is `(count, mu, nu)`.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> tx = scale_by_adam()
      >>> params = torch.zeros(2)
      >>> updates, state = tx.update(torch.tensor([1.0, -3.0]), tx.init(params))
      >>> updates
      tensor([ 1., -1.])

    Source: Kingma & Ba 2015, arXiv:1412.6980, algorithm 1; Dozat 2016 for `nesterov`.
    """
    mu, nu = mean(mu, u, b1), mean_square(nu, u, b2)
    mu_hat = looking_ahead(mu, u, b1, step) if nesterov else unbiased(mu, b1, step)
    nu_hat = unbiased(nu, b2, step)
    return mu_hat / (torch.sqrt(nu_hat + eps_root) + eps), mu, nu


@elementwise(
    state={"mu": slot(0.0, dtype="mu_dtype"), "nu": slot(0.0, square=True), "nu_max": slot(0.0, square=True)},
    static=("bias_correction_mu", "bias_correction_nu"),
    ranges=RANGES,
)
def scale_by_amsgrad(
    u: Leaf,
    mu: Leaf,
    nu: Leaf,
    nu_max: Leaf,
    *,
    step: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: OptionalDtype = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
) -> tuple[Leaf, Leaf, Leaf, Leaf]:
    r"""AMSGrad: Adam whose second moment never shrinks.

    $$\hat v_t = \max(\hat v_{t-1}, v_t / (1 - \beta_2^t)), \quad
      u_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{\hat v_t + \bar\epsilon} + \epsilon}$$

    As in optax, the maximum is of the corrected moment.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: term outside the root.
      eps_root: term inside the root.
      mu_dtype: how the first moment is stored; by default as the parameter.
      bias_correction_mu: whether the first moment is corrected for its start at 0.
      bias_correction_nu: whether the second moment is.

    Returns:
      The transformation. Its state is `(count, mu, nu, nu_max)`.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> tx = scale_by_amsgrad()
      >>> updates, state = tx.update(torch.tensor([1.0, -3.0]), tx.init(torch.zeros(2)))
      >>> updates
      tensor([ 1., -1.])

    Source: Reddi et al. 2018, arXiv:1904.09237, algorithm 2.
    """
    mu, nu = mean(mu, u, b1), mean_square(nu, u, b2)
    mu_hat = unbiased(mu, b1, step) if bias_correction_mu else mu
    nu_hat = unbiased(nu, b2, step) if bias_correction_nu else nu
    nu_max = torch.maximum(nu_max, nu_hat)
    return mu_hat / (torch.sqrt(nu_max + eps_root) + eps), mu, nu, nu_max


def _moments(exp_avg: Leaf, exp_avg_sq: Leaf, u: Leaf, b1: Scalar, b2: Scalar) -> tuple[Leaf, Leaf]:
    return fused_mean(exp_avg, u, b1, 1 - b1), fused_mean_square(exp_avg_sq, u, b2, 1 - b2)


def _fused_step(mu: Leaf, nu: Leaf, step: Scalar, learning_rate: Scalar, b1: Scalar, b2: Scalar, eps: Scalar) -> Leaf:
    # torch multiplies the learning rate in before it divides, so the step cannot be had by scaling an update afterwards
    rate = fused_number(learning_rate) / fused_weight(b1, step)
    return (-rate * mu) / (torch.sqrt(nu) / torch.sqrt(fused_weight(b2, step)) + eps)


@elementwise(state={"exp_avg": slot(0.0), "exp_avg_sq": slot(0.0)})
def adam_step(
    u: Leaf,
    exp_avg: Leaf,
    exp_avg_sq: Leaf,
    *,
    step: Scalar,
    learning_rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
) -> tuple[Leaf, Leaf, Leaf]:
    r"""A step of Adam, rounded as in torch's fused kernels, of the CPU or of CUDA.

    $$u_t = -\frac{\eta}{1 - \beta_1^t} m_t / (\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon)$$

    Args:
      learning_rate: $\eta$.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: $\epsilon$.

    Returns:
      The transformation.

    Example:
      >>> tx = adam_step(0.1)
      >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)))[0]
      tensor([-0.1000])

    Source: Kingma & Ba 2015, arXiv:1412.6980, algorithm 1.
    """
    exp_avg, exp_avg_sq = _moments(exp_avg, exp_avg_sq, u, b1, b2)
    return _fused_step(exp_avg, exp_avg_sq, step, learning_rate, b1, b2, eps), exp_avg, exp_avg_sq


@elementwise(state={"exp_avg": slot(0.0), "exp_avg_sq": slot(0.0), "max_exp_avg_sq": slot(0.0)})
def amsgrad_step(
    u: Leaf,
    exp_avg: Leaf,
    exp_avg_sq: Leaf,
    max_exp_avg_sq: Leaf,
    *,
    step: Scalar,
    learning_rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
) -> tuple[Leaf, Leaf, Leaf, Leaf]:
    r"""A step of AMSGrad as in torch's fused kernels: Adam with the largest second moment so far, not yet corrected.

    Args:
      learning_rate: $\eta$.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: $\epsilon$.

    Returns:
      The transformation.

    Example:
      >>> tx = amsgrad_step(0.1)
      >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)))[0]
      tensor([-0.1000])

    Source: Reddi et al. 2018, arXiv:1904.09237, algorithm 2.
    """
    exp_avg, exp_avg_sq = _moments(exp_avg, exp_avg_sq, u, b1, b2)
    largest = torch.maximum(max_exp_avg_sq, exp_avg_sq)
    return _fused_step(exp_avg, largest, step, learning_rate, b1, b2, eps), exp_avg, exp_avg_sq, largest


@elementwise(state={"exp_avg": slot(0.0), "exp_avg_sq": slot(0.0)})
def sparse_adam_step(
    u: Leaf,
    exp_avg: Leaf,
    exp_avg_sq: Leaf,
    *,
    step: Scalar,
    learning_rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
) -> tuple[Leaf, Leaf, Leaf]:
    r"""A step of Adam, rounded as in torch's `SparseAdam`, whose $\epsilon$ is not corrected for the start at 0.

    $$u_t = -\frac{\eta \sqrt{1 - \beta_2^t}}{1 - \beta_1^t} m_t / (\sqrt{v_t} + \epsilon)$$

    Args:
      learning_rate: $\eta$.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: $\epsilon$.

    Returns:
      The transformation.

    Example:
      >>> tx = sparse_adam_step(0.1)
      >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)))[0]
      tensor([-0.1000])

    Source: Kingma & Ba 2015, arXiv:1412.6980, section 2, its last paragraph.
    """
    # torch adds differences to the moments: a product and a sum, with a rounding each
    exp_avg = exp_avg + (u - exp_avg) * (1 - b1)
    exp_avg_sq = exp_avg_sq + (u * u - exp_avg_sq) * (1 - b2)
    rate = learning_rate * torch.sqrt(weight(b2, step)) / weight(b1, step)
    return -rate * (exp_avg / (torch.sqrt(exp_avg_sq) + eps)), exp_avg, exp_avg_sq
