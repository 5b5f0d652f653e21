"""The named optimizers. Each is one chain; its formula is in the transformations that it names."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ._chain import chain, identity
from ._compiler.rule import OptionalDtype, Scalar
from ._masking import masked, partition
from ._transform import GradientTransformation
from ._transforms.adadelta import scale_by_adadelta
from ._transforms.adagrad import scale_by_rss
from ._transforms.adam import scale_by_adam, scale_by_amsgrad
from ._transforms.adamax import scale_by_adamax
from ._transforms.asgd import scale_by_asgd
from ._transforms.averaging import params_swa
from ._transforms.clipping import clip_by_block_rms
from ._transforms.decay import add_decayed_weights
from ._transforms.factored import scale_by_factored_rms
from ._transforms.lbfgs import scale_by_lbfgs
from ._transforms.linesearch import scale_by_zoom_linesearch
from ._transforms.momentum import ema, trace
from ._transforms.muon import scale_by_muon, scale_by_shape
from ._transforms.nadam import scale_by_nadam
from ._transforms.radam import scale_by_radam
from ._transforms.rms import scale_by_rms, scale_by_stddev
from ._transforms.rprop import scale_by_rprop
from ._transforms.scaling import scale, scale_by_learning_rate, scale_by_param_block_rms, scale_by_trust_ratio
from ._transforms.sign import scale_by_lion, scale_by_sign
from ._tree import flatten, tree_map


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


def adam(
    learning_rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: OptionalDtype = None,
    *,
    nesterov: bool = False,
    nu_dtype: OptionalDtype = None,
) -> GradientTransformation:
    r"""Adam, $\theta_t = \theta_{t-1} - \eta\, \hat m_t / (\sqrt{\hat v_t} + \epsilon)$; see `scale_by_adam`.

    Args:
      learning_rate: $\eta$.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: term outside the root.
      eps_root: term inside the root.
      mu_dtype: how the first moment is stored; by default as the parameter.
      nesterov: whether the numerator looks one step ahead.
      nu_dtype: how the second moment is stored; by default as the parameter, or as float32 for one in float16.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> adam(1e-3)
      chain(scale_by_adam(), scale_by_learning_rate(learning_rate=0.001))

    Source: Kingma & Ba 2015, arXiv:1412.6980, algorithm 1.
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov, nu_dtype), scale_by_learning_rate(learning_rate)
    )


def nadam(
    learning_rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: OptionalDtype = None,
    *,
    nu_dtype: OptionalDtype = None,
    momentum_decay: Scalar = None,
) -> GradientTransformation:
    """NAdam: Adam whose momentum looks one step ahead.

    Args:
      learning_rate, b1, b2, eps, eps_root, mu_dtype, nu_dtype: see `adam`.
      momentum_decay: None for a momentum of `b1` throughout, `adam(nesterov=True)`, as in optax; a number for the
        schedule of `scale_by_nadam`, as in torch.optim.NAdam, which has 4e-3.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> nadam(1e-3)
      chain(scale_by_adam(nesterov=True), scale_by_learning_rate(learning_rate=0.001))

    Source: Dozat 2016, "Incorporating Nesterov Momentum into Adam".
    """
    if momentum_decay is None:
        return adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=True, nu_dtype=nu_dtype)
    return chain(
        scale_by_nadam(b1, b2, eps, eps_root, momentum_decay, mu_dtype, nu_dtype),
        scale_by_learning_rate(learning_rate),
    )


