"""Weight decay."""

from typing import Any

import torch

from .._compiler.functions import fused_number, fused_shrink
from .._compiler.rule import NUMBER, Leaf, Scalar
from .._masking import masked
from .._rule import elementwise
from .._transform import GradientTransformation


@elementwise(ranges={"weight_decay": NUMBER})
def _add_decayed_weights(u: Leaf, p: Leaf, *, weight_decay: Scalar = 0.0) -> Leaf:
    return u + weight_decay * p


def add_decayed_weights(weight_decay: Scalar = 0.0, mask: Any = None) -> GradientTransformation:
    r"""Adds a multiple of the parameters, $u_t = g_t + \lambda \theta_{t-1}$.

    Before a scaling such as Adam's this is an L2 penalty; after it, and before the learning rate, decoupled decay.

    Args:
      weight_decay: $\lambda$.
      mask: which leaves decay; see `masked`. By default all.

    Returns:
      The transformation. It needs the parameters.

    Example:
      >>> tx = add_decayed_weights(0.1)
      >>> params = torch.ones(1)
      >>> tx.update(torch.zeros(1), tx.init(params), params)[0]
      tensor([0.1000])

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.
    """
    tx: GradientTransformation = _add_decayed_weights(weight_decay)
    return tx if mask is None else masked(tx, mask)


@elementwise
def l2_penalty(u: Leaf, p: Leaf, *, weight_decay: Scalar) -> Leaf:
    r"""Adds the gradient of a penalty, $u_t = g_t + \lambda \theta_{t-1}$, with one rounding.

    Args:
      weight_decay: $\lambda$.

    Returns:
      The transformation.

    Example:
      >>> tx = l2_penalty(0.5)
      >>> params = torch.ones(1)
      >>> tx.update(torch.ones(1), tx.init(params), params)[0]
      tensor([1.5000])
    """
    return torch.addcmul(u, p, weight_decay)


@elementwise(static=("fused",))
def decay_then_add(u: Leaf, p: Leaf, *, learning_rate: Scalar, weight_decay: Scalar, fused: bool = False) -> Leaf:
    r"""Shrinks the parameter before it is updated, $\theta_t = (1 - \eta\lambda)\, \theta_{t-1} + u_t$.

    Args:
      learning_rate: $\eta$.
      weight_decay: $\lambda$.
      fused: whether the product is rounded as in torch's fused kernels, of the CPU or of CUDA.

    Returns:
      The transformation; its update is the difference of the parameters.

    Example:
      >>> tx = decay_then_add(0.1, 0.5)
      >>> params = torch.ones(1)
      >>> tx.update(torch.zeros(1), tx.init(params), params)[0]
      tensor([-0.0500])

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2, line 12.
    """
    rest = 1 - learning_rate * weight_decay
    shrunk = fused_shrink(p, fused_number(learning_rate) * fused_number(weight_decay), rest) if fused else p * rest
    return (shrunk + u) - p  # the program adds `p` again, and drops both


@elementwise
def shrink_and_descend(u: Leaf, p: Leaf, *, learning_rate: Scalar, weight_decay: Scalar) -> Leaf:
    r"""Shrinks the parameter, then takes a step down, $\theta_t = (1 - \eta\lambda)\, \theta_{t-1} - \eta u_t$.

    Args:
      learning_rate: $\eta$.
      weight_decay: $\lambda$.

    Returns:
      The transformation; its update is the difference of the parameters.

    Example:
      >>> tx = shrink_and_descend(0.1, 0.5)
      >>> params = torch.ones(1)
      >>> tx.update(torch.ones(1), tx.init(params), params)[0]
      tensor([-0.1500])

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 1.
    """
    return torch.addcmul(p * (1 - learning_rate * weight_decay), u, -learning_rate) - p
