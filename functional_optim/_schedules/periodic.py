"""Schedules that come back: along a cosine, with restarts, in triangles."""

import math
from collections.abc import Callable
from typing import Any

import torch

from .cosine import half_cosine
from .schedule import FACTOR, NUMBER, SOME_STEPS, STEPS, schedule, value_at


@schedule(init_value=NUMBER, half_period=SOME_STEPS, end_value=NUMBER)
def cosine_annealing_schedule(count: Any, init_value: float, half_period: int, end_value: float = 0.0) -> Any:
    r"""Down along a cosine and up again, for ever; `cosine_decay_schedule` stays down.

    $$\eta_t = b + (a - b)\, \tfrac12 (1 + \cos(\pi t / T))$$

    Args:
      init_value: a, the value at every even multiple of `half_period`.
      half_period: T, the length of the way down, in steps.
      end_value: b, the value at every odd multiple.

    Returns:
      The schedule.

    Raises:
      ValueError: `half_period` is not positive.

    Example:
      >>> cosine_annealing_schedule(1.0, half_period=4)([0, 2, 4, 6, 8])
      tensor([1.0000, 0.5000, 0.0000, 0.5000, 1.0000], dtype=torch.float64)

    Source: torch.optim.lr_scheduler.CosineAnnealingLR.
    """
    within = _since(count, 2 * half_period)
    return end_value + (init_value - end_value) * 0.5 * (1 + torch.cos(math.pi * within / half_period))


def _since(count: Any, period: Any) -> Any:
    """The steps since the last multiple of a period."""
    return count - period * torch.floor(count / period)


@schedule(init_value=NUMBER, period=SOME_STEPS, period_mult="[1, inf)", end_value=NUMBER)
def cosine_restarts_schedule(
    count: Any, init_value: float, period: int, period_mult: int = 1, end_value: float = 0.0
) -> Any:
    r"""Down along half a cosine, again and again, each time more slowly; `sgdr_schedule` lists its cycles.

    $$\eta_t = b + (a - b)\, \tfrac12 (1 + \cos(\pi s / T_i)), \quad T_i = T m^i$$

    with $s$ the steps since the last restart, the $i$-th.

    Args:
      init_value: a, the value at every restart.
      period: T, the length of the first cycle, in steps.
      period_mult: m, the length of a cycle over that of the one before; a whole number.
      end_value: b, which every cycle approaches.

    Returns:
      The schedule.

    Raises:
      ValueError: `period` is not positive, or `period_mult` is no whole number from 1 on.

    Example:
      >>> cosine_restarts_schedule(1.0, period=2, period_mult=2)(range(7))
      tensor([1.0000, 0.5000, 1.0000, 0.8536, 0.5000, 0.1464, 1.0000], dtype=torch.float64)

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5.
    """
    if period_mult != int(period_mult):
        raise ValueError(f"`period_mult` of cosine_restarts_schedule must be a whole number, got {period_mult!r}.")
    if period_mult == 1:
        since, length = _since(count, period), period
    else:
        since, length = _growing_cycle(count, period, period_mult)
    return end_value + (init_value - end_value) * half_cosine(since, length)


def _growing_cycle(count: Any, period: Any, mult: Any) -> tuple[Any, Any]:
    """The steps since the last restart, and the length of this cycle.

    Cycle i starts at T (m^i - 1) / (m - 1). The logarithm that inverts this may fall short of a whole number by a
    rounding error at the step that begins a cycle; it reaches none before that step, as long as steps are below 2**45.
    Powers are whole numbers, which they are not quite on a GPU.
    """

    def power(i: Any) -> Any:
        return torch.floor(mult**i + 0.5)

    def start(i: Any) -> Any:
        return period * ((power(i) - 1) / (mult - 1))

    i = torch.floor(torch.log(count.clamp(min=0) * (mult - 1) / period + 1) / math.log(mult))
    i = torch.where(start(i + 1) <= count, i + 1, i)
    return count - start(i), period * power(i)


@schedule(
    base_value=NUMBER, max_value=NUMBER, step_size_up=SOME_STEPS, step_size_down=STEPS,
    mode=("triangular", "triangular2", "exp_range"), gamma=FACTOR, scale_mode=("cycle", "iterations"),
)  # fmt: skip
def cyclic_schedule(
    count: Any,
    base_value: float,
    max_value: float,
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    mode: str = "triangular",
    gamma: float = 1.0,
    scale_fn: Callable[[Any], Any] | None = None,
    scale_mode: str = "cycle",
) -> Any:
    """Up and down along lines, again and again.

    The height of a triangle is constant (`"triangular"`), halves from one to the next (`"triangular2"`), or is
    `gamma**count` of the first (`"exp_range"`). With the values exchanged it goes down and up, as momentum does
    beside a learning rate.

    Args:
      base_value: the value between triangles.
      max_value: the value at the top of the first.
      step_size_up: length of the way up, in steps.
      step_size_down: length of the way down, in steps; by default that of the way up; 0 jumps.
      mode: how heights change.
      gamma: the factor of `"exp_range"`.
      scale_fn: a function in place of `mode` that gives the height as a fraction of the first.
      scale_mode: the argument of `scale_fn`: the number of the triangle, 1 at first (`"cycle"`), or the step
        (`"iterations"`).

    Returns:
      The schedule.

    Raises:
      TypeError: `scale_fn` is not a function.
      ValueError: an argument is out of its range.

    Example:
      >>> cyclic_schedule(0.0, 1.0, step_size_up=2, mode="triangular2")([0, 1, 2, 3, 4, 6])
      tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.0000, 0.5000], dtype=torch.float64)

    Source: Smith 2017, arXiv:1506.01186.
    """
    if scale_fn is not None and not callable(scale_fn):
        raise TypeError(f"`scale_fn` of cyclic_schedule must be a function, got {scale_fn!r:.60}.")
    down = step_size_up if step_size_down is None else step_size_down
    total = step_size_up + down
    since = _since(count, total)
    side = since / step_size_up
    if down != 0:
        side = torch.where(since <= step_size_up, side, (total - since) / down)
    if scale_fn is not None:
        height = value_at(scale_fn, torch.floor(count / total) + 1 if scale_mode == "cycle" else count)
    elif mode == "triangular2":
        height = 0.5 ** torch.floor(count / total)
    else:
        height = gamma**count if mode == "exp_range" else 1.0
    return base_value + (max_value - base_value) * side * height
