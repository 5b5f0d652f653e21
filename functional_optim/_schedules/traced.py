"""Functions of the step that may be traced: those whose value depends on nothing that could change unseen.

A traced function runs once, with a symbol in place of the step, so everything else that it reads is read once. That
is right only if whatever it reads stays as it is, or if a change can be noticed. `traced_key` finds what a function
refers to in its code: globals, closure variables, defaults, attributes of modules, and the same of each function that
it calls. All of it must be of kinds whose value is a key or which cannot change.
"""

import builtins
import dis
import functools
import math
import numbers
import sys
from collections.abc import Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch

from .._compiler.ops import OPS
from .._compiler.rewrites import REWRITES
from .schedule import Identity, Schedule, ScheduleFactory


def traced_key(fn: Any) -> tuple[Any, ...] | None:
    """A key of all that a function of the step depends on besides the step; None if that cannot be known.

    A function with a key may be traced, and its trace holds for as long as the key compares equal. A function without
    one must be called at every step. The key keeps the objects that it compares by identity alive.

    A `Schedule` has the key of its formula and arguments; 0-d tensors among them count by identity, because kernels
    read them at every step. A plain function, or a `functools.partial` of one, has a key if everything that it refers
    to is a number, a string, None, a dtype, a tuple of such, a function of `math`, an operation of torch that rules
    may use, a builtin without side effects, a `Schedule` without tensors, or another function with a key. It has none
    if it writes to a variable or an attribute outside itself, imports, or handles exceptions. Other callables have
    none.

    Args:
      fn: the function.

    Returns:
      A hashable tuple, or None.

    Example:
      >>> rate = 0.1
      >>> def schedule(count):
      ...     return rate * 0.5**count
      >>> before = traced_key(schedule)
      >>> before == traced_key(schedule)
      True
      >>> table = [0.1, 0.2]
      >>> traced_key(lambda count: table[int(count)]) is None
      True
    """
    if not isinstance(fn, (Schedule, FunctionType, functools.partial)):
        return None
    try:
        return _KeyWalk().of(fn, live=True)
    except _NoKeyError:
        return None


def has_fixed_key(fn: Any) -> bool:
    """Whether the key of a function never changes: it is a schedule of this package, of numbers and such schedules.

    Example:
      >>> from functional_optim import constant_schedule, join_schedules
      >>> has_fixed_key(constant_schedule(0.1)), has_fixed_key(lambda count: 0.1)
      (True, False)
      >>> has_fixed_key(join_schedules([constant_schedule(0.1), lambda count: 0.1], [3]))
      False
    """
    if not isinstance(fn, Schedule) or not fn.factory.formula.__module__.startswith(__package__):
        return False
    return all(map(has_fixed_key, _functions(list(fn.arguments.values()))))


def calls_functions(fn: Any) -> bool:
    """Whether a schedule has members that are plain functions, which Python calls with numbers.

    Example:
      >>> from functional_optim import constant_schedule, join_schedules
      >>> calls_functions(join_schedules([constant_schedule(0.1), lambda count: 0.1], [3]))
      True
    """
    members = _functions(list(fn.arguments.values())) if isinstance(fn, Schedule) else []
    return any(not isinstance(member, Schedule) or calls_functions(member) for member in members)


def _functions(x: Any) -> list[Any]:
    """The functions within nested sequences and mappings."""
    if isinstance(x, Mapping):
        x = list(x.values())
    if isinstance(x, (list, tuple)):
        return [fn for each in x for fn in _functions(each)]
    return [x] if callable(x) and not isinstance(x, torch.Tensor) else []


class _NoKeyError(Exception):
    """An object that a function refers to may change unseen."""


_PURE = frozenset(
    (
        abs, bool, complex, divmod, enumerate, float, int, len, list, max, min, pow, range, reversed, round, slice,
        sorted, sum, tuple, zip,
    )
)  # fmt: skip
_OPERATIONS = frozenset(
    getattr(module, name)
    for module in (torch, torch.special, torch.nn.functional)
    for name in (*OPS, *REWRITES)
    if hasattr(module, name)
)
_OWN = __name__.partition(".")[0]


