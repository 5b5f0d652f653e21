"""Declarations of a rule: its hyper-parameters and their ranges."""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from .arguments import (
    checked_schedule,
    checked_switch,
    plain_number as plain_number,
    tensor_refused,
    whole_number,
)
from .slots import Slot, check_slot_dtype


Leaf = torch.Tensor  # in a formula: the update, the parameter or the state of one leaf
Scalar = Any  # a number, a 0-d tensor or a schedule; in a formula: its value at this step, a 0-d tensor
OptionalDtype = torch.dtype | None


@dataclass(frozen=True)
class Option:
    """A hyper-parameter that every leaf looks up by name, at every step, in options of its own.

    It takes the place of a number where a transformation runs leaf by leaf.

    Args:
      name: the key.
      index: the position, if the value of the key is a sequence.

    Example:
      >>> Option("betas", 1).look_up({"betas": (0.9, 0.99)})
      0.99
    """

    name: str
    index: int | None = None

    def look_up(self, options: Mapping[str, Any], label: str = "a hyper-parameter") -> Any:
        """The value at this step.

        Args:
          options: the options of a parameter group.
          label: the name of the hyper-parameter in messages.

        Raises:
          KeyError: there is no such option.
          ValueError: the value is no sequence of that length.
        """
        if self.name not in options:
            raise self.missing(options, label)
        return self.pick(options[self.name])

    def missing(self, options: Mapping[str, Any], label: str) -> KeyError:
        """The error of options that lack this one."""
        return KeyError(
            f"the parameter group lacks {self.name!r}, which {label} is taken from; there are {sorted(options)}."
        )

    @property
    def label(self) -> str:
        """The number within an option, in messages."""
        return f"the option {self.name if self.index is None else f'{self.name}[{self.index}]'!r}"

    def pick(self, value: Any) -> Any:
        """The number within an option.

        Raises:
          ValueError: the value is no sequence of that length.
        """
        if self.index is None:
            return value
        try:
            return value[self.index]
        except (IndexError, KeyError, TypeError):
            raise ValueError(
                f"the option {self.name!r} is {value!r:.60}, expected at least {self.index + 1} numbers."
            ) from None


NUMBER = "[-inf, inf]"  # the interval of a hyper-parameter that is any number, but for NaN


@dataclass(frozen=True)
class Range:
    """An interval, written as in mathematics: `Range.parse("[0, 1)")`."""

    text: str
    low: float = field(compare=False)
    high: float = field(compare=False)

    @classmethod
    def parse(cls, text: str) -> "Range":
        match = re.fullmatch(r"([\[(])\s*([^,\s]+)\s*,\s*([^,\s]+)\s*([\])])", text)
        try:
            return cls(text, float(match[2]), float(match[3]))  # type: ignore[index]
        except (TypeError, ValueError):
            raise ValueError(f'a range is written like "[0, 1)", got {text!r}.') from None

    def __contains__(self, x: float) -> bool:
        low = x >= self.low if self.text[0] == "[" else x > self.low
        high = x <= self.high if self.text[-1] == "]" else x < self.high
        return low and high


