"""Multiplied by the same factor every so many steps."""

from typing import Any

import torch

from .schedule import FACTOR, NUMBER, STEPS, like, schedule


@schedule(init_value=NUMBER, transition_steps=STEPS, decay_rate=FACTOR, transition_begin=STEPS, end_value=NUMBER)
def exponential_decay(
    count: Any,
    init_value: float,
    transition_steps: int,
    decay_rate: float,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: float | None = None,
) -> Any:
    r"""Multiplied by the same factor every so many steps.

    $$\eta_t = a\, r^{(t - t_0) / T} \text{ from } t_0 \text{ on}$$

    Args:
      init_value: a, the value up to `transition_begin`.
      transition_steps: T, in steps; 0 keeps `init_value` for ever.
      decay_rate: r; 0 keeps `init_value` for ever.
      transition_begin: t_0, in steps.
      staircase: whether the exponent is rounded down to a whole number.
      end_value: the bound that the value stops at: the lowest one if r < 1, else the highest.

    Returns:
      The schedule.

    Raises:
      ValueError: a number of steps or `decay_rate` is negative.

    Example:
      >>> exponential_decay(1.0, transition_steps=2, decay_rate=0.5)(4)
      tensor(0.2500, dtype=torch.float64)
    """
    if transition_steps == 0:
        return init_value
    exponent = (count - transition_begin).clamp(min=0) / transition_steps
    decayed = init_value * decay_rate ** (torch.floor(exponent) if staircase else exponent)
    init, rate = like(count, init_value), like(count, decay_rate)
    value = torch.where(init == 0, init, decayed)  # 0 stays 0 where the power overflows
    if end_value is not None:
        end = like(count, end_value)
        value = torch.where(rate < 1, torch.maximum(value, end), torch.minimum(value, end))
    return torch.where(rate == 0, init, value)
