"""Schedules: functions of the step, usable as any hyper-parameter of any transformation.

A schedule takes the number of updates made so far (0 at the first one) as an int or a tensor and returns a 0-d
float64 tensor. Inside a chain it is traced into the kernel. Names, arguments and values are optax's; formulas are
written with torch operations of `count`. Any other function of the step works in their place; one that cannot be
traced (`lambda count: table[int(count)]`) is called by Python at every step.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ._compiler.rule import Range


class Schedule:
    """A formula of the step and its arguments: immutable, comparable, picklable. Its `repr` is the call that makes it.

    Args:
      factory: the function that made it.
      arguments: the formula's arguments by name.
    """

    def __init__(self, factory: "ScheduleFactory", arguments: Mapping[str, Any]) -> None:
        self.factory = factory
        self.arguments = dict(arguments)

    def __call__(self, count: Any) -> Any:
        """The value after `count` updates."""
        if isinstance(count, (int, float)):
            count = torch.tensor(float(count), dtype=torch.float64)
        elif isinstance(count, torch.Tensor):
            count = count.double()
        x = self.factory.formula(count, **self.arguments)
        # a constant does not mention count
        return x + 0 * count if not isinstance(x, torch.Tensor) and isinstance(count, torch.Tensor) else x

    def replace_numbers(self, number: Callable[[str, float], Any]) -> "Schedule":
        """The same schedule with every float argument replaced, so that a kernel can read it from a table."""
        new = {k: number(k, v) if isinstance(v, float) else v for k, v in self.arguments.items()}
        return Schedule(self.factory, new)

    def _key(self) -> tuple[Any, ...]:
        return (self.factory.__qualname__, *((k, _hashable(v)) for k, v in self.arguments.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        defaults = inspect.signature(self.factory).parameters
        shown = [
            f"{k}={v!r}" for k, v in self.arguments.items()
            if defaults[k].default is inspect.Parameter.empty or not _same(v, defaults[k].default)
        ]  # fmt: skip
        return f"{self.factory.__name__}({', '.join(shown)})"


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _hashable(x: Any) -> Any:
    if isinstance(x, Mapping):
        return tuple((k, _hashable(v)) for k, v in x.items())
    if isinstance(x, (list, tuple)):
        return tuple(map(_hashable, x))
    return (type(x), x)


class ScheduleFactory:
    """Turns a formula of `count` and arguments into a function of the arguments that returns a `Schedule`."""

    __name__: str
    __qualname__: str

    def __init__(self, formula: Callable[..., Any], ranges: Mapping[str, str]) -> None:
        self.formula = formula
        self.ranges = {k: Range.parse(v) for k, v in ranges.items()}
        functools.update_wrapper(self, formula)
        parameters = list(inspect.signature(formula).parameters.values())
        self.__signature__ = inspect.Signature(parameters[1:], return_annotation=Schedule)

    def __call__(self, *args: Any, **kwargs: Any) -> Schedule:
        try:
            bound = self.__signature__.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.__name__}: {error}; its arguments are {self.__signature__}.") from None
        bound.apply_defaults()
        for name, range_ in self.ranges.items():
            value = bound.arguments[name]
            if value is not None and value not in range_:
                raise ValueError(f"`{name}` of {self.__name__} must be in {range_.text}, got {value!r}.")
        made = Schedule(self, bound.arguments)
        made(0)  # the formula has its own checks
        return made

    def __repr__(self) -> str:
        return f"<schedule {self.__name__}{self.__signature__}>"

    def __reduce__(self) -> str:
        return self.__qualname__


def schedule(**ranges: str) -> Callable[[Callable[..., Any]], ScheduleFactory]:
    """Makes a family of schedules from a formula.

    Args:
      **ranges: intervals that arguments must lie in, such as `decay_steps="(0, inf)"`.

    Returns:
      A decorator for `formula(count, *arguments)`.

    Example:
      >>> @schedule(rate="(0, 1]")
      ... def halving(count, value, rate=0.5):
      ...     return value * rate**count
      >>> halving(8.0)(2)
      tensor(2., dtype=torch.float64)
    """
    return lambda formula: ScheduleFactory(formula, ranges)


STEPS = "[0, inf)"
SOME_STEPS = "(0, inf)"


@schedule()
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


@schedule(transition_steps=STEPS, transition_begin=STEPS)
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


@schedule(transition_steps=STEPS, transition_begin=STEPS)
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


@schedule(transition_steps=STEPS, decay_rate=STEPS)
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
      ValueError: `transition_steps` or `decay_rate` is negative.

    Example:
      >>> exponential_decay(1.0, transition_steps=2, decay_rate=0.5)(4)
      tensor(0.2500, dtype=torch.float64)
    """
    if transition_steps == 0:
        return init_value
    since = count - transition_begin
    exponent = since / transition_steps
    decayed = init_value * decay_rate ** (torch.floor(exponent) if staircase else exponent)
    value = torch.where((since <= 0) | (_like(count, decay_rate) == 0), _like(count, init_value), decayed)
    if end_value is None:
        return value
    end = _like(count, end_value)
    return torch.where(_like(count, decay_rate) < 1, torch.maximum(value, end), torch.minimum(value, end))