@dataclass(eq=False)
class Rule:
    """Declaration of a rule, as `elementwise` reads it.

    Args:
      name: the name that messages and `repr` use.
      fn: the formula.
      slots: slots of state, by name, in the order of the formula's arguments.
      hypers: hyper-parameters and their defaults, in order; `inspect.Parameter.empty` if there is none.
      extras: names of extra arguments of `update` that it needs, numbers.
      tree_extras: names of those that are trees like the parameters.
      wraps: whether it goes around an inner transformation, and takes the update that entered it, `before`.
      state_types: the classes of its states, once they have been made: with a counter, and without.
      static: hyper-parameters that Python sees while the formula is traced.
      ranges: intervals that hyper-parameters must lie in, or the values that they may have; one that holds only with
        a switch has a key such as `"decay if debias"`.
      uses_params: whether the formula takes `p`.
      uses_step: whether the formula takes `step`.
      takes_first: whether it takes `first`.
      final: whether it needs updates as they will be added to the parameters.
      whole: whether the formula is one for whole tensors, in any torch operations.
      batched: whether such a formula takes stacks of leaves.
      stacked_up_to: the most elements of leaves that such a formula is called for together.
      factory: the function that `elementwise` returned; it has a name that pickle can find.
    """

    name: str
    fn: Callable[..., Any]
    slots: Mapping[str, Slot]
    hypers: Mapping[str, Any]
    extras: tuple[str, ...]
    static: frozenset[str]
    ranges: Mapping[str, Range | tuple[Any, ...]]
    uses_params: bool
    uses_step: bool
    takes_first: bool
    final: bool = False
    whole: bool = False
    batched: bool = False
    stacked_up_to: int | None = None
    factory: Any = None
    tree_extras: tuple[str, ...] = ()
    wraps: bool = False
    state_types: dict[bool, Any] = field(default_factory=dict, repr=False)

    @property
    def uses_first(self) -> bool:
        """Whether the first step differs from others: to the formula, or because a slot starts from its update."""
        return self.takes_first or any(s.start == "first_update" for s in self.slots.values())

    @cached_property
    def bools(self) -> frozenset[str]:
        """The hyper-parameters that are True or False: their default is, or they are annotated so.

        A name in `static` may stand for switches of several kinds, unless it is annotated.
        """
        parameters = inspect.signature(self.fn).parameters
        by_default = {k for k, x in self.hypers.items() if isinstance(x, bool) and k not in self.static}
        return frozenset(by_default | {k for k in self.hypers if parameters[k].annotation in (bool, "bool")})

    @cached_property
    def whole_numbers(self) -> frozenset[str]:
        """The hyper-parameters that are whole numbers: those in `static` that are annotated as `int`."""
        parameters = inspect.signature(self.fn).parameters
        return frozenset(k for k in self.static if parameters[k].annotation in (int, "int"))

    def check(self, hyper: str, value: Any, values: Mapping[str, Any]) -> Any:
        """Refuses a value of the wrong kind, or outside its range.

        Args:
          hyper: the hyper-parameter.
          value: its value.
          values: all of them, since a range may depend on a switch.

        Returns:
          The value; a number of NumPy or JAX as Python's.

        Raises:
          TypeError, ValueError: with the name, the value and the expectation.
        """
        value = plain_number(value)
        if hyper in self.bools and not (value is None and self.hypers[hyper] is None):
            return checked_switch(hyper, self.name, value)
        if value is not None and any(slot.dtype == hyper for slot in self.slots.values()):
            if not isinstance(value, torch.dtype):
                raise TypeError(
                    f"`{hyper}` of {self.name} must be a dtype of torch, such as torch.bfloat16, or None, "
                    f"got {value!r:.60}."
                )
            if not self.whole:
                check_slot_dtype(f"the slot of {self.name} that `{hyper}` is for", value)
        allowed = self.ranges.get(hyper)
        if isinstance(allowed, tuple):
            if value not in allowed:
                raise ValueError(f"`{hyper}` of {self.name} must be one of {list(allowed)}, got {value!r}.")
            return value
        if isinstance(value, torch.Tensor) and (other := other_than_a_number(value)):
            raise ValueError(
                f"`{hyper}` of {self.name} must be a number, a 0-d tensor or a schedule, "
                f"got {other}{hint_of_members(value)}."
            )
        if callable(value) and not isinstance(value, torch.Tensor) and hyper in {s.start for s in self.slots.values()}:
            raise TypeError(
                f"`{hyper}` of {self.name} is where its state starts, so it must be a number, got the function "
                f"{value!r:.60}."
            )
        if hyper in self.static and isinstance(value, torch.Tensor):
            raise tensor_refused(hyper, self.name, "a fixed argument")
        if isinstance(value, torch.Tensor) and value.dtype is torch.bool:
            raise TypeError(
                f"`{hyper}` of {self.name} must be a number, a 0-d tensor or a schedule, got a tensor of dtype "
                f"{value.dtype}; pass `x.float()`."
            )
        own_none = value is None and self.hypers[hyper] is None
        if hyper in self.whole_numbers and not own_none:
            value = whole_number(hyper, self.name, value)
        if not self._is_one_number(hyper, value):
            if _is_schedule(value) and hyper not in self.static and not isinstance(value, torch.Tensor):
                checked_schedule(f"`{hyper}` of {self.name}", value)
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            others = "" if hyper in self.static else ", a 0-d tensor or a schedule"
            raise TypeError(f"`{hyper}` of {self.name} must be a number{others}, got {value!r:.60}.")
        for key, interval in self.ranges.items():
            name, _, switch = key.partition(" if ")
            if name == hyper and (not switch or values[switch]) and value not in interval:
                assert isinstance(interval, Range)
                condition = f" if `{switch}` is {values[switch]!r}" if switch else ""
                expected = "a number" if interval.text == NUMBER else f"in {interval.text}{condition}"
                raise ValueError(f"`{hyper}` of {self.name} must be {expected}, got {value!r}.")
        if math.isnan(value):
            raise ValueError(f"`{hyper}` of {self.name} must be a number, got nan.")
        return value

    def check_defaults(self) -> None:
        """Refuses defaults that `check` would refuse in a call.

        Raises:
          TypeError, ValueError: with the name, the value and the expectation.
        """
        # an interval that holds with a switch is one of the call, where the switch has no default
        values = {k: False if v is inspect.Parameter.empty else v for k, v in self.hypers.items()}
        try:
            for hyper, default in self.hypers.items():
                if default is not inspect.Parameter.empty:
                    self.check(hyper, default, values)
        except (TypeError, ValueError) as error:
            raise type(error)(f"the default of {error}") from None

    def _is_one_number(self, hyper: str, value: Any) -> bool:
        """Whether a value is to be a number of Python's: it is no tensor, option or schedule, nor a switch."""
        if isinstance(value, (torch.Tensor, Option)):
            return False
        schedule = _is_schedule(value) and hyper not in self.static
        if hyper in self.ranges:  # an interval
            return not schedule and (value is not None or self.hypers[hyper] is not None)
        text = isinstance(value, (str, bytes)) and not isinstance(self.hypers.get(hyper), (str, bytes))
        return hyper not in self.static and not schedule and (text or not is_static(value))