def adamw(
    learning_rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: OptionalDtype = None,
    weight_decay: Scalar = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = False,
    nu_dtype: OptionalDtype = None,
) -> GradientTransformation:
    r"""AdamW: Adam with decoupled decay, $\theta_t = \theta_{t-1} - \eta\,(\hat m_t / (\sqrt{\hat v_t} + \epsilon) + \lambda \theta_{t-1})$.

    Args:
      learning_rate: $\eta$; it multiplies the decay too.
      b1, b2, eps, eps_root, mu_dtype: see `adam`.
      weight_decay: $\lambda$. The default is optax's; torch.optim.AdamW has 1e-2.
      mask: which leaves decay; see `masked`. By default all.
      nesterov, nu_dtype: see `adam`.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> adamw(1e-3, weight_decay=0.1)  # doctest: +NORMALIZE_WHITESPACE
      chain(scale_by_adam(), add_decayed_weights(weight_decay=0.1),
            scale_by_learning_rate(learning_rate=0.001))

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov, nu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def nadamw(
    learning_rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: OptionalDtype = None,
    weight_decay: Scalar = 1e-4,
    mask: Any = None,
    *,
    nu_dtype: OptionalDtype = None,
    momentum_decay: Scalar = None,
) -> GradientTransformation:
    """NAdamW: NAdam with decoupled decay.

    Args:
      learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nu_dtype: see `adamw`.
      momentum_decay: see `nadam`.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> tx = nadamw(1e-3)

    Source: Dozat 2016, "Incorporating Nesterov Momentum into Adam"; Loshchilov & Hutter 2019, arXiv:1711.05101.
    """
    if momentum_decay is None:
        return adamw(
            learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=True, nu_dtype=nu_dtype
        )
    return chain(
        scale_by_nadam(b1, b2, eps, eps_root, momentum_decay, mu_dtype, nu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def amsgrad(
    learning_rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: OptionalDtype = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
) -> GradientTransformation:
    """AMSGrad: Adam whose second moment never shrinks; see `scale_by_amsgrad`.

    Args:
      learning_rate: the learning rate.
      b1, b2, eps, eps_root, mu_dtype, bias_correction_mu, bias_correction_nu: see `scale_by_amsgrad`.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> amsgrad(1e-3)
      chain(scale_by_amsgrad(), scale_by_learning_rate(learning_rate=0.001))

    Source: Reddi et al. 2018, arXiv:1904.09237, algorithm 2.
    """
    return chain(
        scale_by_amsgrad(b1, b2, eps, eps_root, mu_dtype, bias_correction_mu, bias_correction_nu),
        scale_by_learning_rate(learning_rate),
    )


def radam(
    learning_rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    threshold: Scalar = 5.0,
    *,
    nesterov: bool = False,
) -> GradientTransformation:
    """RAdam: Adam that takes plain momentum for as long as the second moment says too little; see `scale_by_radam`.

    Args:
      learning_rate: the learning rate.
      b1, b2, eps, eps_root, threshold, nesterov: see `scale_by_radam`.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> radam(1e-3)
      chain(scale_by_radam(), scale_by_learning_rate(learning_rate=0.001))

    Source: Liu et al. 2020, arXiv:1908.03265, algorithm 2.
    """
    return chain(scale_by_radam(b1, b2, eps, eps_root, threshold, nesterov), scale_by_learning_rate(learning_rate))


def adamax(learning_rate: Scalar, b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8) -> GradientTransformation:
    """Adamax: Adam with the largest size of past updates for a denominator; see `scale_by_adamax`.

    Args:
      learning_rate: the learning rate.
      b1, b2, eps: see `scale_by_adamax`.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> adamax(1e-3)
      chain(scale_by_adamax(), scale_by_learning_rate(learning_rate=0.001))

    Source: Kingma & Ba 2015, arXiv:1412.6980, algorithm 2.
    """
    return chain(scale_by_adamax(b1, b2, eps), scale_by_learning_rate(learning_rate))


def adamaxw(
    learning_rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 1e-4,
    mask: Any = None,
) -> GradientTransformation:
    """AdamaxW: Adamax with decoupled decay.

    Args:
      learning_rate: the learning rate; it multiplies the decay too.
      b1, b2, eps: see `scale_by_adamax`.
      weight_decay: factor of the decay.
      mask: which leaves decay; see `masked`. By default all.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> tx = adamaxw(1e-3, weight_decay=0.1)

    Source: Kingma & Ba 2015, arXiv:1412.6980, algorithm 2; Loshchilov & Hutter 2019, arXiv:1711.05101.
    """
    return chain(
        scale_by_adamax(b1, b2, eps), add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate)
    )


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

    Example:
      >>> asgd(0.1, t0=0)
      chain(scale_by_asgd(learning_rate=0.1), params_swa(start=2))

    Source: Polyak & Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging".
    """
    return chain(scale_by_asgd(learning_rate, lambd, alpha), params_swa(t0 + 2, accumulator_dtype=accumulator_dtype))


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