def _like(count: Any, x: Any) -> Any:
    """An argument in the form that operations on two values want."""
    return x + 0 * count


@schedule(decay_steps=SOME_STEPS)
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
    return init_value * ((1 - alpha) * _half_cosine(count, decay_steps) ** exponent + alpha)


def _half_cosine(count: Any, steps: Any) -> Any:
    return 0.5 * (1 + torch.cos(math.pi * count.clamp(max=steps) / steps))


@schedule(warmup_steps=STEPS)
def warmup_constant_schedule(count: Any, init_value: float, peak_value: float, warmup_steps: int) -> Any:
    """Up along a line, then constant.

    Args:
      init_value: the first value.
      peak_value: the value from `warmup_steps` on.
      warmup_steps: length of the way up, in steps.

    Returns:
      The schedule.

    Raises:
      ValueError: `warmup_steps` is negative.

    Example:
      >>> warmup_constant_schedule(0.0, 1.0, warmup_steps=2)(1)
      tensor(0.5000, dtype=torch.float64)
    """
    return linear_schedule.formula(count, init_value, peak_value, warmup_steps)


def _after_warmup(count: Any, init_value: Any, peak_value: Any, warmup_steps: int, after: Any) -> Any:
    """Up along a line, then what `after(steps since the peak)` says."""
    later = after(count - warmup_steps)
    if warmup_steps == 0:
        return later
    return torch.where(
        count < warmup_steps, linear_schedule.formula(count, init_value, peak_value, warmup_steps), later
    )


@schedule(warmup_steps=STEPS, decay_steps=SOME_STEPS)
def warmup_cosine_decay_schedule(
    count: Any,
    init_value: float,
    peak_value: float,
    warmup_steps: int,
    decay_steps: int,
    end_value: float = 0.0,
    exponent: float = 1.0,
) -> Any:
    """Up along a line, then down along half a cosine.

    Args:
      init_value: the first value.
      peak_value: the value at `warmup_steps`.
      warmup_steps: length of the way up, in steps.
      decay_steps: length of the whole, the way up included, in steps.
      end_value: the value from `decay_steps` on.
      exponent: power of the cosine.

    Returns:
      The schedule.

    Raises:
      ValueError: a number of steps is out of its range.

    Example:
      >>> warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=10, decay_steps=110)(60)
      tensor(0.5000, dtype=torch.float64)
    """
    if decay_steps <= warmup_steps:
        raise ValueError(
            f"`decay_steps` of warmup_cosine_decay_schedule includes the warm-up, so it must be more than "
            f"warmup_steps={warmup_steps}, got {decay_steps}."
        )
    return _after_warmup(
        count, init_value, peak_value, warmup_steps,
        lambda c: (peak_value - end_value) * _half_cosine(c, decay_steps - warmup_steps) ** exponent + end_value,
    )  # fmt: skip


@schedule(warmup_steps=STEPS, transition_steps=STEPS, decay_rate=STEPS)
def warmup_exponential_decay_schedule(
    count: Any,
    init_value: float,
    peak_value: float,
    warmup_steps: int,
    transition_steps: int,
    decay_rate: float,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: float | None = None,
) -> Any:
    """Up along a line, then `exponential_decay`.

    Args:
      init_value: the first value.
      peak_value: the value at `warmup_steps`.
      warmup_steps: length of the way up, in steps.
      transition_steps: steps in which the value is multiplied by `decay_rate`.
      decay_rate: the factor.
      transition_begin: steps after the peak at which the decay starts.
      staircase: whether the exponent is rounded down to a whole number.
      end_value: the bound that the value stops at.

    Returns:
      The schedule.

    Raises:
      ValueError: a number of steps or the rate is negative.

    Example:
      >>> warmup_exponential_decay_schedule(0.0, 1.0, 10, transition_steps=5, decay_rate=0.5)(15)
      tensor(0.5000, dtype=torch.float64)
    """
    decay = exponential_decay.formula
    return _after_warmup(
        count, init_value, peak_value, warmup_steps,
        lambda c: decay(c, peak_value, transition_steps, decay_rate, transition_begin, staircase, end_value),
    )  # fmt: skip