class _KeyWalk:
    """One walk over the objects that a function refers to."""

    def __init__(self) -> None:
        self.walking: list[FunctionType] = []

    def of(self, x: Any, live: bool = False, owned: bool = False) -> tuple[Any, ...]:
        """The key of one object.

        Args:
          x: the object.
          live: whether a kernel reads tensors at every step.
          owned: whether it belongs to a schedule, so that containers are nobody else's.

        Raises:
          _NoKeyError: the object has none.
        """
        if x is None or isinstance(x, (numbers.Number, str, bytes, torch.dtype)):
            return type(x), repr(x)  # repr tells 0.0 from -0.0, and is the same for every NaN
        if isinstance(x, tuple) or (owned and isinstance(x, list)):
            return type(x), *(self.of(y, live, owned) for y in x)
        if owned and isinstance(x, dict):
            return dict, *((self.of(k), self.of(v, live, owned)) for k, v in x.items())
        if live and isinstance(x, torch.Tensor):
            return torch.Tensor, Identity(x)
        if isinstance(x, Schedule):
            return self.of(x.factory), *((k, self.of(v, live, owned=True)) for k, v in x.arguments.items())
        if isinstance(x, ScheduleFactory):
            return Identity(x), self.of(x.formula)
        if isinstance(x, functools.partial):
            return functools.partial, self.of(x.func), self.of(x.args), self.names(x.keywords), self.names(vars(x))
        if isinstance(x, FunctionType):
            return self.function(x)
        if _is_constant(x):
            return (Identity(x),)
        raise _NoKeyError

    def names(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """The keys of objects that have names."""
        return tuple((name, self.of(x)) for name, x in values.items())

    def function(self, fn: FunctionType) -> tuple[Any, ...]:
        """The key of a plain function: its code, and the keys of all that it refers to."""
        module = sys.modules.get(fn.__module__ or "")
        if module is not None and module.__name__.partition(".")[0] == _OWN and vars(module) is fn.__globals__:
            return (Identity(fn),)  # functions of this package refer to nothing that changes
        if fn in self.walking:
            return ("recursion", self.walking.index(fn))
        self.walking.append(fn)
        refers = _refers(fn.__code__)
        if refers is None:
            raise _NoKeyError
        read = tuple(self.of(_look_up(fn, reference)) for reference in refers)
        defaults = self.of(fn.__defaults__), self.names(fn.__kwdefaults__ or {})
        attributes = self.names(vars(fn))
        self.walking.pop()
        return FunctionType, fn.__code__, read, defaults, attributes


def _is_constant(x: Any) -> bool:
    """Whether an object is a function or class whose results depend on its arguments alone."""
    try:
        if x in _PURE or x in _OPERATIONS:
            return True
    except TypeError:  # no hash
        return False
    if isinstance(x, BuiltinFunctionType):
        return x.__module__ == math.__name__ and getattr(math, x.__name__, None) is x
    return isinstance(x, type) and issubclass(x, BaseException) and x.__module__ == builtins.__name__


class _Reference(NamedTuple):
    """A name in a function's code that stands for something outside it.

    Args:
      name: the variable.
      closure: whether it is a closure variable, else a global.
      attributes: the attributes that are looked up in it, one in the other.
    """

    name: str
    closure: bool
    attributes: tuple[str, ...]


@functools.lru_cache(maxsize=1024)
def _refers(code: CodeType) -> tuple[_Reference, ...] | None:
    """Names that code refers to, with the code of functions inside it; None if it changes an outer variable."""
    found: dict[_Reference, None] = {}
    inside = [code]
    for one in inside:
        inside += [x for x in one.co_consts if isinstance(x, CodeType)]
        steps = [step for step in dis.get_instructions(one) if step.opname not in ("CACHE", "EXTENDED_ARG", "NOP")]
        for k, step in enumerate(steps):
            outer = step.argval in code.co_freevars
            hidden = step.opname in _ATTRIBUTES and step.argval.startswith("__")
            writes = step.opname in _WRITES or (step.opname in ("STORE_DEREF", "DELETE_DEREF") and outer)
            if hidden or writes or step.opname == _CATCHES:
                return None
            if step.opname not in _LOADS and not (step.opname in _LOADS_OUTER and outer):
                continue
            attributes = []
            for after in steps[k + 1 :]:
                if after.opname not in _ATTRIBUTES:
                    break
                attributes.append(after.argval)
            found[_Reference(step.argval, step.opname not in _LOADS, tuple(attributes))] = None
    return tuple(found)


_LOADS = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})
_LOADS_OUTER = frozenset({"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"})
_ATTRIBUTES = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_WRITES = frozenset(
    {"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_NAME", "STORE_ATTR", "DELETE_ATTR", "IMPORT_NAME", "LOAD_BUILD_CLASS"}
)
_CATCHES = "PUSH_EXC_INFO"  # with a handler, a function may treat a symbol otherwise than a number


def _look_up(fn: FunctionType, reference: _Reference) -> Any:
    """The object that a reference leads to: modules are passed through, and are no value by themselves."""
    x: Any
    try:
        if reference.closure:
            x = (fn.__closure__ or ())[fn.__code__.co_freevars.index(reference.name)].cell_contents
        elif reference.name in fn.__globals__:
            x = fn.__globals__[reference.name]
        else:
            x = getattr(builtins, reference.name)
        for attribute in reference.attributes:
            if not isinstance(x, ModuleType):
                break
            x = getattr(x, attribute)
    except (AttributeError, ValueError):  # the call will say so
        raise _NoKeyError from None
    return x
