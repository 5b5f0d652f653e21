"""Multiplying: by a number, by a schedule, by a learning rate, by a ratio of norms, by zero."""

import torch

from .._compiler.functions import leaf_mean, leaf_norm, tree_norm
from .._compiler.rule import NUMBER, Leaf, Scalar
from .._rule import elementwise


@elementwise(ranges={"step_size": NUMBER})
def scale(u: Leaf, *, step_size: Scalar) -> Leaf:
    r"""Multiplies by a number, $u_t = \eta\, g_t$.

    Args:
      step_size: $\eta$.

    Returns:
      The transformation.

    Example:
      >>> tx = scale(-0.1)
      >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)))[0]
      tensor([-0.1000])
    """
    return step_size * u


@elementwise(ranges={"step_size_fn": NUMBER})
def scale_by_schedule(u: Leaf, *, step_size_fn: Scalar) -> Leaf:
    r"""Multiplies by a function of the step, $u_t = \eta_t\, g_t$.

    Args:
      step_size_fn: the schedule; it is 0-based, so the first update is multiplied by its value at 0.

    Returns:
      The transformation. Its state is `(count,)`.

    Example:
      >>> tx = scale_by_schedule(lambda count: 1.0 - 0.5 * count)
      >>> state = tx.init(torch.zeros(1))
      >>> _, state = tx.update(torch.ones(1), state)
      >>> tx.update(torch.ones(1), state)[0]
      tensor([0.5000])
    """
    return step_size_fn * u


@elementwise(static=("flip_sign",), ranges={"learning_rate": NUMBER})
def scale_by_learning_rate(u: Leaf, *, learning_rate: Scalar = None, flip_sign: bool = True) -> Leaf:
    r"""Multiplies by minus the learning rate, $u_t = -\eta\, g_t$: an ascent direction becomes a step down.

    Args:
      learning_rate: $\eta$; None counts as 1, so that updates still change sign (optax would not).
      flip_sign: whether the sign changes.

    Returns:
      The transformation.

    Example:
      >>> tx = scale_by_learning_rate(0.1)
      >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)))[0]
      tensor([-0.1000])
    """
    rate = 1.0 if learning_rate is None else learning_rate
    return -rate * u if flip_sign else rate * u


@elementwise(ranges={"min_norm": "[0, inf)", "trust_coefficient": NUMBER, "eps": "[0, inf)"})
def scale_by_trust_ratio(
    u: Leaf, p: Leaf, *, min_norm: Scalar = 0.0, trust_coefficient: Scalar = 1.0, eps: Scalar = 0.0
) -> Leaf:
    r"""Makes each leaf's update as long as its parameter, up to a factor.

    $$u_t = g_t\, \eta\, \frac{\max(\lVert \theta \rVert, \nu)}{\max(\lVert g_t \rVert, \nu) + \epsilon}$$

    A leaf whose parameter or update has norm 0 is left as it is.

    Args:
      min_norm: $\nu$, the least that a norm counts as.
      trust_coefficient: $\eta$.
      eps: $\epsilon$.

    Returns:
      The transformation. It needs the parameters.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> tx = scale_by_trust_ratio()
      >>> params = torch.tensor([3.0, 4.0])
      >>> tx.update(torch.tensor([0.0, 1.0]), tx.init(params), params)[0]
      tensor([0., 5.])

    Source: You et al. 2017, arXiv:1708.03888, equation 6; You et al. 2020, arXiv:1904.00962, algorithm 2.
    """
    param_norm = torch.maximum(leaf_norm(p), min_norm)
    update_norm = torch.maximum(leaf_norm(u), min_norm)
    vanishes = update_norm == 0
    ratio = trust_coefficient * param_norm / (torch.where(vanishes, 1.0, update_norm) + eps)
    return u * torch.where(vanishes | (param_norm == 0), 1.0, ratio)


@elementwise(ranges={"min_scale": "[0, inf)"})
def scale_by_param_block_rms(u: Leaf, p: Leaf, *, min_scale: Scalar = 1e-3) -> Leaf:
    r"""Multiplies by the root mean square of the parameter, $u_t = g_t \max(\operatorname{RMS}(\theta), \nu)$.

    Args:
      min_scale: $\nu$.

    Returns:
      The transformation. It needs the parameters.

    Raises:
      ValueError: `min_scale` is negative.

    Example:
      >>> tx = scale_by_param_block_rms()
      >>> params = torch.full((2,), 3.0)
      >>> tx.update(torch.ones(2), tx.init(params), params)[0]
      tensor([3., 3.])

    Source: Shazeer & Stern 2018, arXiv:1804.04235, section 8.
    """
    return u * torch.maximum(torch.sqrt(leaf_mean(p * p)), min_scale)


@elementwise(ranges={"min_scale": "[0, inf)"})
def scale_by_param_block_norm(u: Leaf, p: Leaf, *, min_scale: Scalar = 1e-3) -> Leaf:
    r"""Multiplies by the norm of the parameter, $u_t = g_t \max(\lVert \theta \rVert, \nu)$.

    Args:
      min_scale: $\nu$.

    Returns:
      The transformation. It needs the parameters.

    Raises:
      ValueError: `min_scale` is negative.

    Example:
      >>> tx = scale_by_param_block_norm()
      >>> params = torch.tensor([3.0, 4.0])
      >>> tx.update(torch.ones(2), tx.init(params), params)[0]
      tensor([5., 5.])
    """
    return u * torch.maximum(leaf_norm(p), min_scale)


@elementwise(ranges={"scale_factor": NUMBER, "eps": "[0, inf)"})
def normalize_by_update_norm(u: Leaf, *, scale_factor: Scalar = 1.0, eps: Scalar = 1e-6) -> Leaf:
    r"""Makes all updates together as long as a number, $u_t = c\, g_t / (\lVert g_t \rVert + \epsilon)$.

    Args:
      scale_factor: c.
      eps: term in the denominator.

    Returns:
      The transformation. The norm is over all leaves.

    Raises:
      ValueError: `eps` is negative.

    Example:
      >>> tx = normalize_by_update_norm(eps=0.0)
      >>> tx.update([torch.tensor([3.0]), torch.tensor([4.0])], tx.init([torch.zeros(1)] * 2))[0]
      [tensor([0.6000]), tensor([0.8000])]
    """
    return u * (scale_factor / (tree_norm(u) + eps))


@elementwise
def set_to_zero(u: Leaf) -> Leaf:
    """Replaces updates by zeros, so that parameters stay as they are.

    Returns:
      The transformation.

    Example:
      >>> tx = set_to_zero()
      >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)))[0]
      tensor([0.])
    """
    return torch.zeros_like(u)


@elementwise
def descend(u: Leaf, p: Leaf, *, learning_rate: Scalar) -> Leaf:
    r"""A step down, $\theta_t = \theta_{t-1} - \eta g_t$, with one rounding.

    Args:
      learning_rate: $\eta$.

    Returns:
      The transformation; its update is the difference of the parameters.

    Example:
      >>> tx = descend(0.5)
      >>> params = torch.ones(1)
      >>> tx.update(torch.ones(1), tx.init(params), params)[0]
      tensor([-0.5000])
    """
    return torch.addcmul(p, u, -learning_rate) - p  # the program adds `p` again, and drops both