@schedule(warmup_steps=STEPS, stable_steps=STEPS, decay_steps=SOME_STEPS)
def warmup_stable_decay_schedule(
    count: Any,
    init_value: float,
    peak_value: float,
    warmup_steps: int,
    stable_steps: int,
    decay_steps: int,
    end_value: float = 0.0,
    decay: str = "linear",
) -> Any:
    r"""Up along a line, constant, then down: the trapezoid, or WSD.

    With $x$ the elapsed fraction of the decay, the way down falls as $1 - x$ (`"linear"`), $1 - \sqrt{x}$ (`"sqrt"`)
    or $\tfrac12(1 + \cos \pi x)$ (`"cosine"`).

    Args:
      init_value: the first value.
      peak_value: the value between the ways up and down.
      warmup_steps: length of the way up, in steps.
      stable_steps: length of the plateau, in steps.
      decay_steps: length of the way down, in steps.
      end_value: the last value.
      decay: form of the way down.

    Returns:
      The schedule.

    Raises:
      ValueError: a number of steps is out of its range, or `decay` is unknown.

    Example:
      >>> wsd = warmup_stable_decay_schedule(0.0, 1.0, 10, 80, 10)
      >>> [wsd(t).item() for t in (5, 50, 95)]
      [0.5, 1.0, 0.5]

    Source: Hägele et al. 2024, arXiv:2405.18392, section 3.
    """
    x = (count - (warmup_steps + stable_steps)).clamp(0, decay_steps) / decay_steps
    shapes: dict[str, Callable[[], Any]] = {
        "linear": lambda: 1 - x,
        "sqrt": lambda: 1 - torch.sqrt(x),
        "cosine": lambda: 0.5 * (1 + torch.cos(math.pi * x)),
    }
    if decay not in shapes:
        raise ValueError(f"`decay` of warmup_stable_decay_schedule must be one of {list(shapes)}, got {decay!r}.")
    down = (peak_value - end_value) * shapes[decay]() + end_value
    return _after_warmup(count, init_value, peak_value, warmup_steps, lambda _: down)


@schedule(warmup_steps=SOME_STEPS)
def inverse_sqrt_schedule(count: Any, peak_value: float, warmup_steps: int, init_value: float = 0.0) -> Any:
    r"""Up along a line, then down as the inverse square root of the step.

    $$\eta_t = a \sqrt{T / t} \text{ from } T \text{ on}$$

    Args:
      peak_value: a, the value at `warmup_steps`.
      warmup_steps: T, in steps.
      init_value: the first value.

    Returns:
      The schedule.

    Raises:
      ValueError: `warmup_steps` is not positive.

    Example:
      >>> inverse_sqrt_schedule(1.0, warmup_steps=100)(400)
      tensor(0.5000, dtype=torch.float64)

    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 3.
    """
    down = peak_value * torch.sqrt(warmup_steps / count.clamp(min=warmup_steps))
    return _after_warmup(count, init_value, peak_value, warmup_steps, lambda _: down)


@schedule()
def piecewise_constant_schedule(
    count: Any, init_value: float, boundaries_and_scales: Mapping[int, float] | None = None
) -> Any:
    """Multiplied by a factor at each boundary.

    Args:
      init_value: the first value.
      boundaries_and_scales: the step from which on each factor counts.

    Returns:
      The schedule.

    Raises:
      ValueError: a factor is negative.

    Example:
      >>> piecewise_constant_schedule(1.0, {10: 0.1, 20: 0.1})(15)
      tensor(0.1000, dtype=torch.float64)
    """
    value = _like(count, init_value)
    for boundary, scale in sorted((boundaries_and_scales or {}).items()):
        if scale < 0:
            raise ValueError(f"`boundaries_and_scales` must not hold negative factors, got {scale} at {boundary}.")
        value = torch.where(count < boundary, value, value * scale)
    return value


