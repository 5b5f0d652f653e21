"""Decays of averages that forget the parameters that they started from."""

from typing import Any

import torch

from .schedule import schedule


@schedule(decay="[0, 1)")
def ema_debias_schedule(count: Any, decay: float) -> Any:
    r"""The decay that corrects an exponential moving average for its start, as Adam does.

    $$\beta_t = \beta \frac{1 - \beta^t}{1 - \beta^{t+1}}$$

    With it `params_ema` is $m_t / (1 - \beta^t)$ for $m_t = \beta m_{t-1} + (1 - \beta) \theta_t$ and $m_0 = 0$: the
    parameters before the first step have no part in it. It starts at 0 and is $\beta$ in the end.

    Args:
      decay: $\beta$.

    Returns:
      The schedule.

    Raises:
      ValueError: `decay` is out of its range.

    Example:
      >>> ema_debias_schedule(0.5)(range(3))
      tensor([0.0000, 0.3333, 0.4286], dtype=torch.float64)

    Source: Kingma & Ba 2015, arXiv:1412.6980, section 3.
    """
    return decay * (1 - decay**count) / (1 - decay ** (count + 1))


@schedule(decay="[0, 1]", offset="[1, inf)")
def ema_warmup_schedule(count: Any, decay: float, offset: float = 10.0) -> Any:
    r"""A decay that rises with the number of steps up to a bound, $\min(\beta, (1 + t) / (c + t))$.

    Args:
      decay: $\beta$, the bound.
      offset: $c$; with 2, parameters have equal weights, the first ones among them, until the bound is reached.

    Returns:
      The schedule.

    Raises:
      ValueError: an argument is out of its range.

    Example:
      >>> ema_warmup_schedule(0.5)(range(0, 12, 4))
      tensor([0.1000, 0.3571, 0.5000], dtype=torch.float64)

    Source: `tf.train.ExponentialMovingAverage` of TensorFlow, argument `num_updates`.
    """
    return torch.clamp((1 + count) / (offset + count), max=decay)
