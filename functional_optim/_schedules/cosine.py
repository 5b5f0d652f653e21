"""Down along half a cosine."""

import math
from typing import Any

import torch

from .schedule import NUMBER, SOME_STEPS, schedule


@schedule(init_value=NUMBER, decay_steps=SOME_STEPS, alpha=NUMBER, exponent=NUMBER)
def cosine_decay_schedule(
    count: Any, init_value: float, decay_steps: int, alpha: float = 0.0, exponent: float = 1.0
) -> Any:
    r"""Down along half a cosine.

    $$\eta_t = a\,\big((1 - \alpha)\,(\tfrac12 (1 + \cos(\pi \min(t, T) / T)))^p + \alpha\big)$$

    Args:
      init_value: a.
      decay_steps: T, in steps.
      alpha: the last value as a fraction of the first.
      exponent: p.

    Returns:
      The schedule.

    Raises:
      ValueError: `decay_steps` is not positive.

    Example:
      >>> cosine_decay_schedule(1.0, decay_steps=10)(5)
      tensor(0.5000, dtype=torch.float64)

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5.
    """
    return init_value * ((1 - alpha) * half_cosine(count, decay_steps) ** exponent + alpha)


def half_cosine(count: Any, steps: Any) -> Any:
    """From 1 at 0 to 0 from `steps` on."""
    return 0.5 * (1 + torch.cos(math.pi * count.clamp(max=steps) / steps))
