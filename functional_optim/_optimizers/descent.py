"""Gradient descent, with momentum, signs or averages."""

from typing import Any

import torch

from .._chain import chain, identity
from .._compiler.rule import OptionalDtype, Scalar, plain_number
from .._transform import GradientTransformation
from .._transforms.asgd import scale_by_asgd
from .._transforms.averaging import params_swa
from .._transforms.decay import add_decayed_weights
from .._transforms.momentum import ema, trace
from .._transforms.polyak import scale_by_polyak
from .._transforms.rprop import scale_by_rprop
from .._transforms.scaling import scale, scale_by_learning_rate
from .._transforms.sign import scale_by_lion, scale_by_sign
from ._arguments import named_arguments, renaming


@named_arguments
@renaming({"decay of trace": "momentum"})
def sgd(
    learning_rate: Scalar, momentum: Scalar = None, nesterov: bool = False, accumulator_dtype: OptionalDtype = None
) -> GradientTransformation:
    r"""Stochastic gradient descent, $\theta_t = \theta_{t-1} - \eta\, m_t$, with `trace` for the momentum.

    Args:
      learning_rate: $\eta$.
      momentum: decay of the momentum; None for none.
      nesterov: whether the step looks one update ahead.
      accumulator_dtype: how the momentum is stored; by default as the parameter.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> sgd(0.1, momentum=0.9)
      chain(trace(decay=0.9), scale_by_learning_rate(learning_rate=0.1))

    Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".
    """
    first = identity() if momentum is None else trace(momentum, nesterov, accumulator_dtype)
    return chain(first, scale_by_learning_rate(learning_rate))


@named_arguments
def sign_sgd(learning_rate: Scalar) -> GradientTransformation:
    r"""SignSGD, $\theta_t = \theta_{t-1} - \eta \operatorname{sign} g_t$.

    Args:
      learning_rate: $\eta$.

    Returns:
      The optimizer.

    Example:
      >>> sign_sgd(1e-3)
      chain(scale_by_sign(), scale_by_learning_rate(learning_rate=0.001))

    Source: Bernstein et al. 2018, arXiv:1802.04434, algorithm 1.
    """
    return chain(scale_by_sign(), scale_by_learning_rate(learning_rate))


@named_arguments
@renaming({"decay of ema": "beta"})
def signum(
    learning_rate: Scalar, beta: Scalar = 0.9, accumulator_dtype: OptionalDtype = None
) -> GradientTransformation:
    """Signum: the sign of a mean of past gradients.

    Args:
      learning_rate: the learning rate.
      beta: decay of the mean.
      accumulator_dtype: how the mean is stored; by default as the parameter.

    Returns:
      The optimizer.

    Raises:
      ValueError: `beta` is out of its range.

    Example:
      >>> tx = signum(1e-3)

    Source: Bernstein et al. 2018, arXiv:1802.04434, algorithm 2.
    """
    return chain(ema(beta, False, accumulator_dtype), scale_by_sign(), scale_by_learning_rate(learning_rate))


@named_arguments
def lion(
    learning_rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: OptionalDtype = None,
    weight_decay: Scalar = 1e-3,
    mask: Any = None,
) -> GradientTransformation:
    """Lion: the sign of an interpolated momentum, with decoupled decay; see `scale_by_lion`.

    Args:
      learning_rate: the learning rate, about a tenth of Adam's.
      b1, b2, mu_dtype: see `scale_by_lion`.
      weight_decay: factor of the decay, which the learning rate multiplies too.
      mask: which leaves decay; see `masked`. By default all.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> lion(1e-4)  # doctest: +NORMALIZE_WHITESPACE
      chain(scale_by_lion(), add_decayed_weights(weight_decay=0.001),
            scale_by_learning_rate(learning_rate=0.0001))

    Source: Chen et al. 2023, arXiv:2302.06675, algorithm 2.
    """
    return chain(
        scale_by_lion(b1, b2, mu_dtype), add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate)
    )


@named_arguments
def rprop(
    learning_rate: float,
    eta_minus: Scalar = 0.5,
    eta_plus: Scalar = 1.2,
    min_step_size: Scalar = 1e-6,
    max_step_size: Scalar = 50.0,
) -> GradientTransformation:
    """Rprop: a step size per element, which grows and shrinks with the sign of its gradients; see `scale_by_rprop`.

    Args:
      learning_rate: the first step size.
      eta_minus, eta_plus, min_step_size, max_step_size: see `scale_by_rprop`.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> rprop(1e-2)
      chain(scale_by_rprop(learning_rate=0.01), scale(step_size=-1.0))

    Source: Riedmiller & Braun 1993, "A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP
    Algorithm".
    """
    return chain(
        scale_by_rprop(learning_rate, eta_minus, eta_plus, min_step_size, max_step_size), scale(step_size=-1.0)
    )


@named_arguments
@renaming({"start of params_swa": "t0"})
def asgd(
    learning_rate: Scalar,
    lambd: Scalar = 1e-4,
    alpha: Scalar = 0.75,
    t0: Scalar = 1e6,
    *,
    accumulator_dtype: OptionalDtype = None,
) -> GradientTransformation:
    """ASGD: gradient descent with a decaying learning rate, and an average of the parameters for `eval_params`.

    As in torch.optim.ASGD, the average is that of the parameters after the steps from `t0 + 2` on.

    Args:
      learning_rate, lambd, alpha: see `scale_by_asgd`.
      t0: the step at which the average begins. The default, torch's, is later than most training ends.
      accumulator_dtype: how the average is stored; by default as the parameter.

    Returns:
      The optimizer.

    Raises:
      ValueError: `lambd` is negative.
      TypeError: `t0` is no number.

    Example:
      >>> asgd(0.1, t0=0)
      chain(scale_by_asgd(learning_rate=0.1), params_swa(start=2))

    Source: Polyak & Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging".
    """
    t0 = plain_number(t0)
    truth = isinstance(t0, bool) or (isinstance(t0, torch.Tensor) and t0.dtype is torch.bool)
    if truth or not isinstance(t0, (int, float, torch.Tensor)):
        raise TypeError(f"`t0` of asgd must be a number or a 0-d tensor, got {t0!r:.60}.")
    return chain(scale_by_asgd(learning_rate, lambd, alpha), params_swa(t0 + 2, accumulator_dtype=accumulator_dtype))


@named_arguments
@renaming({"learning_rate of scale_by_learning_rate": "scaling", "learning_rate of sgd": "scaling"})
def polyak_sgd(
    max_learning_rate: Scalar = 1.0,
    scaling: Scalar = 1.0,
    f_min: Scalar = 0.0,
    eps: Scalar = 0.0,
    variant: str = "sps",
) -> GradientTransformation:
    """Gradient descent with the Polyak step size; `update` takes the objective as `value`. See `scale_by_polyak`.

    Args:
      max_learning_rate: the largest step size.
      scaling: a factor of the gradients.
      f_min, eps, variant: see `scale_by_polyak`.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range, or `variant` is unknown.

    Example:
      >>> polyak_sgd(0.1)  # doctest: +NORMALIZE_WHITESPACE
      chain(chain(chain(), scale_by_learning_rate(learning_rate=1.0)),
            scale_by_polyak(max_learning_rate=0.1))

    Source: Loizou et al. 2021, arXiv:2002.10542, equation 2.
    """
    return chain(sgd(scaling), scale_by_polyak(f_min, max_learning_rate, eps, variant))
