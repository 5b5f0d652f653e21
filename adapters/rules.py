"""The update rules of torch.optim, rounded where torch rounds.

They are the algorithms of `functional_optim.transforms` in the order of operations of torch's fused CPU kernels,
whose compiler contracts `a + b * c` to one fused multiply-add. With a learning rate that torch multiplies in before
it divides, they cannot be had by scaling an update afterwards, so a rule here takes the step itself. In the last,
incomplete vector of a tensor torch's compiler contracts the other product of `a * b + c * d`; these rules do not.
"""

from typing import Any

import torch

from functional_optim import elementwise, slot


Leaf = torch.Tensor
Scalar = Any  # a number; in a formula, its value at this step


@elementwise
def negate(u: Leaf) -> Leaf:
    r"""Turns a maximisation into a minimisation, $u_t = -g_t$.

    Returns:
      The transformation.

    Example:
      >>> tx = negate()
      >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)))[0]
      tensor([-1.])
    """
    return -u


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


@elementwise
def decay_then_add(u: Leaf, p: Leaf, *, learning_rate: Scalar, weight_decay: Scalar) -> Leaf:
    r"""Shrinks the parameter before it is updated, $\theta_t = (1 - \eta\lambda)\, \theta_{t-1} + u_t$.

    Args:
      learning_rate: $\eta$.
      weight_decay: $\lambda$.

    Returns:
      The transformation; its update is the difference of the parameters.

    Example:
      >>> tx = decay_then_add(0.1, 0.5)
      >>> params = torch.ones(1)
      >>> tx.update(torch.zeros(1), tx.init(params), params)[0]
      tensor([-0.0500])

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2, line 12.
    """
    new: Leaf = p * (1 - learning_rate * weight_decay) + u
    return new - p


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
    return torch.addcmul(p, u, -learning_rate) - p


@elementwise(state={"momentum_buffer": slot(0.0)}, static=("nesterov",))
def momentum(
    u: Leaf, momentum_buffer: Leaf, *, first: Leaf, momentum: Scalar, dampening: Scalar = 0.0, nesterov: bool = False
) -> tuple[Leaf, Leaf]:
    r"""torch's momentum: the first gradient is taken whole, later ones are dampened.

    $$b_1 = g_1, \quad b_t = \mu b_{t-1} + (1 - \tau) g_t, \quad u_t = b_t \quad
      (\text{Nesterov: } u_t = g_t + \mu b_t)$$

    Args:
      momentum: $\mu$.
      dampening: $\tau$.
      nesterov: whether the step looks one update ahead.

    Returns:
      The transformation.

    Example:
      >>> tx = momentum(0.5, dampening=0.5)
      >>> state = tx.init(torch.zeros(1))
      >>> _, state = tx.update(torch.ones(1), state)
      >>> tx.update(torch.ones(1), state)[0]
      tensor([1.])

    Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".
    """
    buffer = torch.addcmul(momentum_buffer * momentum, u, 1 - dampening)
    buffer = torch.where(first, u, buffer)
    return (torch.addcmul(u, buffer, momentum) if nesterov else buffer), buffer


def _moments(u: Leaf, exp_avg: Leaf, exp_avg_sq: Leaf, b1: Scalar, b2: Scalar) -> tuple[Leaf, Leaf]:
    return torch.lerp(exp_avg, u, 1 - b1), torch.addcmul(exp_avg_sq * b2, u, u, value=1 - b2)


def _adam_step(mu: Leaf, nu: Leaf, step: Leaf, learning_rate: Scalar, b1: Scalar, b2: Scalar, eps: Scalar) -> Leaf:
    root = torch.sqrt(nu) / torch.sqrt(1 - b2**step) + eps
    update: Leaf = (-(learning_rate / (1 - b1**step)) * mu) / root
    return update


@elementwise(state={"exp_avg": slot(0.0), "exp_avg_sq": slot(0.0)})
def adam_step(
    u: Leaf,
    exp_avg: Leaf,
    exp_avg_sq: Leaf,
    *,
    step: Leaf,
    learning_rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
) -> tuple[Leaf, Leaf, Leaf]:
    r"""A step of Adam, $u_t = -\frac{\eta}{1 - \beta_1^t} m_t / (\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon)$.

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
    exp_avg, exp_avg_sq = _moments(u, exp_avg, exp_avg_sq, b1, b2)
    return _adam_step(exp_avg, exp_avg_sq, step, learning_rate, b1, b2, eps), exp_avg, exp_avg_sq


@elementwise(state={"exp_avg": slot(0.0), "exp_avg_sq": slot(0.0), "max_exp_avg_sq": slot(0.0)})
def amsgrad_step(
    u: Leaf,
    exp_avg: Leaf,
    exp_avg_sq: Leaf,
    max_exp_avg_sq: Leaf,
    *,
    step: Leaf,
    learning_rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
) -> tuple[Leaf, Leaf, Leaf, Leaf]:
    r"""A step of AMSGrad as torch has it: Adam with the largest second moment so far, before its correction.

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
    exp_avg, exp_avg_sq = _moments(u, exp_avg, exp_avg_sq, b1, b2)
    largest = torch.maximum(max_exp_avg_sq, exp_avg_sq)
    return _adam_step(exp_avg, largest, step, learning_rate, b1, b2, eps), exp_avg, exp_avg_sq, largest


@elementwise(state={"square_avg": slot(0.0)})
def rmsprop_ratio(u: Leaf, square_avg: Leaf, *, step: Leaf, alpha: Scalar, eps: Scalar) -> tuple[Leaf, Leaf]:
    r"""torch's RMSprop before its learning rate, $u_t = g_t / (\sqrt{v_t} + \epsilon)$.

    Args:
      alpha: decay of the mean of squares.
      eps: $\epsilon$.

    Returns:
      The transformation. It counts steps, as torch does, though nothing depends on them.

    Example:
      >>> tx = rmsprop_ratio(0.75, 0.0)
      >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)))[0]
      tensor([2.])

    Source: Tieleman & Hinton 2012, lecture 6.5 of "Neural Networks for Machine Learning".
    """
    square_avg = torch.addcmul(square_avg * alpha, u, u, value=1 - alpha)
    return u / (torch.sqrt(square_avg) + eps), square_avg


@elementwise(state={"square_avg": slot(0.0), "grad_avg": slot(0.0)})
def centered_rmsprop_ratio(
    u: Leaf, square_avg: Leaf, grad_avg: Leaf, *, step: Leaf, alpha: Scalar, eps: Scalar
) -> tuple[Leaf, Leaf, Leaf]:
    r"""torch's centred RMSprop before its learning rate, $u_t = g_t / (\sqrt{v_t - \bar g_t^2} + \epsilon)$.

    Args:
      alpha: decay of both means.
      eps: $\epsilon$.

    Returns:
      The transformation.

    Example:
      >>> tx = centered_rmsprop_ratio(0.5, 0.0)
      >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)))[0]
      tensor([2.])

    Source: Graves 2013, arXiv:1308.0850, equations 38 to 45.
    """
    square_avg = torch.addcmul(square_avg * alpha, u, u, value=1 - alpha)
    grad_avg = torch.lerp(grad_avg, u, 1 - alpha)
    variance = torch.addcmul(square_avg, grad_avg, grad_avg, value=-1)
    return u / (torch.sqrt(variance) + eps), square_avg, grad_avg
