"""A constant, a line, a power: from one value to another."""

from typing import Any

from .schedule import NUMBER, STEPS, schedule


@schedule(value=NUMBER)
def constant_schedule(count: Any, value: float) -> Any:
    """The same value at every step.

    Args:
      value: the value.

    Returns:
      The schedule.

    Example:
      >>> constant_schedule(0.1)(7)
      tensor(0.1000, dtype=torch.float64)
    """
    return value


@schedule(init_value=NUMBER, end_value=NUMBER, power=NUMBER, transition_steps=STEPS, transition_begin=STEPS)
def polynomial_schedule(
    count: Any, init_value: float, end_value: float, power: float, transition_steps: int, transition_begin: int = 0
) -> Any:
    r"""From one value to another along a power of the time left.

    $$\eta_t = (a - b)\,(1 - \min(\max(t - t_0, 0), T) / T)^p + b$$

    Args:
      init_value: a, the value up to `transition_begin`.
      end_value: b, the value from `transition_begin + transition_steps` on.
      power: p.
      transition_steps: T, in steps; 0 keeps `init_value` for ever.
      transition_begin: t_0, in steps.

    Returns:
      The schedule.

    Raises:
      ValueError: a number of steps is negative.

    Example:
      >>> polynomial_schedule(1.0, 0.0, 2, transition_steps=10)(5)
      tensor(0.2500, dtype=torch.float64)
    """
    if transition_steps == 0:
        return init_value
    left = 1 - (count - transition_begin).clamp(0, transition_steps) / transition_steps
    return (init_value - end_value) * left**power + end_value


@schedule(init_value=NUMBER, end_value=NUMBER, transition_steps=STEPS, transition_begin=STEPS)
def linear_schedule(
    count: Any, init_value: float, end_value: float, transition_steps: int, transition_begin: int = 0
) -> Any:
    """From one value to another along a line.

    Args:
      init_value: the value up to `transition_begin`.
      end_value: the value from `transition_begin + transition_steps` on.
      transition_steps: length of the way, in steps; 0 keeps `init_value` for ever.
      transition_begin: where it starts, in steps.

    Returns:
      The schedule.

    Raises:
      ValueError: a number of steps is negative.

    Example:
      >>> linear_schedule(0.0, 1.0, transition_steps=4)(1)
      tensor(0.2500, dtype=torch.float64)
    """
    return polynomial_schedule.formula(count, init_value, end_value, 1, transition_steps, transition_begin)
