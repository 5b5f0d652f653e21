"""Symbols: they stand for tensors and numbers while a rule runs, and record operations through torch's own protocol.

That is `__torch_function__`, so a rule may use operators, methods and functions alike. An `if` on a symbol is refused
in the rule's own line, as is any other question about a number that only a kernel knows.
"""

import difflib
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

from .errors import RuleError, user_frame, where
from .names import PUBLIC, WHOLE, hint_for, listed
from .program import Level, Value


class Recorder(Protocol):
    """The tracer that symbols belong to, as they and rewrites of torch's functions see it; see `trace.Tracer`."""

    values: list[Value]

    def knows(self, name: str) -> bool:
        """Whether there is a function of a name."""

    def call(self, name: str, *args: Any, **kwargs: Any) -> "Symbol":
        """The result of a function that it knows."""

    def input(self, op: str, name: str = "") -> "Symbol":
        """Adds an input."""

    def symbol(self, x: Any) -> "Symbol":
        """Takes an operand."""

    def op(self, op: str, *args: Any) -> "Symbol":
        """Adds an operation of the table."""

    def reduce(self, kind: str, x: Any) -> "Symbol":
        """Adds a reduction."""

    def broadcast(self, x: Any) -> "Symbol":
        """Makes a value one per element."""

    def behind_broadcast(self, x: Any) -> "Symbol | None":
        """The uniform value that a value per element repeats."""

    def level(self, x: Any) -> Level:
        """The number of values that a symbol stands for."""


class Symbol:
    """Stands for a value of the program while a rule is traced."""

    __slots__ = ("index", "tracer")

    def __init__(self, tracer: Recorder, index: int) -> None:
        self.tracer = tracer
        self.index = index

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _record(func.__name__, *args, **(kwargs or {}))

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        """A function of NumPy as the operation of torch of that name; `np.float32(2) * u` is one, too."""
        name = {"power": "pow"}.get(ufunc.__name__, ufunc.__name__)
        if method != "__call__" or kwargs or any(getattr(x, "shape", ()) for x in args if not isinstance(x, Symbol)):
            raise self._refuse_array()
        return _record(name, *[x if isinstance(x, Symbol) or not hasattr(x, "item") else x.item() for x in args])

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise self._refuse_array()

    def _refuse_array(self) -> RuleError:
        return RuleError(
            f"{where()} makes an array of a traced value, as functions of NumPy do. Use torch's, such as "
            f"`torch.where(condition, a, b)`, or `leaf_sum` and its siblings for what depends on the whole leaf."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("shape", "dtype", "device", "ndim"):
            raise RuleError(
                f"{where()} reads `.{name}` of a traced value. A rule is written for one element of any leaf; "
                f"use `leaf_mean` and its siblings for what depends on the whole leaf, `leaf_size` for its number of "
                f"elements."
            )
        if not self.tracer.knows(name.strip("_")):
            _unknown(name)
        return functools.partial(_record, name, self)

    def _refuse(self, deed: str) -> RuleError:
        return RuleError(
            f"{where()} {deed}, which is only known when the kernel runs. Use `torch.where(condition, a, b)`, or "
            f"declare the hyper-parameter static if it is a switch: `@elementwise(static=(...,))`."
        )

    def __hash__(self) -> int:
        raise self._refuse("looks up a traced value")

    def __bool__(self) -> bool:
        line = getattr(user_frame(), "line", None) or ""
        called = dict.fromkeys(re.findall(r"(?<![\w.])(max|min)\(", line))
        if called:
            instead = " and ".join(f"`torch.{name}imum` for `{name}`" for name in called)
            raise RuleError(
                f"{where()} compares traced values, as Python's `max` and `min` do. Use torch's: {instead}, or "
                f"`torch.clamp` where one side is a number."
            )
        raise self._refuse("branches on a traced value")

    def __float__(self) -> float:
        line = getattr(user_frame(), "line", None) or ""
        functions = [name for name in re.findall(r"\bmath\.(\w+)", line) if name in PUBLIC]
        if not functions:
            raise self._refuse("takes the number behind a traced value")
        instead = ", ".join(f"`torch.{name}` for `math.{name}`" for name in dict.fromkeys(functions))
        raise RuleError(
            f"{where()} takes the number behind a traced value, as functions of `math` do. Use torch's: {instead}."
        )

    __int__ = __index__ = __float__

    def __iter__(self) -> Any:
        raise RuleError(f"{where()} iterates over a traced value. {WHOLE}")

    def __len__(self) -> int:
        raise RuleError(
            f"{where()} takes the length of a traced value. Use `leaf_size` for its number of elements. "
            f"`torch.as_tensor` asks for it, too; leave that out: operations of torch take a traced number as it is."
        )

    def __divmod__(self, other: Any) -> Any:
        raise RuleError(f"{where()} uses `divmod`, which torch has not: write `x // y` and `x % y`.")

    __rdivmod__ = __divmod__

    def __getitem__(self, key: Any) -> Any:
        raise RuleError(f"{where()} indexes a traced value. {WHOLE}")

    def __setitem__(self, key: Any, value: Any) -> None:
        raise RuleError(f"{where()} writes to an element of a traced value. {WHOLE}")

    def __repr__(self) -> str:
        return f"<%{self.index} = {self.tracer.values[self.index]}>"


def _operator(name: str, reverse: bool) -> Callable[..., Any]:
    def method(self: Symbol, *others: Any) -> Any:
        return _record(name, *others, self) if reverse else _record(name, self, *others)

    return method


for _name in ("add", "sub", "mul", "truediv", "pow", "mod", "floordiv", "and", "or", "xor", "matmul"):
    setattr(Symbol, f"__{_name}__", _operator(_name, reverse=False))
    setattr(Symbol, f"__r{_name}__", _operator(_name, reverse=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "abs", "invert", "pos", "round", "floor", "ceil", "trunc"):
    setattr(Symbol, f"__{_name}__", _operator(_name, reverse=False))


def _unknown(name: str) -> NoReturn:
    near = [x for x in difflib.get_close_matches(name, PUBLIC) if x != name]
    nearest = f"Near to it: {', '.join(near)}. " if near else ""
    help_ = hint_for(name) or f"{nearest}A rule can use: {listed()}; see docs/rules.md."
    raise RuleError(f"{where()} uses `{name}`, which has no row in the operation table. {help_}")


def _record(name: str, *args: Any, **kwargs: Any) -> "Symbol":
    tracer = next((a.tracer for a in (*args, *kwargs.values()) if isinstance(a, Symbol)), None)
    if name.endswith("_") and not name.endswith("__"):
        raise RuleError(f"{where()} uses `{name}`, which writes in place; a rule returns new values: `x = x * 2`.")
    name = name.strip("_").removeprefix("special_")  # torch.special.erf is called special_erf
    if tracer is None or not tracer.knows(name):
        _unknown(name)
    try:
        return tracer.call(name, *args, **kwargs)
    except TypeError as error:
        if isinstance(error, RuleError):
            raise
        reason = re.sub(r"^\S+\(\) ", "it ", str(error))  # Python begins with a name of this module
        raise RuleError(f"{where()} calls `{name}` in a form that has no kernel: {reason}") from None
