"""Updates as long as the parameters of their layer: LARS, LAMB, Fromage."""

from typing import Any

import torch

from .._chain import chain
from .._compiler.rule import NUMBER, Leaf, Scalar
from .._masking import masked
from .._rule import elementwise
from .._transform import GradientTransformation
from .._transforms.adam import scale_by_adam
from .._transforms.decay import add_decayed_weights
from .._transforms.momentum import trace
from .._transforms.scaling import scale_by_learning_rate, scale_by_trust_ratio
from ._arguments import named_arguments, renaming


@named_arguments
@renaming({"decay of trace": "momentum"})
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
    ratio = scale_by_trust_ratio(trust_coefficient=trust_coefficient, eps=eps)
    return chain(
        renaming({"mask of masked": "weight_decay_mask"}, "lars")(add_decayed_weights)(weight_decay, weight_decay_mask),
        renaming({"mask of masked": "trust_ratio_mask"}, "lars")(masked)(ratio, trust_ratio_mask),
        scale_by_learning_rate(learning_rate),
        trace(momentum, nesterov),
    )


@named_arguments
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


@elementwise(ranges={"learning_rate": NUMBER, "min_norm": "[0, inf)"})
def fromage(u: Leaf, p: Leaf, *, learning_rate: Scalar, min_norm: Scalar = 1e-6) -> Leaf:
    r"""Fromage: updates as long as their parameters, and parameters that do not grow.

    $$\theta_t = \frac{1}{\sqrt{1 + \eta^2}} \left( \theta_{t-1}
      - \eta \frac{\lVert \theta_{t-1} \rVert}{\lVert g_t \rVert} g_t \right), \quad
      \lVert \cdot \rVert \text{ of each leaf}$$

    Args:
      learning_rate: $\eta$.
      min_norm: the least that a norm counts as; see `scale_by_trust_ratio`.

    Returns:
      The optimizer. It needs the parameters.

    Raises:
      ValueError: `min_norm` is negative.

    Example:
      >>> tx, params = fromage(0.75), torch.tensor([3.0, 4.0])
      >>> tx.update(torch.tensor([0.0, 1.0]), tx.init(params), params)[0]
      tensor([-0.6000, -3.8000])

    Source: Bernstein et al. 2020, arXiv:2002.03432, algorithm 1.
    """
    shrinking = 1 / torch.sqrt(1 + learning_rate * learning_rate)
    step: Leaf = learning_rate * scale_by_trust_ratio.formula(u, p, min_norm=min_norm, trust_coefficient=1.0, eps=0.0)
    return (shrinking - 1) * p - shrinking * step
