"""Up, down and further down: one cycle."""

from typing import Any

import torch

from .piecewise import through
from .schedule import NUMBER, SOME_STEPS, like, schedule


@schedule(
    transition_steps=SOME_STEPS, peak_value=NUMBER, pct_start="[0, 1]", pct_final="[pct_start, 1]",
    div_factor="(0, inf]", final_div_factor="(0, inf]",
)  # fmt: skip
def linear_onecycle_schedule(
    count: Any,
    transition_steps: int,
    peak_value: float,
    pct_start: float = 0.3,
    pct_final: float = 0.85,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> Any:
    """Up and down along lines, then further down: one cycle.

    Args:
      transition_steps: length of the cycle, in steps.
      peak_value: the highest value.
      pct_start: fraction of the cycle at which it is reached.
      pct_final: fraction of the cycle at which the first value is reached again.
      div_factor: the highest value over the first.
      final_div_factor: the first value over the last.

    Returns:
      The schedule.

    Raises:
      ValueError: an argument is out of its range.

    Example:
      >>> linear_onecycle_schedule(100, 1.0)(30)
      tensor(1., dtype=torch.float64)

    Source: Smith & Topin 2018, arXiv:1708.07120, section 4.
    """
    n, first = transition_steps, peak_value / div_factor
    top, foot = torch.floor(like(count, pct_start * n)), torch.floor(like(count, pct_final * n))
    corners = [(0, first), (top, peak_value), (foot, first), (n, first / final_div_factor)]
    return through(count, "linear", corners)


@schedule(
    transition_steps=SOME_STEPS, peak_value=NUMBER, pct_start="[0, 1]",
    div_factor="(0, inf]", final_div_factor="(0, inf]",
)  # fmt: skip
def cosine_onecycle_schedule(
    count: Any,
    transition_steps: int,
    peak_value: float,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> Any:
    """Up and down along half cosines: one cycle.

    Args:
      transition_steps: length of the cycle, in steps.
      peak_value: the highest value.
      pct_start: fraction of the cycle at which it is reached.
      div_factor: the highest value over the first.
      final_div_factor: the first value over the last.

    Returns:
      The schedule.

    Raises:
      ValueError: an argument is out of its range.

    Example:
      >>> cosine_onecycle_schedule(100, 1.0)(30)
      tensor(1., dtype=torch.float64)

    Source: Smith & Topin 2018, arXiv:1708.07120, section 4.
    """
    n, first = transition_steps, peak_value / div_factor
    top = torch.floor(like(count, pct_start * n))
    return through(count, "cosine", [(0, first), (top, peak_value), (n, first / final_div_factor)])
