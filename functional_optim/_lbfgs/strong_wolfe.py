"""torch's search for the strong conditions of Wolfe, by cubic interpolation.

Numbers are 0-d tensors where torch has tensors, so that they are rounded as there.
"""

import math
from operator import attrgetter
from typing import Any

import torch

from .point import Evaluate, Point
from .recursion import Number


def strong_wolfe(
    evaluate: Evaluate,
    start: Point,
    first: Number,
    length: Number,
    *,
    max_steps: int = 25,
    slope_rtol: float = 1e-4,
    curv_rtol: float = 0.9,
    precision: float = 1e-9,
) -> tuple[Point, int]:
    """Searches a step that decreases the objective enough and leaves a small slope.

    A point where the objective is no number counts as infinitely high, so that the search backs off from it.

    Args:
      evaluate: the objective at a step.
      start: the point to start from, which is finite.
      first: the first step.
      length: the largest element of the direction.
      max_steps: how many points are tried after the first, at most.
      slope_rtol: the decrease asked for, as a part of that which the slope promises.
      curv_rtol: the slope asked for, as a part of that at the start.
      precision: the change of parameters below which the search ends.

    Returns:
      The point, which may be the start, and how often the objective was evaluated.

    Source: Nocedal & Wright 2006, "Numerical Optimization", algorithms 3.5 and 3.6.
    """

    def is_high(point: Point) -> bool:
        return bool(point.value > start.value + slope_rtol * point.step * start.slope)

    def is_flat(point: Point) -> bool:
        slope: Any = abs(point.slope)
        return bool(slope <= -curv_rtol * start.slope)

    def at(step: Number) -> Point:
        point = evaluate(step)
        return point if point.is_finite else point._replace(value=math.inf)

    previous, new = start, at(first)
    tried = 0
    while True:
        if tried >= max_steps:
            return min(start, new, key=attrgetter("value")), tried + 1
        if is_high(new) or (tried > 1 and new.value >= previous.value):
            break
        if is_flat(new):
            return new, tried + 1
        if new.slope >= 0:
            break
        bounds = new.step + 0.01 * (new.step - previous.step), new.step * 10
        previous, new = new, at(_interpolate(previous, new, bounds))
        tried += 1

    ends = [previous, new]
    low = _lowest(ends)
    stalled = False
    while tried < max_steps:
        steps: list[Any] = [end.step for end in ends]
        left, right = min(steps), max(steps)
        if (right - left) * length < precision:
            break
        step = _interpolate(ends[0], ends[1], (left, right))
        margin = 0.1 * (right - left)
        near = bool(min(right - step, step - left) < margin)
        if near and (stalled or step >= right or step <= left):
            step = right - margin if abs(step - right) < abs(step - left) else left + margin
            near = False
        stalled = near
        new = at(step)
        tried += 1
        if is_high(new) or new.value >= ends[low].value:
            ends[1 - low] = new
            low = _lowest(ends)
            continue
        if is_flat(new):
            return new, tried + 1
        if new.slope * (ends[1 - low].step - ends[low].step) >= 0:
            ends[1 - low] = ends[low]
        ends[low] = new
    return ends[low], tried + 1


def _lowest(ends: list[Point]) -> int:
    """The position of the lower end of an interval; the first if both are equal."""
    return 0 if ends[0].value <= ends[1].value else 1


def _interpolate(a: Point, b: Point, bounds: tuple[Number, Number]) -> Any:
    """The minimum of the cubic with the values and slopes of two points, within bounds; their middle if none is known.

    Source: Nocedal & Wright 2006, "Numerical Optimization", equation 3.59.
    """
    if a.step > b.step:
        a, b = b, a
    middle = (bounds[0] + bounds[1]) / 2.0
    if math.isinf(a.value) or math.isinf(b.value) or a.step == b.step:
        return middle
    mean = a.slope + b.slope - 3 * (a.value - b.value) / (a.step - b.step)
    found = mean**2 - a.slope * b.slope
    square = found if isinstance(found, torch.Tensor) else torch.tensor(found, device="cpu")
    if not square >= 0:
        return middle
    root = square.sqrt()
    best = b.step - (b.step - a.step) * ((b.slope + root - mean) / (b.slope - a.slope + 2 * root))
    return min(max(best, bounds[0]), bounds[1])
