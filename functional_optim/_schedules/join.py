"""One schedule after another."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from .._compiler.arguments import checked_schedule
from .schedule import NUMBER, Schedule, like, schedule, value_at
from .warmup import warmup_cosine_decay_schedule


@schedule(boundaries=NUMBER)
def join_schedules(count: Any, schedules: Sequence[Callable[[Any], Any]], boundaries: Sequence[int]) -> Any:
    """One schedule after another; each counts from its own beginning and is never asked for a step outside its time.

    Args:
      schedules: the schedules, or any functions of the step.
      boundaries: the step at which each but the first begins, in order; where two coincide, the schedule between them
        has no step.

    Returns:
      The schedule.

    Raises:
      TypeError: a member is not a function.
      ValueError: there is not one boundary fewer than schedules, or boundaries are not in order.

    Example:
      >>> from functional_optim import constant_schedule
      >>> join_schedules([constant_schedule(1.0), constant_schedule(2.0)], [10])(10)
      tensor(2., dtype=torch.float64)
    """
    for name, given in (("schedules", schedules), ("boundaries", boundaries)):
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise TypeError(f"`{name}` of join_schedules must be a list, got {given!r:.60}.")
    if not schedules or len(boundaries) != len(schedules) - 1:
        raise ValueError(
            f"join_schedules takes one boundary fewer than schedules, got {len(schedules)} schedules and "
            f"{len(boundaries)} boundaries."
        )
    value = like(count, 0.0)
    for k, (one, start, end) in enumerate(zip(schedules, (0, *boundaries), (*boundaries, math.inf), strict=True)):
        if not callable(one):
            raise TypeError(f"`schedules` of join_schedules must be functions of the step, got {one!r:.60} at {k}.")
        checked_schedule(f"`schedules` of join_schedules at {k}", one)
        if end < start and k:
            raise ValueError(f"`boundaries` of join_schedules must be in order, got {list(boundaries)}.")
        if end > start or not k:
            active = count < end if not k else (count >= start) & (count < end)
            value = torch.where(active, value_at(one, count - start, active), value)
    return value


def sgdr_schedule(cosine_kwargs: Iterable[Mapping[str, Any]]) -> Schedule:
    """Warm restarts: one `warmup_cosine_decay_schedule` after another.

    Args:
      cosine_kwargs: the arguments of each.

    Returns:
      The schedule, made by `join_schedules`.

    Raises:
      TypeError, ValueError: an argument is missing, unknown or out of its range.

    Example:
      >>> cycle = dict(init_value=0.0, peak_value=1.0, warmup_steps=2, decay_steps=10)
      >>> sgdr_schedule([cycle, cycle])(12)
      tensor(1., dtype=torch.float64)

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983.
    """
    if not isinstance(cosine_kwargs, Iterable) or isinstance(cosine_kwargs, (str, Mapping, torch.Tensor)):
        raise TypeError(f"`cosine_kwargs` of sgdr_schedule must be a list of dicts, got {cosine_kwargs!r:.60}.")
    cosine_kwargs = list(cosine_kwargs)
    for k, arguments in enumerate(cosine_kwargs):
        if not isinstance(arguments, Mapping):
            raise TypeError(f"`cosine_kwargs` of sgdr_schedule must be a list of dicts, got {arguments!r:.60} at {k}.")
    cycles = [warmup_cosine_decay_schedule(**arguments) for arguments in cosine_kwargs]
    ends = list(itertools.accumulate(cycle.arguments["decay_steps"] for cycle in cycles))
    return join_schedules(cycles, ends[:-1])