@schedule()
def piecewise_interpolate_schedule(
    count: Any,
    interpolate_type: str,
    init_value: float,
    boundaries_and_scales: Mapping[int, float] | None = None,
) -> Any:
    """From each boundary's value to the next one's along a line or half a cosine.

    Args:
      interpolate_type: `"linear"` or `"cosine"`.
      init_value: the value at step 0.
      boundaries_and_scales: steps, and the factor of the value at each to the one before.

    Returns:
      The schedule.

    Raises:
      ValueError: the type is unknown, or a factor is negative.

    Example:
      >>> piecewise_interpolate_schedule("linear", 1.0, {10: 0.5})(5)
      tensor(0.7500, dtype=torch.float64)
    """
    if interpolate_type not in ("linear", "cosine"):
        raise ValueError(f'`interpolate_type` must be "linear" or "cosine", got {interpolate_type!r}.')
    corners = sorted((boundaries_and_scales or {}).items())
    start, left = 0, _like(count, init_value)
    pieces: list[tuple[int, Any]] = []
    for boundary, scale in corners:
        if scale < 0:
            raise ValueError(f"`boundaries_and_scales` must not hold negative factors, got {scale} at {boundary}.")
        right = left * scale
        if boundary > start:
            x = (count - start) / (boundary - start)
            if interpolate_type == "linear":
                pieces.append((boundary, left + (right - left) * x))
            else:
                pieces.append((boundary, right + (left - right) / 2 * (torch.cos(math.pi * x) + 1)))
        start, left = boundary, right
    value = left
    for boundary, piece in reversed(pieces):
        value = torch.where(count < boundary, piece, value)
    return value


@schedule(transition_steps=SOME_STEPS)
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
      ValueError: `transition_steps` is not positive.

    Example:
      >>> linear_onecycle_schedule(100, 1.0)(30)
      tensor(1., dtype=torch.float64)

    Source: Smith & Topin 2018, arXiv:1708.07120, section 4.
    """
    n = transition_steps
    corners = {int(pct_start * n): div_factor, int(pct_final * n): 1 / div_factor, n: 1 / final_div_factor}
    return piecewise_interpolate_schedule.formula(count, "linear", peak_value / div_factor, corners)


@schedule(transition_steps=SOME_STEPS)
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
      ValueError: `transition_steps` is not positive.

    Example:
      >>> cosine_onecycle_schedule(100, 1.0)(30)
      tensor(1., dtype=torch.float64)

    Source: Smith & Topin 2018, arXiv:1708.07120, section 4.
    """
    n = transition_steps
    corners = {int(pct_start * n): div_factor, n: 1 / (div_factor * final_div_factor)}
    return piecewise_interpolate_schedule.formula(count, "cosine", peak_value / div_factor, corners)


@schedule()
def join_schedules(count: Any, schedules: Sequence[Callable[[Any], Any]], boundaries: Sequence[int]) -> Any:
    """One schedule after another; each counts from its own beginning.

    Args:
      schedules: the schedules.
      boundaries: the step at which each but the first begins.

    Returns:
      The schedule.

    Raises:
      ValueError: there is not one boundary fewer than schedules.

    Example:
      >>> join_schedules([constant_schedule(1.0), constant_schedule(2.0)], [10])(10)
      tensor(2., dtype=torch.float64)
    """
    if len(boundaries) != len(schedules) - 1:
        raise ValueError(f"{len(schedules)} schedules need {len(schedules) - 1} boundaries, got {len(boundaries)}.")
    value = _like(count, schedules[0](count))
    for boundary, one in zip(boundaries, schedules[1:], strict=True):
        value = torch.where(count < boundary, value, _like(count, one(count - boundary)))
    return value


@schedule()
def sgdr_schedule(count: Any, cosine_kwargs: Sequence[Mapping[str, Any]]) -> Any:
    """Warm restarts: one `warmup_cosine_decay_schedule` after another.

    Args:
      cosine_kwargs: the arguments of each.

    Returns:
      The schedule.

    Example:
      >>> cycle = dict(init_value=0.0, peak_value=1.0, warmup_steps=2, decay_steps=10)
      >>> sgdr_schedule([cycle, cycle])(12)
      tensor(1., dtype=torch.float64)

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983.
    """
    boundaries, end = [], 0
    for cycle in cosine_kwargs[:-1]:
        end += cycle["decay_steps"]
        boundaries.append(end)
    return join_schedules.formula(count, [warmup_cosine_decay_schedule(**c) for c in cosine_kwargs], boundaries)
