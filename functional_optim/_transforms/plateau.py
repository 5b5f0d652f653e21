"""Scaling that follows a metric."""

import math

import torch

from .._compiler.rule import Leaf, Scalar
from .._compiler.slots import slot
from .._rule import elementwise


_LARGEST = torch.finfo(torch.float32).max  # a best value of infinity would be none yet


@elementwise(
    state={
        "scale": slot(1.0, per="leaf"),
        "best_value": slot(math.inf, per="leaf"),
        "plateau_count": slot(0.0, per="leaf"),
        "cooldown_count": slot(0.0, per="leaf"),
        "value_count": slot(0.0, per="leaf"),
        "avg_value": slot(0.0, per="leaf"),
    },
    extra=("value",),
    ranges={
        "factor": "[0, 1)",
        "patience": "[1, inf)",
        "rtol": "[0, 1]",
        "atol": "[0, inf)",
        "cooldown": "[0, inf)",
        "accumulation_size": "[1, inf)",
        "min_scale": "[0, 1]",
        "mode": ("min", "max"),
        "eps": "[0, inf)",
    },
)
def reduce_on_plateau(
    u: Leaf,
    scale: Leaf,
    best_value: Leaf,
    plateau_count: Leaf,
    cooldown_count: Leaf,
    value_count: Leaf,
    avg_value: Leaf,
    *,
    value: Scalar,
    factor: Scalar = 0.1,
    patience: Scalar = 10,
    rtol: Scalar = 1e-4,
    atol: Scalar = 0.0,
    cooldown: Scalar = 0,
    accumulation_size: Scalar = 1,
    min_scale: Scalar = 0.0,
    mode: str = "min",
    eps: Scalar = 0.0,
) -> tuple[Leaf, Leaf, Leaf, Leaf, Leaf, Leaf, Leaf]:
    r"""Multiplies by a scale that shrinks when a metric, the extra argument `value`, has stopped improving.

    $$u_t = s_t\, g_t, \quad s_t = \max(\gamma s_{t-1}, s_{\min}) \text{ where the metric is bad for the
      } P\text{-th time in a row, else } s_{t-1}$$

    A value is bad unless it is below $(1 - r)\, b - a$ with $b$ the best one so far, or above $(1 + r)\, b + a$ with
    `mode="max"`. torch's ReduceLROnPlateau acts after `patience` bad values, on the next update: its `patience` is one
    less than the one here.

    Args:
      factor: $\gamma$.
      patience: P, in values; optax's 0, which shrinks when the metric improves, is refused.
      rtol: r.
      atol: a.
      cooldown: values after a reduction that are not counted as bad.
      accumulation_size: updates over which values are averaged before they are compared; a whole number.
      min_scale: $s_{\min}$.
      mode: whether the metric should be small (`"min"`) or large (`"max"`).
      eps: the scale stays where it would shrink by no more than this.

    Returns:
      The transformation. Its state is `(scale, best_value, plateau_count, cooldown_count, value_count, avg_value)`, a
      number for each leaf; `value_count` is what optax calls `count`. A leaf without a gradient does not see the value.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> tx = reduce_on_plateau(factor=0.5, patience=2)
      >>> state = tx.init(torch.zeros(1))
      >>> for loss in (1.0, 1.0, 1.0):
      ...     updates, state = tx.update(torch.ones(1), state, value=loss)
      >>> updates, state.scale
      (tensor([0.5000]), tensor(0.5000))

    Source: optax.contrib.reduce_on_plateau; torch.optim.lr_scheduler.ReduceLROnPlateau.
    """
    average = (value_count * avg_value + value) / (value_count + 1)
    full = value_count + 1 >= accumulation_size
    if mode == "min":
        improved = average < (1 - rtol) * best_value - atol
    else:
        best = torch.where(best_value == math.inf, -math.inf, best_value)  # infinite until there is one
        average = torch.clamp(average, max=_LARGEST)
        improved = average > (1 + rtol) * best + atol
    cooling = cooldown_count > 0
    bad = torch.where(improved | cooling, 0.0, plateau_count + 1)
    reduce = full & (bad >= patience)
    smaller = torch.maximum(scale * factor, min_scale)
    scale = torch.where(reduce & (scale - smaller > eps), smaller, scale)
    resting = torch.where(reduce, cooldown, torch.where(cooling, cooldown_count - 1, 0.0))
    return (
        scale * u,
        scale,
        torch.where(full & improved, average, best_value),
        torch.where(full, torch.where(reduce, 0.0, bad), plateau_count),
        torch.where(full, resting, cooldown_count),
        torch.where(full, 0.0, value_count + 1),
        torch.where(full, 0.0, average),
    )
