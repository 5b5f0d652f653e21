"""Schedules multiplied: by each other and by numbers, and the running product of a function's values."""

import functools
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._compiler.arguments import checked_schedule
from .._compiler.errors import RuleError
from .._compiler.rule import other_than_a_number, plain_number
from .._compiler.symbols import Symbol
from .schedule import NUMBER, Schedule, schedule, value_at


@schedule()
def multiply_schedules(count: Any, factors: Sequence[Any]) -> Any:
    """The product of schedules and numbers; `schedule * schedule` and `schedule * number` make it.

    Args:
      factors: schedules, any functions of the step, numbers, or 0-d tensors.

    Returns:
      The schedule.

    Raises:
      TypeError: a factor is neither a number nor a function.
      ValueError: there is no factor, or one is NaN.

    Example:
      >>> from functional_optim import exponential_decay, linear_schedule
      >>> warmup = linear_schedule(0.0, 1.0, transition_steps=4)
      >>> (warmup * exponential_decay(8.0, 1, 0.5))(2)
      tensor(1., dtype=torch.float64)
      >>> warmup * 0.5
      multiply_schedules(factors=[linear_schedule(init_value=0.0, end_value=1.0, transition_steps=4), 0.5])
    """
    if not isinstance(factors, Sequence) or isinstance(factors, str):
        raise TypeError(f"`factors` of multiply_schedules must be a list, got {factors!r:.60}.")
    if not factors:
        raise ValueError("multiply_schedules takes at least one factor, got none.")
    return functools.reduce(operator.mul, [_factor(k, x, count) for k, x in enumerate(factors)])


def _factor(k: int, x: Any, count: Any) -> Any:
    """The value of a factor at a count."""
    if callable(x) and not isinstance(x, torch.Tensor):
        return value_at(checked_schedule(f"`factors` of multiply_schedules at {k}", x), count)
    if isinstance(x, torch.Tensor) and (other := other_than_a_number(x)):
        raise ValueError(f"`factors` of multiply_schedules must be numbers, got {other} at {k}.")
    if isinstance(x, float) and x != x:
        raise ValueError(f"`factors` of multiply_schedules must be numbers, got nan at {k}.")
    if not isinstance(x, (int, float, torch.Tensor, Symbol)):
        raise TypeError(f"`factors` of multiply_schedules must be schedules or numbers, got {x!r:.60} at {k}.")
    return x


def product(left: Any, right: Any) -> Any:
    """The product of two operands of `*`, one of them a schedule; products of products are one product."""
    factors: list[Any] = []
    for x in map(plain_number, (left, right)):
        if not (isinstance(x, (int, float, torch.Tensor)) or callable(x)):
            return NotImplemented
        nested = isinstance(x, Schedule) and x.factory is multiply_schedules
        factors += x.arguments["factors"] if nested else [x]
    return multiply_schedules(factors)


@schedule(init_value=NUMBER)
def cumulative_product_schedule(count: Any, init_value: float, factor_fn: Callable[[Any], Any]) -> Any:
    r"""The first value, multiplied at every step by the factor of that step.

    $$\eta_t = a \prod_{k=1}^{t} f(k)$$

    Where $f$ is the same number at all steps this is a power, in the kernel. Otherwise Python multiplies, and asks
    for each factor once, as steps come: of the products it keeps the last few.

    Args:
      init_value: a.
      factor_fn: f, a function of the step, which is asked for 1, 2, and so on.

    Returns:
      The schedule.

    Raises:
      TypeError: `factor_fn` is not a function.

    Example:
      >>> cumulative_product_schedule(1.0, lambda step: 1 / step)(4)
      tensor(0.0417, dtype=torch.float64)
    """
    if not callable(factor_fn):
        raise TypeError(
            f"`factor_fn` of cumulative_product_schedule must be a function of the step, got {factor_fn!r:.60}."
        )
    if isinstance(count, Symbol):
        return init_value * _constant(factor_fn, count) ** count
    steps = count.flatten().tolist()
    products = torch.tensor([_running_product(factor_fn, int(t)) for t in steps], dtype=torch.float64)
    return init_value * products.to(count.device).reshape(count.shape)


def _constant(fn: Callable[[Any], Any], count: Symbol) -> Any:
    """The value of a traced function that is the same at every step.

    Raises:
      RuleError: the value depends on the step.
    """
    here, there = fn(count), fn(count.tracer.op("add", count, 1.0))
    if isinstance(here, Symbol) and isinstance(there, Symbol) and here.index == there.index:
        return here  # the tracer records equal values once
    if isinstance(here, (int, float)) and isinstance(there, (int, float)) and here == there:
        return here
    raise RuleError("the product of factors that change with the step has no closed form.")


# Products of a function up to some of the steps that were asked for last, by its identity: functions that are equal may
# have other values. They go with the function.
_PRODUCTS: dict[int, dict[int, float]] = {}
_KEPT = 32  # parameters may have as many different numbers of steps before products are computed from the start


def _known_products(fn: Callable[[Any], Any]) -> dict[int, float]:
    """The products of a function that are kept; a new dict for an object that allows no weak references."""
    if id(fn) not in _PRODUCTS:
        try:
            weakref.finalize(fn, _PRODUCTS.pop, id(fn), None).atexit = False
        except TypeError:
            return {}
    return _PRODUCTS.setdefault(id(fn), {})


def _running_product(fn: Callable[[Any], Any], step: int) -> float:
    """The product of a function's values at 1 to `step`, continued from the nearest that is known."""
    known = _known_products(fn)
    start = max((k for k in list(known) if k <= step), default=0)
    value = known.get(start, 1.0)
    for k in range(start + 1, step + 1):
        value *= float(fn(k))
    known.pop(step, None)
    known[step] = value
    while len(known) > _KEPT:
        known.pop(next(iter(known)))
    return value
