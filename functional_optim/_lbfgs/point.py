"""Points on a line, and the conditions of Wolfe."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from .recursion import Number


class Point(NamedTuple):
    """A point on the line along a direction.

    Args:
      step: how far it is from the start, in lengths of the direction.
      value: the objective there.
      slope: its derivative along the direction.
      grad: its gradient.
    """

    step: Number
    value: float
    slope: Number
    grad: Any

    @property
    def is_finite(self) -> bool:
        """Whether the objective and its slope are numbers."""
        return math.isfinite(self.value) and math.isfinite(float(self.slope))


Evaluate = Callable[[Number], Point]


class Found(NamedTuple):
    """The result of a search.

    Args:
      point: the point; the start itself if no step was found.
      evaluations: how often the objective was evaluated.
      decrease_error: how far the objective is from a sufficient decrease; infinite where it is no number.
      curvature_error: how far the slope is from being small enough.
    """

    point: Point
    evaluations: int
    decrease_error: float
    curvature_error: float


def excess(value: float, step: Number, start: Point, slope_rtol: float, rtol: float = 0.0) -> float:
    r"""The amount by which a value misses a sufficient decrease, $f(\eta) - (1 + \delta) f(0) - \eta c_1 f'(0)$."""
    return value - (1.0 + rtol) * start.value - float(step) * slope_rtol * float(start.slope)


def curvature_error(point: Point, start: Point, curv_rtol: float) -> float:
    r"""The amount by which a slope misses a small one, $|f'(\eta)| - c_2 |f'(0)|$, or 0."""
    return max(abs(float(point.slope)) - curv_rtol * abs(float(start.slope)), 0.0)
