"""optax's search for the strong conditions of Wolfe, with the approximate decrease of Hager and Zhang."""

import math

from .point import Evaluate, Found, Point, curvature_error, excess


def zoom(
    evaluate: Evaluate,
    start: Point,
    first: float,
    *,
    max_steps: int,
    max_step: float | None,
    tol: float,
    increase_factor: float,
    slope_rtol: float,
    curv_rtol: float,
    approx_dec_rtol: float | None,
    precision: float,
) -> Found:
    """Searches a step that decreases the objective enough and leaves a small slope.

    Steps grow until an interval is known to hold such a step; then the interval shrinks around it.

    Args:
      evaluate: the objective at a step.
      start: the point to start from.
      first: the first step.
      max_steps: how often the objective is evaluated at most; once at least.
      max_step: the longest step, or None.
      tol: tolerance of both conditions.
      increase_factor: factor of a step that is too short.
      slope_rtol: the decrease asked for, as a part of that which the slope promises.
      curv_rtol: the slope asked for, as a part of that at the start.
      approx_dec_rtol: the relative change of the objective within which the approximate decrease counts; None for
        never.
      precision: the width of an interval in which the search settles for a sufficient decrease.

    Returns:
      The point; if there is none that satisfies both conditions, the best one that decreases the objective enough, else
      the last one, else, if the objective is no number there, the start.

    Source: Nocedal & Wright 2006, "Numerical Optimization", algorithms 3.5 and 3.6; Hager & Zhang 2006, "Algorithm
    851", equations 23, 26 and 27.
    """
    value, slope = start.value, float(start.slope)
    start = start._replace(slope=slope)
    if not start.is_finite:
        return Found(start._replace(step=0.0), 0, math.inf, math.inf)

    def errors(point: Point) -> tuple[float, float]:
        if not point.is_finite:
            return math.inf, math.inf
        decrease = excess(point.value, point.step, start, slope_rtol)
        if approx_dec_rtol is not None:
            approximate = float(point.slope) - (2 * slope_rtol - 1.0) * slope
            decrease = min(decrease, max(approximate, point.value - value - approx_dec_rtol * abs(value)))
        return max(decrease, 0.0), curvature_error(point, start, curv_rtol)

    def at(step: float) -> Point:
        point = evaluate(step)
        return point._replace(slope=float(point.slope))

    def settle(point: Point) -> Found:
        chosen = safe if float(safe.step) > 0.0 or math.isinf(decrease) else point
        return Found(chosen, count, decrease, curvature)

    safe = previous = start
    count = 0
    while True:
        step = first if count == 0 else increase_factor * float(previous.step)
        longest = max_step is not None and step >= max_step
        new = at(max_step if longest and max_step is not None else step)
        count += 1
        decrease, curvature = errors(new)
        if decrease <= tol:
            safe = new
        rises = decrease > 0.0 or (count > 1 and new.value >= previous.value)
        turns = float(new.slope) >= 0.0
        if max(decrease, curvature) <= tol or (longest and not (rises or turns)):
            return Found(new, count, decrease, curvature)
        if count >= max_steps:
            return settle(new)
        if rises or turns:
            break
        previous = new

    low, high = (previous, new) if rises else (new, previous)
    reference = low
    while True:
        width = abs(float(high.step) - float(low.step))
        new = at(_between(low, high, reference))
        count += 1
        decrease, curvature = errors(new)
        if decrease <= tol and new.value < safe.value:
            safe = new
        if max(decrease, curvature) <= tol:
            return Found(new, count, decrease, curvature)
        if count >= max_steps or (width <= precision and float(safe.step) > 0.0):
            return settle(new)
        if decrease > 0.0 or new.value >= low.value:
            reference, high = high, new
        elif float(new.slope) * (float(high.step) - float(low.step)) >= 0.0:
            reference, high, low = high, low, new
        else:
            reference, low = low, new


def _between(low: Point, high: Point, reference: Point) -> float:
    """A step inside an interval: the minimum of a cubic, else of a parabola, else the middle; not near the ends."""
    a, b = float(low.step), float(high.step)
    left, right, width = min(a, b), max(a, b), abs(b - a)
    for step, margin in ((_cubic(low, high, reference), 0.2 * width), (_parabola(low, high), 0.1 * width)):
        if left + margin < step < right - margin:
            return step
    return (a + b) / 2.0


def _cubic(a: Point, b: Point, c: Point) -> float:
    """The minimum of the cubic through three points with the slope of the first; NaN if there is none."""
    slope, db, dc = float(a.slope), float(b.step) - float(a.step), float(c.step) - float(a.step)
    determinant = db * db * dc * dc * (db - dc)
    if determinant == 0.0:
        return math.nan
    rb, rc = b.value - a.value - slope * db, c.value - a.value - slope * dc
    third = (dc * dc * rb - db * db * rc) / determinant
    second = (db * db * db * rc - dc * dc * dc * rb) / determinant
    radical = second * second - 3.0 * third * slope
    if third == 0.0 or not radical >= 0.0:
        return math.nan
    return float(a.step) + (math.sqrt(radical) - second) / (3.0 * third)


def _parabola(a: Point, b: Point) -> float:
    """The minimum of the parabola through two points with the slope of the first; NaN if there is none."""
    slope, db = float(a.slope), float(b.step) - float(a.step)
    curvature = math.nan if db * db == 0.0 else (b.value - a.value - slope * db) / (db * db)
    return math.nan if curvature == 0.0 else float(a.step) - slope / (2.0 * curvature)
