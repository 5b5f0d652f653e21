"""The search of Armijo: steps become shorter until the objective has decreased enough."""

import math
from collections.abc import Callable

from .point import Found, Point, excess


def backtrack(
    evaluate: Callable[[float], float],
    start: Point,
    first: float,
    *,
    max_steps: int,
    slope_rtol: float,
    decrease_factor: float,
    atol: float,
    rtol: float,
) -> Found:
    """Shortens a step until the objective has decreased enough.

    Args:
      evaluate: the objective at a step.
      start: the point to start from.
      first: the first step.
      max_steps: how often the step is shortened at most.
      slope_rtol: the decrease asked for, as a part of that which the slope promises.
      decrease_factor: factor of a step that is too long.
      atol: a decrease that may lack.
      rtol: a part of the objective that may lack.

    Returns:
      The last point that was tried, without slope and gradient; the start if the objective is no number there.
    """
    step, error = first, math.inf
    for count in range(1, max_steps + 2):
        step = first if count == 1 else decrease_factor * step
        value = evaluate(step)
        error = max(excess(value, step, start, slope_rtol, rtol), 0.0) if math.isfinite(value) else math.inf
        if error <= atol:
            break
    if math.isinf(error):
        return Found(start, count, error, math.inf)
    return Found(Point(step, value, math.nan, None), count, error, math.inf)
