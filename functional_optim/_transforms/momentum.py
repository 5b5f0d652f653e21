"""Momentum: sums and means of past updates."""

import torch

from .._compiler.functions import fused_number
from .._compiler.rule import Leaf, OptionalDtype, Scalar
from .._compiler.slots import slot
from .._rule import elementwise
from ._moments import mean, torch_slot, unbiased


@elementwise(state={"trace": slot(0.0, dtype="accumulator_dtype")}, static=("nesterov",), ranges={"decay": "[0, inf)"})
def trace(
    u: Leaf, trace: Leaf, *, decay: Scalar, nesterov: bool = False, accumulator_dtype: OptionalDtype = None
) -> tuple[Leaf, Leaf]:
    r"""Heavy-ball momentum: a decaying sum of past updates.

    $$m_t = g_t + \mu\, m_{t-1}, \quad u_t = m_t \quad (\text{Nesterov: } u_t = g_t + \mu\, m_t)$$

    Args:
      decay: $\mu$.
      nesterov: whether the step looks one update ahead.
      accumulator_dtype: how the sum is stored; by default as the parameter.

    Returns:
      The transformation. Its state is `(trace,)`.

    Raises:
      ValueError: `decay` is negative.

    Example:
      >>> tx = trace(decay=0.5)
      >>> state = tx.init(torch.zeros(1))
      >>> _, state = tx.update(torch.ones(1), state)
      >>> tx.update(torch.ones(1), state)[0]
      tensor([1.5000])

    Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".
    """
    trace = u + decay * trace
    return (u + decay * trace if nesterov else trace), trace


@elementwise(
    state={"ema": slot(0.0, dtype="accumulator_dtype")},
    static=("debias",),
    ranges={"decay": "[0, 1]", "decay if debias": "[0, 1)"},  # with 1, the correction would be 0 / 0
)
def ema(
    u: Leaf,
    ema: Leaf,
    *,
    step: Scalar,
    decay: Scalar,
    debias: bool = True,
    accumulator_dtype: OptionalDtype = None,
) -> tuple[Leaf, Leaf]:
    r"""An exponential moving average of updates.

    $$m_t = \beta m_{t-1} + (1 - \beta) g_t, \quad u_t = m_t / (1 - \beta^t)$$

    Args:
      decay: $\beta$; less than 1 with `debias`.
      debias: whether the average is corrected for its start at 0, as here.
      accumulator_dtype: how the average is stored; by default as the parameter.

    Returns:
      The transformation. Its state is `(count, ema)`.

    Raises:
      ValueError: `decay` is out of its range.

    Example:
      >>> tx = ema(decay=0.5)
      >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)))[0]
      tensor([1.])

    Source: Kingma & Ba 2015, arXiv:1412.6980, section 3.
    """
    ema = mean(ema, u, decay)
    return (unbiased(ema, decay, step) if debias else ema), ema


@elementwise(state={"momentum_buffer": torch_slot()}, static=("nesterov",))
def momentum(
    u: Leaf, momentum_buffer: Leaf, *, first: Scalar, momentum: Scalar, dampening: Scalar = 0.0, nesterov: bool = False
) -> tuple[Leaf, Leaf]:
    r"""torch's momentum, with its roundings: the first gradient is taken whole, later ones are dampened.

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
    buffer = torch.addcmul(momentum_buffer * momentum, u, 1 - fused_number(dampening))
    buffer = torch.where(first, u, buffer)
    return (torch.addcmul(u, buffer, momentum) if nesterov else buffer), buffer