def lars(
    learning_rate: Scalar,
    weight_decay: Scalar = 0.0,
    weight_decay_mask: Any = True,
    trust_coefficient: Scalar = 0.001,
    eps: Scalar = 0.0,
    trust_ratio_mask: Any = True,
    momentum: Scalar = 0.9,
    nesterov: bool = False,
) -> GradientTransformation:
    """LARS: momentum whose steps are scaled, leaf by leaf, to the length of the parameter.

    Args:
      learning_rate: the learning rate.
      weight_decay: factor of the decay, added before the ratio is taken.
      weight_decay_mask: which leaves decay; see `masked`.
      trust_coefficient, eps: see `scale_by_trust_ratio`.
      trust_ratio_mask: which leaves are scaled; see `masked`.
      momentum: decay of the momentum.
      nesterov: whether the momentum looks one update ahead.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> tx = lars(0.1)

    Source: You et al. 2017, arXiv:1708.03888, algorithm 1.
    """
    return chain(
        add_decayed_weights(weight_decay, weight_decay_mask),
        masked(scale_by_trust_ratio(trust_coefficient=trust_coefficient, eps=eps), trust_ratio_mask),
        scale_by_learning_rate(learning_rate),
        trace(momentum, nesterov),
    )


def lamb(
    learning_rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    eps_root: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    mask: Any = None,
) -> GradientTransformation:
    """LAMB: AdamW whose steps are scaled, leaf by leaf, to the length of the parameter.

    Args:
      learning_rate: the learning rate.
      b1, b2, eps, eps_root: see `scale_by_adam`.
      weight_decay: factor of the decay.
      mask: which leaves decay; see `masked`. By default all.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> tx = lamb(1e-3, weight_decay=0.01)

    Source: You et al. 2020, arXiv:1904.00962, algorithm 2.
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_trust_ratio(),
        scale_by_learning_rate(learning_rate),
    )


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


def adafactor(
    learning_rate: Scalar = None,
    min_dim_size_to_factor: int = 128,
    decay_rate: Scalar = 0.8,
    decay_offset: Scalar = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: Scalar = 1.0,
    momentum: Scalar = None,
    dtype_momentum: OptionalDtype = None,
    weight_decay_rate: Scalar = None,
    eps: Scalar = 1e-30,
    factored: bool = True,
    weight_decay_mask: Any = None,
) -> GradientTransformation:
    r"""Adafactor, whose second moment of a matrix is a row and a column; see `scale_by_factored_rms`.

    As in optax, decay is not multiplied by the learning rate.

    Args:
      learning_rate: a factor; None for none.
      min_dim_size_to_factor: the least size of the two largest dimensions of a leaf whose moment is factored.
      decay_rate: $c$ in the decay $1 - t^{-c}$ of the second moment.
      decay_offset: the number of steps that the decay is behind.
      multiply_by_parameter_scale: whether updates are multiplied by the root mean square of the parameter.
      clipping_threshold: the largest root mean square of the update of a leaf; None for none.
      momentum: decay of a mean of updates; None for none.
      dtype_momentum: how that mean is stored.
      weight_decay_rate: decay; None for none.
      eps: number that is added to squares.
      factored: whether second moments are factored.
      weight_decay_mask: the leaves that decay; see `masked`.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> tx = adafactor(0.1)
      >>> params = {"w": torch.ones(2)}
      >>> updates, _ = tx.update({"w": torch.ones(2)}, tx.init(params), params)
      >>> updates["w"]
      tensor([-0.1000, -0.1000])

    Source: Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 and 5.
    """
    parts: list[GradientTransformation] = [
        scale_by_factored_rms(factored, decay_rate, decay_offset, min_dim_size_to_factor, eps)
    ]
    if clipping_threshold is not None:
        parts.append(clip_by_block_rms(clipping_threshold))
    if learning_rate is not None:
        parts.append(scale_by_learning_rate(learning_rate, flip_sign=False))
    if multiply_by_parameter_scale:
        parts.append(scale_by_param_block_rms())
    if momentum is not None:
        parts.append(ema(momentum, False, dtype_momentum))
    if weight_decay_rate is not None:
        parts.append(add_decayed_weights(weight_decay_rate, weight_decay_mask))
    return chain(*parts, scale(-1.0))


@dataclass(frozen=True)
class _IsMatrix:
    """The label of a leaf for `muon`: chosen by a predicate, or by its number of dimensions."""

    choose: Callable[[str, torch.Tensor], bool] | None = None

    def __call__(self, path: str, p: torch.Tensor) -> str:
        chosen = p.ndim == 2 if self.choose is None else self.choose(path, p)
        if not isinstance(chosen, bool):
            raise TypeError(f"`matrices` of muon returned {chosen!r:.60} for {path!r}, expected True or False.")
        return "muon" if chosen else "adam"


def muon(
    learning_rate: Scalar,
    ns_coeffs: Any = "standard",
    ns_steps: int = 5,
    beta: Scalar = 0.95,
    eps: float = 1e-8,
    weight_decay: Scalar = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: OptionalDtype = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: str = "frobenius",
    adam_b1: Scalar = 0.9,
    adam_b2: Scalar = 0.999,
    adam_eps_root: Scalar = 0.0,
    adam_weight_decay: Scalar = 0.0,
    adam_learning_rate: Scalar = None,
    matrices: Any = None,
    consistent_rms: float | None = None,
    compute_dtype: OptionalDtype = None,
    by_gram: bool = False,
) -> GradientTransformation:
    r"""Muon for matrices, AdamW for everything else, in one chain.

    $$O_t = \operatorname{NS}(\hat m_t) \approx U V^\top \text{ of } \hat m_t = U \Sigma V^\top, \quad
      \theta_t = \theta_{t-1} - \eta\,(s\, O_t + \lambda\, \theta_{t-1})$$

    `explain` lists the leaves that are made orthogonal. Embeddings and the last layer of a network are matrices, too,
    which Muon's authors leave to AdamW: exclude them with `matrices`.

    Args:
      learning_rate: $\eta$.
      ns_coeffs, ns_steps, eps, adaptive, preconditioning, compute_dtype, by_gram: see `orthogonalize`.
      beta, nesterov, mu_dtype: see `muon_momentum`.
      weight_decay: $\lambda$, for matrices.
      weight_decay_mask: the leaves that decay; see `masked`.
      adam_b1, adam_b2, adam_eps_root, adam_weight_decay: see `adamw`, for all other leaves.
      adam_learning_rate: their learning rate; by default $\eta$.
      matrices: leaves that Muon takes: a function of the path and the parameter, a regular expression that is searched
        for in the path, or a tree of bools. By default those of two dimensions. A tensor of more counts as a matrix
        with one row for each entry of its first dimension.
      consistent_rms: see `scale_by_shape`, which makes $s$.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range, or a leaf that Muon is to take has less than two dimensions.

    Example:
      >>> tx = muon(0.02, matrices=lambda path, p: p.ndim == 2 and "embed" not in path)
      >>> params = {"embed": torch.ones(4, 2), "layer": torch.ones(2, 2), "bias": torch.ones(2)}
      >>> grads = {"embed": torch.ones(4, 2), "layer": torch.eye(2), "bias": torch.ones(2)}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> (updates["layer"] / updates["layer"][0, 0]).round(decimals=3)
      tensor([[1., 0.],
              [0., 1.]])

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Liu et al. 2025,
    arXiv:2502.16982.
    """
    labels: Any = _IsMatrix(matrices) if matrices is None or callable(matrices) else matrices
    if isinstance(labels, (str, re.Pattern)):
        labels = {re.compile(labels): "muon", re.compile(""): "adam"}
    elif not isinstance(labels, _IsMatrix):
        leaves = flatten(labels)[0]
        if not all(isinstance(x, bool) for x in leaves):
            raise TypeError(
                f"`matrices` of muon is {matrices!r:.60}, expected a function of the path and the parameter, a regular "
                f"expression, or a tree of bools."
            )
        labels = tree_map(lambda is_matrix: "muon" if is_matrix else "adam", labels)
    if consistent_rms is not None and not (isinstance(consistent_rms, (int, float)) and consistent_rms >= 0):
        raise ValueError(
            f"`consistent_rms` is {consistent_rms!r:.60}, expected a number that is not negative, or None."
        )
    return partition(
        {
            "muon": chain(
                scale_by_muon(
                    ns_coeffs,
                    ns_steps,
                    beta,
                    eps,
                    mu_dtype,
                    nesterov=nesterov,
                    adaptive=adaptive,
                    preconditioning=preconditioning,
                    compute_dtype=compute_dtype,
                    by_gram=by_gram,
                ),
                scale_by_shape(consistent_rms),
                add_decayed_weights(weight_decay, weight_decay_mask),
                scale_by_learning_rate(learning_rate),
            ),
            "adam": adamw(
                learning_rate if adam_learning_rate is None else adam_learning_rate,
                adam_b1,
                adam_b2,
                eps,
                adam_eps_root,
                mu_dtype,
                adam_weight_decay,
                nesterov=nesterov,
            ),
        },
        labels,
    )


def lbfgs(
    learning_rate: Scalar = None,
    memory_size: int = 10,
    scale_init_precond: bool = True,
    linesearch: GradientTransformation | None = scale_by_zoom_linesearch(20, initial_guess_strategy="one"),  # noqa: B008
) -> GradientTransformation:
    r"""L-BFGS, $\theta_t = \theta_{t-1} - \eta_t H_t g_t$, with a line search for $\eta_t$.

    It is made for objectives that are the same in every step, whole batches. `update` takes the extra arguments `value`,
    `grad` and `value_fn`, for the line search; see `scale_by_zoom_linesearch`. If the objective is no number wherever
    the line search looks, parameters stay at the last point where it was one. `functional_optim.adapters.LBFGS` is
    torch's class.

    Args:
      learning_rate: factor of the direction, before the line search; None for 1.
      memory_size: the number of pairs of differences that the inverse Hessian is made of; see `scale_by_lbfgs`.
      scale_init_precond: whether it begins with a multiple of the identity; see `scale_by_lbfgs`.
      linesearch: a line search, or None for none.

    Returns:
      The optimizer.

    Raises:
      ValueError: `memory_size` is less than 1.

    Example:
      >>> import functional_optim as fo, torch
      >>> f = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
      >>> tx, params = lbfgs(), torch.tensor([-1.2, 1.0], dtype=torch.float64)
      >>> state, value_and_grad = tx.init(params), fo.value_and_grad_from_state(f)
      >>> for _ in range(40):
      ...     value, grad = value_and_grad(params, state=state)
      ...     params, state = fo.apply_gradients(tx, params, grad, state, value=value, grad=grad, value_fn=f)
      >>> params
      tensor([1., 1.], dtype=torch.float64)

    Source: Liu & Nocedal 1989, "On the limited memory BFGS method for large scale optimization".
    """
    return chain(
        scale_by_lbfgs(memory_size, scale_init_precond),
        scale_by_learning_rate(learning_rate),
        identity() if linesearch is None else linesearch,
    )
