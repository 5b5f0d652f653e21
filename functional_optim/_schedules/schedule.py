"""Schedules: functions of the step, usable as any hyper-parameter of any transformation.

A schedule takes the number of updates made so far (0 at the first one) and returns a float64 tensor. Inside a chain
it is traced into the kernel, so formulas are written with torch operations of `count`. Any other function of the step
works in its place; `traced.py` says which functions can be traced, the others are called by Python at every step.
"""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, overload

import torch

from .._compiler.arguments import checked_function, checked_switch
from .._compiler.errors import note_number
from .._compiler.rule import (
    NUMBER as NUMBER,
    Range,
    hint_of_members,
    other_than_a_number,
    plain_number,
)
from .._compiler.symbols import Symbol


class Schedule:
    """A formula of the step and its arguments: immutable, comparable, picklable. Its `repr` is the call that makes it.

    Args:
      factory: the function that made it.
      arguments: the formula's arguments by name.

    Example:
      >>> from functional_optim import cosine_decay_schedule
      >>> cosine_decay_schedule(0.1, decay_steps=100)
      cosine_decay_schedule(init_value=0.1, decay_steps=100)
      >>> cosine_decay_schedule(0.1, decay_steps=100)(50)
      tensor(0.0500, dtype=torch.float64)
    """

    def __init__(self, factory: "ScheduleFactory", arguments: Mapping[str, Any]) -> None:
        if not isinstance(factory, ScheduleFactory) or not isinstance(arguments, Mapping):
            raise TypeError(
                f"a Schedule is made by a function such as `fo.linear_schedule`, or one that `fo.schedule` returns, "
                f"not of {factory!r:.60} and {arguments!r:.60}."
            )
        self.factory = factory
        self.arguments = MappingProxyType(dict(arguments))

    def __call__(self, count: Any) -> Any:
        """The value after `count` updates.

        Args:
          count: a number, or an array, a list or a tensor of numbers.

        Returns:
          A float64 tensor of the shape of `count`; 0-d for a number.

        Raises:
          TypeError: `count` holds no numbers.

        Example:
          >>> from functional_optim import linear_schedule
          >>> linear_schedule(0.0, 1.0, transition_steps=4)(range(6))
          tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000, 1.0000], dtype=torch.float64)
        """
        if isinstance(count, Symbol):
            return self.factory.formula(count, **self.arguments)
        count = self._counts(count)
        try:
            value = self.factory.formula(count, **self.arguments)
        except (TypeError, AttributeError) as error:
            note_number(error, "`torch.log(value + 0 * count)`")
            raise
        x = torch.as_tensor(value, dtype=torch.float64, device=count.device)
        return x if x.ndim else x.expand(count.shape).clone()  # a formula need not mention `count`

    def __mul__(self, other: Any) -> "Schedule":
        """The product with another schedule, a function of the step, a number or a 0-d tensor."""
        from .product import product  # a module of functions of schedules

        made: Schedule = product(self, other)
        return made

    def __rmul__(self, other: Any) -> "Schedule":
        from .product import product

        made: Schedule = product(other, self)
        return made

    __array_ufunc__ = None  # so that numbers of NumPy leave `*` to `__rmul__`

    def _counts(self, count: Any) -> torch.Tensor:
        if isinstance(count, torch.Tensor):
            return count.double()
        try:
            # `tolist` of NumPy's and JAX's arrays spares torch their dtypes, strides and flags
            plain = count.tolist() if hasattr(count, "tolist") else list(count) if isinstance(count, range) else count
            return torch.tensor(plain, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"{self.factory.__name__} takes the number of steps, or an array or tensor of such numbers, "
                f"got {count!r:.60}."
            ) from None

    def replace_numbers(self, number: Callable[[str, Any], Any]) -> "Schedule":
        """The same schedule with every float and tensor replaced, so that a kernel can read it from a table.

        Args:
          number: `number(label, value)` makes the replacement.
        """
        return Schedule(self.factory, {k: _replace(k, v, number) for k, v in self.arguments.items()})

    def _key(self) -> tuple[Any, ...]:
        return (self.factory, *((k, _comparable(v)) for k, v in self.arguments.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple[Any, ...]:
        return Schedule, (self.factory, dict(self.arguments))

    def __repr__(self) -> str:
        defaults = inspect.signature(self.factory).parameters
        shown = [
            f"{k}={v!r}" for k, v in self.arguments.items()
            if defaults[k].default is inspect.Parameter.empty or _comparable(v) != _comparable(defaults[k].default)
        ]  # fmt: skip
        return f"{self.factory.__name__}({', '.join(shown)})"


class Identity:
    """An object compared by identity, which it keeps alive so that no other can take its place."""

    def __init__(self, x: object) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and other.x is self.x

    def __hash__(self) -> int:
        return id(self.x)


def _comparable(x: Any) -> Any:
    """An argument as a value that can be compared and hashed."""
    if isinstance(x, Mapping):
        return tuple((k, _comparable(v)) for k, v in x.items())
    if isinstance(x, (list, tuple)):
        return tuple(map(_comparable, x))
    return (type(x), Identity(x) if isinstance(x, torch.Tensor) else x)


def _replace(label: str, x: Any, number: Callable[[str, Any], Any]) -> Any:
    if isinstance(x, float) or (isinstance(x, torch.Tensor) and not x.ndim):
        return number(label, x)
    if isinstance(x, Schedule):
        return x.replace_numbers(lambda inner, value: number(f"{label}.{inner}", value))
    if isinstance(x, dict):
        return {k: _replace(f"{label}.{k}", v, number) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_replace(f"{label}.{k}", v, number) for k, v in enumerate(x)]
    return x


def swap_tensors(values: Mapping[str, Any], tensor: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """Hyper-parameters with other tensors: those that are tensors, and those in schedules.

    Args:
      values: the hyper-parameters by name.
      tensor: a function that returns the tensor in place of one.
    """

    def number(label: str, x: Any) -> Any:
        return tensor(x) if isinstance(x, torch.Tensor) else x

    return {k: v.replace_numbers(number) if isinstance(v, Schedule) else number(k, v) for k, v in values.items()}


def tensors_of(values: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """The tensors among hyper-parameters and in their schedules, each once.

    Example:
      >>> from functional_optim import constant_schedule
      >>> tensors_of({"decay": 0.9, "learning_rate": constant_schedule(torch.tensor(0.5))})
      (tensor(0.5000),)
    """
    found: dict[int, torch.Tensor] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        return found.setdefault(id(x), x)

    if any(isinstance(v, (torch.Tensor, Schedule)) for v in values.values()):
        swap_tensors(values, note)
    return tuple(found.values())


def _own(x: Any) -> Any:
    """An argument that its caller cannot change: containers copied, numbers of NumPy and JAX as Python's."""
    if isinstance(x, Mapping):
        return {_own(k): _own(v) for k, v in x.items()}
    if isinstance(x, tuple):
        return tuple(map(_own, x))
    if isinstance(x, (list, Iterator)):
        return list(map(_own, x))
    if not isinstance(x, torch.Tensor) and hasattr(x, "tolist") and getattr(x, "ndim", 0) != 0:
        return x.tolist()
    x = plain_number(x)
    if isinstance(x, int) and not -(2**63) <= x < 2**63:  # torch's integers have 64 bits
        with contextlib.suppress(OverflowError):
            return float(x)
    return x


class ScheduleFactory:
    """Turns a formula of `count` and arguments into a function of the arguments that returns a `Schedule`."""

    __name__: str
    __qualname__: str

    def __init__(self, formula: Callable[..., Any], ranges: Mapping[str, str | Sequence[Any]]) -> None:
        self.formula = formula
        functools.update_wrapper(self, formula)
        for k, v in ranges.items():
            if not isinstance(v, (str, Sequence)):
                raise TypeError(
                    f'`{k}` of schedule is {v!r:.60}, expected an interval, such as "[0, 1)", or a list of values.'
                )
        self.ranges = {k: v if isinstance(v, str) else tuple(v) for k, v in ranges.items()}
        parameters = list(inspect.signature(formula).parameters.values())[1:]
        self.__signature__ = inspect.Signature(parameters, return_annotation=Schedule)
        names = [p.name for p in parameters]
        unknown = sorted({*ranges}.union(*map(_names, ranges.values())).difference(names))
        if unknown:
            raise TypeError(
                f"ranges of {self.__name__} name {unknown}, which are not among its arguments: {', '.join(names)}."
            )
        self._check_defaults({p.name: p.default for p in parameters if p.default is not p.empty})

    def _check_defaults(self, defaults: Mapping[str, Any]) -> None:
        """Refuses defaults outside their ranges, but for those whose bounds are arguments without a default.

        Raises:
          TypeError, ValueError: with the argument, its default and the expectation.
        """
        try:
            for name, allowed in self.ranges.items():
                if name in defaults and _names(allowed) <= defaults.keys():
                    self._check(name, _own(defaults[name]), defaults)
        except (TypeError, ValueError) as error:
            raise type(error)(f"the default of {error}") from None

    def __call__(self, *args: Any, **kwargs: Any) -> Schedule:
        try:
            bound = self.__signature__.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.__name__}: {error}; its arguments are {self.__signature__}.") from None
        bound.apply_defaults()
        arguments = {k: _own(v) for k, v in bound.arguments.items()}
        for name, parameter in self.__signature__.parameters.items():
            if parameter.annotation is int and isinstance(arguments[name], torch.Tensor):
                raise TypeError(
                    f"`{name}` of {self.__name__} is a number of steps, which cannot change, so it must be no tensor: "
                    f"pass int({name})."
                )
        for name, parameter in self.__signature__.parameters.items():
            if parameter.annotation is bool:
                arguments[name] = checked_switch(name, self.__name__, arguments[name])
        for name in self.ranges:
            self._check(name, arguments[name], arguments)
        made = Schedule(self, arguments)
        made(0)  # the formula has its own checks
        return made

    def _check(self, name: str, value: Any, arguments: Mapping[str, Any], place: str = "") -> None:
        """Refuses an argument outside its range; in a mapping or a sequence every value is checked."""
        if value is None and self.__signature__.parameters[name].default is None:
            return
        allowed, label = self.ranges[name], f"`{name}` of {self.__name__}"
        holds_many = self.__signature__.parameters[name].annotation not in _ONE_NUMBER
        if holds_many and isinstance(value, (Mapping, list, tuple)):
            for k, v in value.items() if isinstance(value, Mapping) else enumerate(value):
                self._check(name, v, arguments, f" at {k}")
        elif isinstance(allowed, tuple):
            if value not in allowed:
                raise ValueError(f"{label} must be one of {list(allowed)}, got {value!r}{place}.")
        elif isinstance(value, torch.Tensor):
            if other := other_than_a_number(value):
                raise ValueError(f"{label} must be a number, got {other}{place}{hint_of_members(value)}.")
            if value.dtype is torch.bool:
                raise TypeError(f"{label} must be a number, got a tensor of dtype {value.dtype}{place}.")
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{label} must be a number, got {value!r:.60}{place}.")
        else:
            bounds = {name: arguments[name] for name in _names(allowed)}
            if not all(isinstance(x, (int, float)) for x in bounds.values()):
                return  # a tensor may hold another number at every step
            text = _NAME.sub(lambda m: repr(bounds[m[0]]) if m[0] in bounds else m[0], allowed)
            if value not in Range.parse(text):
                here = f", here {text}" if text != allowed else ""
                raise ValueError(f"{label} must be in {allowed}{here}, got {value!r}{place}.")

    def __repr__(self) -> str:
        return f"<schedule {self.__name__}{self.__signature__}>"

    def __reduce__(self) -> str:
        return self.__qualname__


_ONE_NUMBER = (int, float, int | None, float | None)  # annotations of arguments that hold no more than one
_NAME = re.compile(r"(?<![\w.])[A-Za-z_]\w*")  # not the e of 1e-3


def _names(allowed: str | Sequence[Any]) -> set[str]:
    """The arguments that are bounds of an interval."""
    return set(_NAME.findall(allowed)) - {"inf"} if isinstance(allowed, str) else set()


@overload
def schedule(formula: Callable[..., Any], /) -> ScheduleFactory: ...


@overload
def schedule(
    formula: None = None, /, **ranges: str | Sequence[Any]
) -> Callable[[Callable[..., Any]], ScheduleFactory]: ...


def schedule(
    formula: Callable[..., Any] | None = None, /, **ranges: str | Sequence[Any]
) -> ScheduleFactory | Callable[[Callable[..., Any]], ScheduleFactory]:
    """Makes a family of schedules from a formula.

    A formula is plain torch of `count`, a float64 tensor, and its arguments. What it refers to besides is best left
    unchanged while it is in use; a formula that refers to what may change is called by Python at every step.

    Args:
      formula: the formula, when used without parentheses.
      **ranges: intervals that arguments, or the values in them, must lie in, such as `decay_steps="(0, inf)"`, whose
        bounds may be other arguments, as in `decay_steps="(warmup_steps, inf)"`; or the values that they may have.

    Returns:
      The function of the formula's arguments that makes schedules; of ranges, a decorator for
      `formula(count, *arguments)`.

    Raises:
      TypeError: a range names no argument.

    Example:
      >>> @schedule(rate="(0, 1]")
      ... def halving(count, value, rate=0.5):
      ...     return value * rate**count
      >>> halving(8.0)(2)
      tensor(2., dtype=torch.float64)
    """

    def make(formula: Callable[..., Any]) -> ScheduleFactory:
        return ScheduleFactory(checked_function("formula", "schedule", formula, "`formula(count, *arguments)`"), ranges)

    return make if formula is None else make(formula)


FACTOR = "[0, inf)"
STEPS = "[0, inf)"
SOME_STEPS = "(0, inf)"


def like(count: Any, x: Any) -> Any:
    """A number in the form of `count`, which operations on two values want."""
    return x + 0 * count


def value_at(fn: Callable[[Any], Any], count: Any, active: Any = True) -> Any:
    """A member's value, in the form of `count`.

    A function of the user's gets a number, an int where it is one, as it does from an optimizer.

    Args:
      fn: a schedule, or any function of the step.
      count: the number of steps.
      active: where the value counts; the member is not asked for any other step, and is 0 there or has its value at 0.
    """
    if isinstance(fn, Schedule) or not isinstance(count, torch.Tensor):
        return like(count, fn(count if active is True else torch.where(active, count, 0.0)))
    wanted = [True] * count.numel() if active is True else active.flatten().tolist()
    asked = zip(count.flatten().tolist(), wanted, strict=True)
    values = [fn(int(t) if t.is_integer() else t) if each else 0.0 for t, each in asked]
    tensors = [torch.as_tensor(x, dtype=torch.float64, device=count.device) for x in values]
    return torch.stack(tensors).reshape(count.shape) if tensors else count
