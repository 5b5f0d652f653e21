"""Updates over roots of sums or means of their squares."""

from typing import Any

from .._chain import chain, identity
from .._compiler.rule import Scalar
from .._transform import GradientTransformation
from .._transforms.adadelta import scale_by_adadelta
from .._transforms.adagrad import scale_by_rss
from .._transforms.decay import add_decayed_weights
from .._transforms.momentum import trace
from .._transforms.rms import scale_by_rms, scale_by_stddev
from .._transforms.scaling import scale_by_learning_rate
from ._arguments import named_arguments, renaming


@named_arguments
def adagrad(
    learning_rate: Scalar, initial_accumulator_value: float = 0.1, eps: Scalar = 1e-7, *, eps_in_sqrt: bool = True
) -> GradientTransformation:
    r"""Adagrad, $\theta_t = \theta_{t-1} - \eta\, g_t / \sqrt{s_t + \epsilon}$; see `scale_by_rss`.

    Args:
      learning_rate: $\eta$.
      initial_accumulator_value: the first value of the sum of squares.
      eps: term in the denominator.
      eps_in_sqrt: whether `eps` stands inside the root, as here, or outside, as in torch.optim.Adagrad.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> adagrad(0.1)
      chain(scale_by_rss(), scale_by_learning_rate(learning_rate=0.1))

    Source: Duchi et al. 2011, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization".
    """
    return chain(scale_by_rss(initial_accumulator_value, eps, eps_in_sqrt), scale_by_learning_rate(learning_rate))


@named_arguments
@renaming({"mask of masked": "weight_decay_mask"})
def adadelta(
    learning_rate: Scalar = None,
    rho: Scalar = 0.9,
    eps: Scalar = 1e-6,
    weight_decay: Scalar = 0.0,
    weight_decay_mask: Any = None,
) -> GradientTransformation:
    """Adadelta, whose updates are in the units of the parameters; see `scale_by_adadelta`.

    Args:
      learning_rate: a factor; None counts as 1, and goes down all the same, which optax's default does not.
      rho, eps: see `scale_by_adadelta`.
      weight_decay: factor of an L2 penalty.
      weight_decay_mask: which leaves decay; see `masked`. By default all.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> adadelta(0.5)  # doctest: +NORMALIZE_WHITESPACE
      chain(add_decayed_weights(), scale_by_adadelta(), scale_by_learning_rate(learning_rate=0.5))

    Source: Zeiler 2012, arXiv:1212.5701, algorithm 1.
    """
    return chain(
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_adadelta(rho, eps),
        scale_by_learning_rate(learning_rate),
    )


@named_arguments
@renaming({"decay of trace": "momentum"})
def rmsprop(
    learning_rate: Scalar,
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: float = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: Scalar = None,
    nesterov: bool = False,
    bias_correction: bool = False,
) -> GradientTransformation:
    """RMSProp, with momentum after the learning rate; see `scale_by_rms` and `scale_by_stddev`.

    Args:
      learning_rate: the learning rate.
      decay, eps, initial_scale, eps_in_sqrt, bias_correction: see `scale_by_rms`. torch.optim.RMSprop has `eps`
        outside the root.
      centered: whether the mean is taken out of the second moment.
      momentum: decay of the momentum; None for none.
      nesterov: whether the momentum looks one update ahead.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> rmsprop(1e-3, momentum=0.9)  # doctest: +NORMALIZE_WHITESPACE
      chain(scale_by_rms(), scale_by_learning_rate(learning_rate=0.001), trace(decay=0.9))

    Source: Tieleman & Hinton 2012, lecture 6.5; Graves 2013, arXiv:1308.0850 for `centered`.
    """
    first = scale_by_stddev if centered else scale_by_rms
    return chain(
        first(decay, eps, initial_scale, eps_in_sqrt, bias_correction),
        scale_by_learning_rate(learning_rate),
        identity() if momentum is None else trace(momentum, nesterov),
    )
