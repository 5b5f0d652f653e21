"""Up along a line, then another schedule."""

import math
from collections.abc import Callable
from typing import Any

import torch

from .cosine import half_cosine
from .exponential import exponential_decay
from .polynomial import linear_schedule
from .schedule import FACTOR, NUMBER, SOME_STEPS, STEPS, schedule


@schedule(init_value=NUMBER, peak_value=NUMBER, warmup_steps=STEPS)
def warmup_constant_schedule(count: Any, init_value: float, peak_value: float, warmup_steps: int) -> Any:
    """Up along a line, then constant.

    Args:
      init_value: the first value.
      peak_value: the value from `warmup_steps` on.
      warmup_steps: length of the way up, in steps; 0 begins at `peak_value`.

    Returns:
      The schedule.

    Raises:
      ValueError: `warmup_steps` is negative.

    Example:
      >>> warmup_constant_schedule(0.0, 1.0, warmup_steps=2)(1)
      tensor(0.5000, dtype=torch.float64)
    """
    return _after_warmup(count, init_value, peak_value, warmup_steps, lambda _: peak_value)


def _after_warmup(count: Any, init_value: Any, peak_value: Any, warmup_steps: int, after: Callable[[Any], Any]) -> Any:
    """Up along a line, then `after(steps since the peak)`; no way up at all if it has no steps."""
    later = after((count - warmup_steps).clamp(min=0))
    if warmup_steps == 0:
        return later
    up = linear_schedule.formula(count, init_value, peak_value, warmup_steps)
    return torch.where(count < warmup_steps, up, later)


@schedule(
    init_value=NUMBER, peak_value=NUMBER, warmup_steps=STEPS, decay_steps="(warmup_steps, inf)",
    end_value=NUMBER, exponent=NUMBER,
)  # fmt: skip
def warmup_cosine_decay_schedule(
    count: Any,
    init_value: float,
    peak_value: float,
    warmup_steps: int,
    decay_steps: int,
    end_value: float = 0.0,
    exponent: float = 1.0,
) -> Any:
    """Up along a line, then down along half a cosine.

    Args:
      init_value: the first value.
      peak_value: the value at `warmup_steps`.
      warmup_steps: length of the way up, in steps.
      decay_steps: length of the whole, the way up included, in steps.
      end_value: the value from `decay_steps` on.
      exponent: power of the cosine.

    Returns:
      The schedule.

    Raises:
      ValueError: a number of steps is out of its range.

    Example:
      >>> warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=10, decay_steps=110)(60)
      tensor(0.5000, dtype=torch.float64)
    """
    return _after_warmup(
        count, init_value, peak_value, warmup_steps,
        lambda c: (peak_value - end_value) * half_cosine(c, decay_steps - warmup_steps) ** exponent + end_value,
    )  # fmt: skip


@schedule(
    init_value=NUMBER, peak_value=NUMBER, warmup_steps=STEPS, transition_steps=STEPS, decay_rate=FACTOR,
    transition_begin=STEPS, end_value=NUMBER,
)  # fmt: skip
def warmup_exponential_decay_schedule(
    count: Any,
    init_value: float,
    peak_value: float,
    warmup_steps: int,
    transition_steps: int,
    decay_rate: float,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: float | None = None,
) -> Any:
    """Up along a line, then `exponential_decay`.

    Args:
      init_value: the first value.
      peak_value: the value at `warmup_steps`.
      warmup_steps: length of the way up, in steps.
      transition_steps: steps in which the value is multiplied by `decay_rate`.
      decay_rate: the factor.
      transition_begin: steps after the peak at which the decay starts.
      staircase: whether the exponent is rounded down to a whole number.
      end_value: the bound that the value stops at.

    Returns:
      The schedule.

    Raises:
      ValueError: a number of steps or the rate is negative.

    Example:
      >>> warmup_exponential_decay_schedule(0.0, 1.0, 10, transition_steps=5, decay_rate=0.5)(15)
      tensor(0.5000, dtype=torch.float64)
    """
    decay = exponential_decay.formula
    return _after_warmup(
        count, init_value, peak_value, warmup_steps,
        lambda c: decay(c, peak_value, transition_steps, decay_rate, transition_begin, staircase, end_value),
    )  # fmt: skip


@schedule(
    init_value=NUMBER, peak_value=NUMBER, warmup_steps=STEPS, stable_steps=STEPS, decay_steps=SOME_STEPS,
    end_value=NUMBER, decay=("linear", "sqrt", "cosine"),
)  # fmt: skip
def warmup_stable_decay_schedule(
    count: Any,
    init_value: float,
    peak_value: float,
    warmup_steps: int,
    stable_steps: int,
    decay_steps: int,
    end_value: float = 0.0,
    decay: str = "linear",
) -> Any:
    r"""Up along a line, constant, then down: the trapezoid, or WSD.

    With $x$ the elapsed fraction of the decay, the way down falls as $1 - x$ (`"linear"`), $1 - \sqrt{x}$ (`"sqrt"`)
    or $\tfrac12(1 + \cos \pi x)$ (`"cosine"`).

    Args:
      init_value: the first value.
      peak_value: the value between the ways up and down.
      warmup_steps: length of the way up, in steps.
      stable_steps: length of the plateau, in steps.
      decay_steps: length of the way down, in steps.
      end_value: the last value.
      decay: form of the way down.

    Returns:
      The schedule.

    Raises:
      ValueError: a number of steps is out of its range, or `decay` is unknown.

    Example:
      >>> wsd = warmup_stable_decay_schedule(0.0, 1.0, 10, 80, 10)
      >>> [wsd(t).item() for t in (5, 50, 95)]
      [0.5, 1.0, 0.5]

    Source: Hägele et al. 2024, arXiv:2405.18392, section 3.
    """
    x = (count - (warmup_steps + stable_steps)).clamp(0, decay_steps) / decay_steps
    left = 1 - x if decay == "linear" else 1 - torch.sqrt(x) if decay == "sqrt" else 0.5 * (1 + torch.cos(math.pi * x))
    down = (peak_value - end_value) * left + end_value
    return _after_warmup(count, init_value, peak_value, warmup_steps, lambda _: down)


@schedule(peak_value=NUMBER, warmup_steps=SOME_STEPS, init_value=NUMBER)
def inverse_sqrt_schedule(count: Any, peak_value: float, warmup_steps: int, init_value: float = 0.0) -> Any:
    r"""Up along a line, then down as the inverse square root of the step.

    $$\eta_t = a \sqrt{T / t} \text{ from } T \text{ on}$$

    Args:
      peak_value: a, the value at `warmup_steps`.
      warmup_steps: T, in steps.
      init_value: the first value.

    Returns:
      The schedule.

    Raises:
      ValueError: `warmup_steps` is not positive.

    Example:
      >>> inverse_sqrt_schedule(1.0, warmup_steps=100)(400)
      tensor(0.5000, dtype=torch.float64)

    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 3.
    """
    down = peak_value * torch.sqrt(warmup_steps / count.clamp(min=warmup_steps))
    return _after_warmup(count, init_value, peak_value, warmup_steps, lambda _: down)
