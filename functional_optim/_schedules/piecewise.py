"""Values at given steps, and the way from one to the next."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .schedule import FACTOR, NUMBER, like, schedule


@schedule(init_value=NUMBER, boundaries_and_scales=FACTOR)
def piecewise_constant_schedule(
    count: Any, init_value: float, boundaries_and_scales: Mapping[int, float] | None = None
) -> Any:
    """Multiplied by a factor at each boundary.

    Args:
      init_value: the first value.
      boundaries_and_scales: the step from which on each factor counts.

    Returns:
      The schedule.

    Raises:
      TypeError: a step or a factor is not a number.
      ValueError: a factor is negative.

    Example:
      >>> piecewise_constant_schedule(1.0, {10: 0.1, 20: 0.1})(15)
      tensor(0.1000, dtype=torch.float64)
    """
    value = like(count, init_value)
    for boundary, scale in _ordered("boundaries_and_scales", "piecewise_constant_schedule", boundaries_and_scales):
        value = torch.where(count < boundary, value, value * scale)
    return value


@schedule(interpolate_type=("linear", "cosine"), init_value=NUMBER, boundaries_and_scales=FACTOR)
def piecewise_interpolate_schedule(
    count: Any,
    interpolate_type: str,
    init_value: float,
    boundaries_and_scales: Mapping[int, float] | None = None,
) -> Any:
    """From each boundary's value to the next one's along a line or half a cosine.

    Args:
      interpolate_type: `"linear"` or `"cosine"`.
      init_value: the value at step 0.
      boundaries_and_scales: steps, and the factor of the value at each to the one before.

    Returns:
      The schedule.

    Raises:
      TypeError: a step or a factor is not a number.
      ValueError: the type is unknown, or a factor is negative.

    Example:
      >>> piecewise_interpolate_schedule("linear", 1.0, {10: 0.5})(5)
      tensor(0.7500, dtype=torch.float64)
    """
    corners = [(0, init_value)]
    for boundary, scale in _ordered("boundaries_and_scales", "piecewise_interpolate_schedule", boundaries_and_scales):
        corners.append((boundary, corners[-1][1] * scale))
    return through(count, interpolate_type, corners)


@schedule(interpolate_type=("linear", "cosine"), boundaries_and_values=NUMBER)
def interpolate_schedule(count: Any, interpolate_type: str, boundaries_and_values: Mapping[float, float]) -> Any:
    """Through given values along lines or half cosines; constant before the first and after the last.

    Args:
      interpolate_type: `"linear"` or `"cosine"`.
      boundaries_and_values: steps, fractions of them too, and the value at each.

    Returns:
      The schedule.

    Raises:
      TypeError: a step or a value is not a number.
      ValueError: the type is unknown, or there is no value.

    Example:
      >>> interpolate_schedule("linear", {0: 0.0, 4: 1.0, 12: 0.0})([2, 4, 6, 20])
      tensor([0.5000, 1.0000, 0.7500, 0.0000], dtype=torch.float64)
    """
    corners = _ordered("boundaries_and_values", "interpolate_schedule", boundaries_and_values)
    if not corners:
        raise ValueError("`boundaries_and_values` of interpolate_schedule must hold a value, got none.")
    return through(count, interpolate_type, corners)


def _ordered(argument: str, name: str, given: Mapping[Any, Any] | None) -> list[tuple[Any, Any]]:
    """Steps and values in order; none if nothing is given.

    Args:
      argument, name: the argument, and the schedule, in messages.
      given: the argument.

    Raises:
      TypeError, ValueError: it is no mapping, or a step is not a number.
    """
    if given is None:
        return []
    if not isinstance(given, Mapping):
        raise TypeError(f"`{argument}` of {name} must be a dict of steps and numbers, got {given!r:.60}.")
    for step in given:
        if isinstance(step, bool) or not isinstance(step, (int, float)):
            raise TypeError(f"`{argument}` of {name} must be of steps, got {step!r:.60}.")
        if math.isnan(step):
            raise ValueError(f"`{argument}` of {name} must be of steps, got nan.")
    return sorted(given.items())


def through(count: Any, interpolate_type: str, corners: Sequence[tuple[Any, Any]]) -> Any:
    """Through values at given steps, in order, along lines or half cosines; constant before and after.

    Where steps coincide the value jumps, and the last of them counts from that step on.

    Args:
      count: the number of steps.
      interpolate_type: `"linear"` or `"cosine"`.
      corners: steps and values.
    """
    value = like(count, corners[0][1])
    for (start, left), (end, right) in itertools.pairwise(corners):
        width = end - start
        x = (count - start) / (width + (width == 0))  # a way without a step is never taken, but computed
        if interpolate_type == "linear":
            way = left + (right - left) * x
        else:
            way = right + (left - right) / 2 * (torch.cos(math.pi * x) + 1)
        value = torch.where(count < start, value, way)
    end, last = corners[-1]
    return torch.where(count < end, value, last)