@dataclass(frozen=True, eq=False)
class Bound:
    """A rule with its hyper-parameters: the whole of a rule-made transformation."""

    rule: Rule
    values: Mapping[str, Any]

    def __post_init__(self) -> None:
        switches_first = sorted(self.values, key=lambda k: k not in self.rule.static)  # ranges depend on them
        checked = {k: self.rule.check(k, self.values[k], self.values) for k in switches_first}
        object.__setattr__(self, "values", {k: checked[k] for k in self.values})

    @cached_property
    def counted(self) -> bool:
        """Whether the state has a counter of steps."""
        return self.rule.uses_first or self.uses_step

    @cached_property
    def uses_step(self) -> bool:
        """Whether the number of the step makes a difference."""
        alone = self.rule.takes_first and not self.rule.slots  # no entry of state tells whether a step is the first
        return self.rule.uses_step or alone or any(self.is_schedule(k) for k in self.values)

    def is_schedule(self, hyper: str) -> bool:
        """Whether a hyper-parameter is a function of the step."""
        value = self.values[hyper]
        return hyper not in self.rule.static and callable(value) and not isinstance(value, torch.Tensor)

    def is_scalar(self, hyper: str) -> bool:
        """Whether a hyper-parameter is a number that the kernel reads, as opposed to a switch."""
        return hyper not in self.rule.static and not is_static(self.values[hyper]) and not self.is_schedule(hyper)

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Key by which two are equal; tensors and functions count by identity."""
        return (
            id(self.rule),
            *((k, id(v) if isinstance(v, torch.Tensor) else (type(v), v)) for k, v in self.values.items()),
        )


def other_than_a_number(x: torch.Tensor) -> str:
    """The form of a tensor that holds no real number, for messages; empty for one that holds one."""
    if x.ndim:
        return f"a tensor of shape {tuple(x.shape)}"
    return "a complex tensor" if x.is_complex() else ""


def hint_of_members(x: torch.Tensor) -> str:
    """The end of a message about a tensor in the place of a number, for a caller who has one for each of many."""
    if x.ndim != 1:
        return ""
    return f"; to give each of {len(x)} members its own, map a function that takes one over it by `torch.vmap`"


def _is_schedule(value: Any) -> bool:
    """Whether a value that is no tensor counts as a function of the step; a class, such as `float`, does not."""
    return callable(value) and not isinstance(value, type)


def is_static(value: Any) -> bool:
    """Whether a hyper-parameter's value can only be a switch."""
    return value is None or isinstance(value, (bool, str, bytes, torch.dtype, tuple))
