"""Kin of Adam whose second moments are other means: AdaBelief, Yogi, Adan, NovoGrad."""

from typing import Any

from .._chain import chain
from .._compiler.rule import Scalar
from .._transform import GradientTransformation
from .._transforms.adan import scale_by_adan
from .._transforms.belief import scale_by_belief
from .._transforms.decay import add_decayed_weights
from .._transforms.novograd import scale_by_novograd
from .._transforms.scaling import scale_by_learning_rate
from .._transforms.yogi import scale_by_yogi
from ._arguments import named_arguments


@named_arguments
def adabelief(
    learning_rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-16,
    eps_root: Scalar = 1e-16,
    *,
    nesterov: bool = False,
) -> GradientTransformation:
    """AdaBelief: Adam that divides by how far updates are from their mean; see `scale_by_belief`.

    Args:
      learning_rate: the learning rate.
      b1, b2, eps, eps_root, nesterov: see `scale_by_belief`.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> adabelief(1e-3)
      chain(scale_by_belief(), scale_by_learning_rate(learning_rate=0.001))

    Source: Zhuang et al. 2020, arXiv:2010.07468, algorithm 2.
    """
    return chain(scale_by_belief(b1, b2, eps, eps_root, nesterov), scale_by_learning_rate(learning_rate))


@named_arguments
def yogi(learning_rate: Scalar, b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-3) -> GradientTransformation:
    """Yogi: Adam whose second moment moves at a speed of its own; see `scale_by_yogi`.

    Args:
      learning_rate: the learning rate.
      b1, b2, eps: see `scale_by_yogi`.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> yogi(1e-2)
      chain(scale_by_yogi(), scale_by_learning_rate(learning_rate=0.01))

    Source: Zaheer et al. 2018, "Adaptive Methods for Nonconvex Optimization", algorithm 2.
    """
    return chain(scale_by_yogi(b1, b2, eps), scale_by_learning_rate(learning_rate))


@named_arguments
def adan(
    learning_rate: Scalar,
    b1: Scalar = 0.98,
    b2: Scalar = 0.92,
    b3: Scalar = 0.99,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    mask: Any = None,
) -> GradientTransformation:
    """Adan: momentum that looks ahead by differences of updates, with decoupled decay; see `scale_by_adan`.

    Args:
      learning_rate: the learning rate; it multiplies the decay too.
      b1, b2, b3, eps, eps_root: see `scale_by_adan`.
      weight_decay: factor of the decay.
      mask: which leaves decay; see `masked`. By default all.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> adan(1e-3)  # doctest: +NORMALIZE_WHITESPACE
      chain(scale_by_adan(eps_root=1e-08), add_decayed_weights(),
            scale_by_learning_rate(learning_rate=0.001))

    Source: Xie et al. 2022, arXiv:2208.06677, algorithm 1, with the decay of AdamW.
    """
    return chain(
        scale_by_adan(b1, b2, b3, eps, eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


@named_arguments
def novograd(
    learning_rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.25,
    eps: Scalar = 1e-6,
    eps_root: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
) -> GradientTransformation:
    """NovoGrad: momentum of updates over a norm per leaf; see `scale_by_novograd`.

    Args:
      learning_rate: the learning rate; it multiplies the decay too.
      b1, b2, eps, eps_root, weight_decay: see `scale_by_novograd`.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> novograd(1e-2)
      chain(scale_by_novograd(eps=1e-06), scale_by_learning_rate(learning_rate=0.01))

    Source: Ginsburg et al. 2019, arXiv:1905.11286, algorithm 1.
    """
    return chain(scale_by_novograd(b1, b2, eps, eps_root, weight_decay), scale_by_learning_rate(learning_rate))
