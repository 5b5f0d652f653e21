"""From rules, plain Python functions of one leaf, to a `Program`.

A rule is called with symbols in place of tensors. A symbol records what is done to it through torch's own
override protocol (`__torch_function__`), so a rule may use operators, methods and functions alike. Equal values
are recorded once. Python control flow runs while tracing: an `if` on a flag specialises the program, and an `if`
on a symbol is refused in the rule's own line.
"""

import difflib
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch

from .errors import (
    RuleError,
    ShortTracebacks as ShortTracebacks,
    user_frame,
    where,
)
from .names import PUBLIC, WHOLE, hint_for, listed
from .ops import OPS
from .program import INPUTS, Level, Output, Program, Value


class Symbol:
    """Stands for a value of the program while a rule is traced."""

    __slots__ = ("index", "tracer")

    def __init__(self, tracer: "Tracer", index: int) -> None:
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
        if name.strip("_") not in {*REWRITES, *OPS}:
            _unknown(name)
        return functools.partial(_record, name, self)

    def _refuse(self, what: str) -> RuleError:
        return RuleError(
            f"{where()} {what}, which is only known when the kernel runs. Use `torch.where(condition, a, b)`, or "
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
    if tracer is None or (name not in REWRITES and name not in OPS):
        _unknown(name)
    try:
        if name in REWRITES:
            result: Symbol = REWRITES[name](tracer, *args, **kwargs)
            return result
        return tracer.op(name, *args, **kwargs)
    except TypeError as error:
        if isinstance(error, RuleError):
            raise
        reason = re.sub(r"^\S+\(\) ", "it ", str(error))  # Python begins with a name of this module
        raise RuleError(f"{where()} calls `{name}` in a form that has no kernel: {reason}") from None


class Tracer:
    """Collects the values of one program.

    Args:
      stages: the earliest stage of tree reductions, by scope: a reduction ends when the last leaf has had its part.

    Example:
      >>> tracer = Tracer()
      >>> program = tracer.finish({"updates": 2 * tracer.input("array", "u")})
      >>> print(program)
      %0 = array u
      %1 = 2.0
      %2 = mul(%1, %0)
      updates <- %2
    """

    def __init__(self, stages: Mapping[str, int] | None = None) -> None:
        self.values: list[Value] = []
        self.index: dict[Value, int] = {}
        self.stages = stages or {}
        self.captured: dict[str, torch.Tensor] = {}  # tensors of one number that a rule refers to, read at every step
        self.scope = ""
        self.reduced: dict[str, int] = {}  # number of tree reductions in each scope

    def add(self, value: Value) -> Symbol:
        if value not in self.index:
            self.index[value] = len(self.values)
            self.values.append(value)
        return Symbol(self, self.index[value])

    def input(self, op: str, name: str = "") -> Symbol:
        """Adds an input: `"array"`, `"leaf"`, `"scalar"` or `"size"`."""
        return self.add(Value(op, name=name, level=INPUTS[op]))

    def symbol(self, x: Any) -> Symbol:
        """Takes an operand: a symbol, a number, or a tensor that holds one number."""
        if isinstance(x, Symbol):
            if x.tracer is not self:
                raise RuleError(f"{where()} uses a value of another trace.")
            return x
        if isinstance(x, torch.Tensor):
            if x.ndim:
                raise RuleError(
                    f"{where()} uses a tensor of shape {tuple(x.shape)} that is not an argument of the rule. "
                    f"Declare it as state, or pass it as a hyper-parameter."
                )
            name = next((k for k, y in self.captured.items() if y is x), f"captured.{len(self.captured)}")
            self.captured[name] = x
            return self.input("scalar", name)
        if not isinstance(x, (bool, int, float)):
            raise RuleError(f"{where()} uses {x!r} as a number.")
        # repr tells -0.0 from 0.0 and one NaN from another, which == does not
        return self.add(Value("const", name=repr(float(x)), const=float(x)))

    def op(self, op: str, *args: Any) -> Symbol:
        """Adds an operation of the table."""
        row = OPS[op]
        if len(args) != row.arity:
            raise TypeError(f"it takes {row.arity} operands, got {len(args)}.")
        if op in ("mul", "div"):
            op, args = self.gather_factors(op, *args)
        if op in ("add", "mul") and all(isinstance(a, Symbol) and self.values[a.index].boolean for a in args):
            return self.op("logical_or" if op == "add" else "logical_and", *args)  # as torch does with bools
        symbols = []
        for k, arg in enumerate(args):
            x = self.symbol(arg)
            wants_truth = row.logical is True or (row.logical == "first" and k == 0)
            is_truth = self.values[x.index].boolean
            if wants_truth and not is_truth:
                x = self.op("ne", x, 0.0)
            elif is_truth and not wants_truth:
                x = self.op("real", x)
            symbols.append(x)
        operands = [self.values[x.index] for x in symbols]
        return self.add(
            Value(
                op,
                tuple(x.index for x in symbols),
                level=max(v.level for v in operands),
                stage=max(v.stage for v in operands),
                boolean=row.boolean,
            )
        )

    def gather_factors(self, op: str, x: Any, y: Any) -> tuple[str, tuple[Any, Any]]:
        """An operation with numbers that follow from reductions taken together: (x * a) * b as x * (a * b).

        Otherwise each clip of a chain would compute the products of all before it, in every pass; and x * a could
        leave the range that x and the result are in.
        """
        element, factor = (y, x) if op == "mul" and self.follows(x) else (x, y)
        if not self.follows(factor) or not isinstance(element, Symbol):
            return op, (x, y)
        inner = self.values[element.index]
        a, b = [Symbol(self, i) for i in inner.args] if inner.op in ("mul", "div") else (None, None)
        if inner.op == "mul" and self.follows(a):
            a, b = b, a
        if a is None or not self.follows(b) or self.values[a.index].uniform:
            return op, (x, y)
        if inner.op == "mul":
            return "mul", (a, self.op(op, b, factor))
        return (op, (a, self.op("mul", b, factor))) if op == "div" else (op, (a, self.op("div", factor, b)))

    def follows(self, x: Any) -> bool:
        """Whether a value is a number that follows from a reduction."""
        return isinstance(x, Symbol) and self.values[x.index].uniform and self.values[x.index].stage > 0

    def spread(self, x: Any) -> Symbol:
        """Makes a value one per element, so that later operations may reduce it."""
        y = self.symbol(x)
        y = self.op("real", y) if self.values[y.index].boolean else y
        value = self.values[y.index]
        if value.level is Level.ELEMENT:
            return y
        return self.add(Value("spread", (y.index,), level=Level.ELEMENT, stage=value.stage))

    def level(self, x: Any) -> Level:
        """The number of values that a symbol stands for: per row, per leaf, or per element."""
        return self.values[self.symbol(x).index].level

    def behind_spread(self, x: Any) -> Symbol | None:
        """The uniform value that a value per element repeats, if it is known to."""
        value = self.values[self.symbol(x).index]
        return Symbol(self, value.args[0]) if value.op == "spread" else None

    def reduce(self, kind: str, x: Any) -> Symbol:
        """Adds a reduction; `kind` is `"leaf_"` or `"tree_"` and a row of `REDUCTIONS`."""
        x = self.symbol(x)
        same = self.behind_spread(x)
        if same is not None and kind.startswith("leaf_"):  # needs no pass
            return self.op("mul", self.input("size"), same) if kind == "leaf_sum" else same
        if self.values[x.index].boolean:
            x = self.op("real", x)
        value = self.values[x.index]
        if value.level is not Level.ELEMENT:
            raise RuleError(f"{where()} reduces a value that is the same for every element.")
        tree, scope = kind.startswith("tree_"), ""
        if tree:
            # leaves with other rules meet in the same scope, so reductions are numbered in the order of their calls
            number = self.reduced.get(self.scope, 0)
            self.reduced[self.scope] = number + 1
            scope = f"{self.scope}.{number}" if number else self.scope
        return self.add(
            Value(
                kind,
                (x.index,),
                name=scope,
                level=Level.ROW if tree else Level.LEAF,
                stage=max(self.values[x.index].stage + 1, self.stages.get(scope, 0)),
            )
        )

    def finish(self, outputs: Mapping[str, Any], per_leaf: frozenset[str] = frozenset()) -> Program:
        """Closes the program over its outputs, dropping values that none of them needs."""
        symbols: dict[str, Symbol] = {}
        for name, x in outputs.items():
            y = self.symbol(x)
            if self.values[y.index].boolean:
                y = self.op("real", y)
            if name in per_leaf and self.values[y.index].level is Level.ELEMENT:
                raise RuleError(
                    f"The new value of `{name}` differs per element, but its slot holds one number per leaf."
                )
            symbols[name] = y
        needed: set[int] = set()
        stack = [x.index for x in symbols.values()]
        # other leaves wait for this one's part in a reduction, whether or not this one wants the result
        stack += [i for i, v in enumerate(self.values) if v.op.startswith("tree_")]
        while stack:
            i = stack.pop()
            if i not in needed:
                needed.add(i)
                stack.extend(self.values[i].args)
        new = {old: k for k, old in enumerate(sorted(needed))}
        values = tuple(
            Value(v.op, tuple(new[a] for a in v.args), v.name, v.const, v.level, v.stage, v.boolean)
            for v in (self.values[old] for old in new)
        )
        return Program(
            values,
            tuple(
                Output(name, new[x.index], Level.LEAF if name in per_leaf else Level.ELEMENT)
                for name, x in symbols.items()
            ),
        )


def _pow(t: Tracer, x: Any, y: Any) -> Any:
    # torch's own special cases, which round differently from a general power
    if not isinstance(y, Symbol):
        special: dict[float, Callable[[], Any]] = {
            1: lambda: t.symbol(x),
            2: lambda: t.op("mul", x, x),
            3: lambda: t.op("mul", t.op("mul", x, x), x),
            0.5: lambda: t.op("sqrt", x),
            -0.5: lambda: t.op("rsqrt", x),
            -1: lambda: t.op("div", 1.0, x),
            -2: lambda: t.op("div", 1.0, t.op("mul", x, x)),
        }
        if float(y) in special:
            return special[float(y)]()
    return t.op("pow", x, y)


def _clamp(t: Tracer, x: Any, min: Any = None, max: Any = None) -> Any:
    x = x if min is None else t.op("maximum", x, min)
    return x if max is None else t.op("minimum", x, max)


def _where_op(t: Tracer, condition: Any, x: Any, y: Any) -> Any:
    if not isinstance(condition, (Symbol, torch.Tensor)):
        return x if condition else y
    return t.op("where", condition, x, y)


def _to(t: Tracer, x: Any, dtype: Any, **_: Any) -> Any:
    names = {torch.float32: "to_float32", torch.bfloat16: "to_bfloat16", torch.float16: "to_float16"}
    if isinstance(dtype, Symbol):
        return x
    if dtype is torch.float64:  # elements stay in the type that their leaf is computed in
        return x
    if dtype not in names:
        raise TypeError(f"{dtype} is not a floating dtype.")
    return t.op(names[dtype], x)


def _alpha(name: str) -> Callable[..., Any]:
    def rewrite(t: Tracer, x: Any, y: Any, alpha: Any = 1) -> Any:
        return t.op(name, x, y if isinstance(alpha, int) and alpha == 1 else t.op("mul", alpha, y))

    return rewrite


def _add(t: Tracer, x: Any, y: Any, alpha: Any = 1) -> Any:
    # a rule that computes the new parameter returns `new - p`; adding that to `p` would round twice
    if isinstance(alpha, int) and alpha == 1 and isinstance(x, Symbol) and isinstance(y, Symbol):
        for a, b in ((x, y), (y, x)):
            parameter, update = t.values[a.index], t.values[b.index]
            if (
                (parameter.op, parameter.name) == ("array", "params")
                and update.op == "sub"
                and update.args[1] == a.index
            ):
                return Symbol(t, update.args[0])
    return _alpha("add")(t, x, y, alpha)


def _round(t: Tracer, x: Any, *, decimals: int = 0) -> Any:
    if decimals:
        raise TypeError("it rounds to whole numbers: scale before and after, as in `torch.round(x * 10) / 10`.")
    return t.op("round", x)


def _fmod(t: Tracer, x: Any, y: Any) -> tuple[Symbol, Symbol]:
    """The remainder with the sign of `x`, and whether the one with the sign of `y` is another."""
    rest = t.op("fmod", x, y)
    differs = t.op("ne", t.op("lt", rest, 0.0), t.op("lt", y, 0.0))
    return rest, t.op("logical_and", t.op("ne", rest, 0.0), differs)


def _remainder(t: Tracer, x: Any, y: Any) -> Any:
    rest, differs = _fmod(t, x, y)
    return t.op("where", differs, t.op("add", rest, y), rest)


def _floor_divide(t: Tracer, x: Any, y: Any) -> Any:
    # a whole number but for rounding, so that x // y and x % y belong together
    rest, differs = _fmod(t, x, y)
    ratio = t.op("div", t.op("sub", x, rest), y)
    ratio = t.op("where", differs, t.op("sub", ratio, 1.0), ratio)
    down = t.op("floor", ratio)
    down = t.op("where", t.op("gt", t.op("sub", ratio, down), 0.5), t.op("add", down, 1.0), down)
    quotient = t.op("div", x, y)
    down = t.op("where", t.op("ne", ratio, 0.0), down, t.op("copysign", 0.0, quotient))
    return t.op("where", t.op("eq", y, 0.0), quotient, down)


def _xor(t: Tracer, x: Any, y: Any) -> Any:
    return t.op("ne", t.op("logical_not", x), t.op("logical_not", y))


def _relu(t: Tracer, x: Any, *, inplace: bool = False) -> Any:
    if inplace:
        raise TypeError("a rule returns new values: leave `inplace` out.")
    return t.op("where", t.op("le", x, 0.0), 0.0, x)


def _heaviside(t: Tracer, x: Any, values: Any) -> Any:
    return t.op("where", t.op("eq", x, 0.0), values, t.op("gt", x, 0.0))


def _logaddexp(t: Tracer, x: Any, y: Any) -> Any:
    most = t.op("maximum", x, y)
    sum_ = t.op("add", most, t.op("log1p", t.op("exp", t.op("neg", t.op("abs", t.op("sub", x, y))))))
    return t.op("where", t.op("eq", t.op("abs", most), math.inf), most, sum_)  # two infinities have no difference


def _divide(t: Tracer, x: Any, y: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode == "floor":
        return _floor_divide(t, x, y)
    quotient = t.op("div", x, y)
    return quotient if rounding_mode is None else t.op("trunc", quotient)


def _value(name: str) -> Callable[..., Any]:
    def rewrite(t: Tracer, s: Any, a: Any, b: Any, value: Any = 1.0) -> Any:
        return t.op(name, s, a, b, value)

    return rewrite


def _mean(t: Tracer, x: Any) -> Any:
    same = t.behind_spread(x)
    return t.op("div", t.reduce("leaf_sum", x), t.input("size")) if same is None else same


def _size(t: Tracer, x: Any) -> Any:
    if t.level(x) is not Level.ELEMENT:
        raise TypeError("it is one number, the same for every element: take the size of `u`.")
    return t.input("size")


def _vector_norm(t: Tracer, x: Any, ord: Any = 2) -> Any:
    if ord == 2:
        return t.op("sqrt", t.reduce("leaf_sum", t.op("mul", x, x)))
    if ord == 1:
        return t.reduce("leaf_sum", t.op("abs", x))
    if ord == math.inf:
        return t.reduce("leaf_amax", t.op("abs", x))
    raise TypeError("a norm of a leaf is of order 1, 2 or inf.")


def _norm(t: Tracer, x: Any, p: Any = "fro") -> Any:
    return _vector_norm(t, x, 2 if p in ("fro", None) else p)


def _of_leaf(rewrite: Callable[..., Any]) -> Callable[..., Any]:
    """A reduction, which refuses arguments of torch's that say along which dimension."""
    operands = rewrite.__code__.co_argcount - 1

    def reduction(t: Tracer, *args: Any, dim: Any = None, axis: Any = None, keepdim: bool = False, **named: Any) -> Any:
        if len(args) > operands or any(x is not None for x in (dim, axis)) or keepdim:
            raise TypeError(f"it reduces along a dimension. {WHOLE}")
        named = {k: x for k, x in named.items() if x is not None}
        if "dtype" in named:
            raise TypeError("reductions are computed in double precision: leave `dtype` out.")
        return rewrite(t, *args, **named)

    return reduction


def _like(t: Tracer, x: Any, value: Any) -> Any:
    return t.spread(value) if t.level(x) is Level.ELEMENT else t.symbol(value)


def _nan_to_num(t: Tracer, x: Any, nan: float = 0.0, posinf: float | None = None, neginf: float | None = None) -> Any:
    if posinf is None or neginf is None:
        raise TypeError("the largest number depends on the leaf's dtype: give `posinf` and `neginf`.")
    x = t.op("where", t.op("ne", x, x), nan, x)
    x = t.op("where", t.op("eq", x, math.inf), posinf, x)
    return t.op("where", t.op("eq", x, -math.inf), neginf, x)


def _alias(name: str) -> Callable[..., Any]:
    return lambda t, *args: t.op(name, *args)


def _extremum(name: str) -> Callable[..., Any]:
    def rewrite(t: Tracer, x: Any, *others: Any, dim: Any = None, keepdim: bool = False) -> Any:
        if dim is not None or keepdim:
            raise TypeError(f"it reduces along a dimension. {WHOLE}")
        if not others:
            x = x if name == "maximum" else t.op("neg", x)
            y = t.reduce("leaf_amax", x)
            return y if name == "maximum" else t.op("neg", y)
        if len(others) > 1 or not isinstance(others[0], (Symbol, torch.Tensor)):
            raise TypeError(f"it reduces along a dimension. {WHOLE}")
        return t.op(name, x, others[0])

    return rewrite


# Names of torch and Python that are not rows of the table, in terms of its rows.
REWRITES: dict[str, Callable[..., Any]] = {
    "add": _add,
    "sub": _alpha("sub"),
    "rsub": lambda t, x, y, alpha=1: _alpha("sub")(t, y, x, alpha),
    "subtract": _alpha("sub"),
    "multiply": _alias("mul"),
    "truediv": _alias("div"),
    "div": _divide,
    "divide": _divide,
    "true_divide": _alias("div"),
    "rdiv": lambda t, x, y: t.op("div", y, x),
    "rtruediv": lambda t, x, y: t.op("div", y, x),
    "rmul": _alias("mul"),
    "radd": _add,
    "pow": _pow,
    "rpow": lambda t, x, y: _pow(t, y, x),
    "float_power": _pow,
    "square": lambda t, x: t.op("mul", x, x),
    "reciprocal": lambda t, x: t.op("div", 1.0, x),
    "sigmoid": lambda t, x: t.op("div", 1.0, t.op("add", 1.0, t.op("exp", t.op("neg", x)))),
    "mod": _remainder,
    "remainder": _remainder,
    "floordiv": _floor_divide,
    "floor_divide": _floor_divide,
    "round": _round,
    "fix": _alias("trunc"),
    "frac": lambda t, x: t.op("sub", x, t.op("trunc", x)),
    "relu": _relu,
    "heaviside": _heaviside,
    "sgn": _alias("sign"),
    "logaddexp": _logaddexp,
    "arctan": _alias("atan"),
    "arctan2": _alias("atan2"),
    "negative": _alias("neg"),
    "absolute": _alias("abs"),
    "pos": lambda t, x: t.symbol(x),
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": lambda t, x, min: _clamp(t, x, min=min),
    "clamp_max": lambda t, x, max: _clamp(t, x, max=max),
    "max": _extremum("maximum"),
    "min": _extremum("minimum"),
    "amax": _of_leaf(lambda t, x: t.reduce("leaf_amax", x)),
    "amin": _of_leaf(lambda t, x: t.op("neg", t.reduce("leaf_amax", t.op("neg", x)))),
    "sum": _of_leaf(lambda t, x: t.reduce("leaf_sum", x)),
    "mean": _of_leaf(_mean),
    "norm": _of_leaf(_norm),
    "linalg_vector_norm": _of_leaf(_vector_norm),
    "vector_norm": _of_leaf(_vector_norm),
    "numel": lambda t, x: _size(t, x) if t.level(x) is Level.ELEMENT else 1,
    "leaf_sum": lambda t, x: t.reduce("leaf_sum", x),
    "leaf_amax": lambda t, x: t.reduce("leaf_amax", x),
    "leaf_mean": _mean,
    "leaf_norm": _vector_norm,
    "leaf_size": _size,
    "tree_sum": lambda t, x: t.reduce("tree_sum", x),
    "tree_norm": lambda t, x: t.op("sqrt", t.reduce("tree_sum", t.op("mul", x, x))),
    "tree_amax": lambda t, x: t.reduce("tree_amax", x),
    "greater": _alias("gt"),
    "greater_equal": _alias("ge"),
    "less": _alias("lt"),
    "less_equal": _alias("le"),
    "not_equal": _alias("ne"),
    "isnan": lambda t, x: t.op("ne", x, x),
    "isinf": lambda t, x: t.op("eq", t.op("abs", x), math.inf),
    "nan_to_num": _nan_to_num,
    "xor": _xor,
    "logical_xor": _xor,
    "bitwise_xor": _xor,
    "and": _alias("logical_and"),
    "or": _alias("logical_or"),
    "bitwise_and": _alias("logical_and"),
    "bitwise_or": _alias("logical_or"),
    "invert": _alias("logical_not"),
    "bitwise_not": _alias("logical_not"),
    "where": _where_op,
    "masked_fill": lambda t, x, mask, value: t.op("where", mask, value, x),
    "addcmul": _value("addcmul"),
    "addcdiv": _value("addcdiv"),
    "real": lambda t, x: t.symbol(x),
    "to": _to,
    "type_as": lambda t, x, other: x,
    "float": lambda t, x: _to(t, x, torch.float32),
    "double": lambda t, x: _to(t, x, torch.float64),
    "bfloat16": lambda t, x: _to(t, x, torch.bfloat16),
    "half": lambda t, x: _to(t, x, torch.float16),
    "detach": lambda t, x: x,
    "clone": lambda t, x: x,
    "zeros_like": lambda t, x: _like(t, x, 0.0),
    "ones_like": lambda t, x: _like(t, x, 1.0),
    "full_like": _like,
}
