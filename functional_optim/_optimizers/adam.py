"""Adam and its kin."""

from typing import Any

from .._chain import chain
from .._compiler.rule import OptionalDtype, Scalar
from .._transform import GradientTransformation
from .._transforms.adam import scale_by_adam, scale_by_amsgrad
from .._transforms.adamax import scale_by_adamax
from .._transforms.decay import add_decayed_weights
from .._transforms.nadam import scale_by_nadam
from .._transforms.radam import scale_by_radam
from .._transforms.scaling import scale_by_learning_rate
from ._arguments import named_arguments


@named_arguments
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


@named_arguments
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


@named_arguments
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


@named_arguments
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


@named_arguments
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


@named_arguments
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


@named_arguments
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


@named_arguments
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
