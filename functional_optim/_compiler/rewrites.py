"""Functions of torch, in terms of the operations of the table."""

import math
from collections.abc import Callable
from typing import Any

import torch

from .names import WHOLE
from .program import Level
from .symbols import Recorder, Symbol


def _pow(t: Recorder, x: Any, y: Any) -> Any:
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


def _clamp(t: Recorder, x: Any, min: Any = None, max: Any = None) -> Any:
    x = x if min is None else t.op("maximum", x, min)
    return x if max is None else t.op("minimum", x, max)


def _where_op(t: Recorder, condition: Any, x: Any, y: Any) -> Any:
    if not isinstance(condition, (Symbol, torch.Tensor)):
        return x if condition else y
    return t.op("where", condition, x, y)


def _to(t: Recorder, x: Any, dtype: Any, **_: Any) -> Any:
    names = {torch.float32: "to_float32", torch.bfloat16: "to_bfloat16", torch.float16: "to_float16"}
    if isinstance(dtype, Symbol):
        return x
    if dtype is torch.float64:  # elements stay in the type that their leaf is computed in
        return x
    if dtype not in names:
        raise TypeError(f"{dtype} is not a floating dtype.")
    return t.op(names[dtype], x)


def _alpha(name: str) -> Callable[..., Any]:
    def rewrite(t: Recorder, x: Any, y: Any, alpha: Any = 1) -> Any:
        return t.op(name, x, y if isinstance(alpha, int) and alpha == 1 else t.op("mul", alpha, y))

    return rewrite


def _add(t: Recorder, x: Any, y: Any, alpha: Any = 1) -> Any:
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


def _round(t: Recorder, x: Any, *, decimals: int = 0) -> Any:
    if decimals:
        raise TypeError("it rounds to whole numbers: scale before and after, as in `torch.round(x * 10) / 10`.")
    return t.op("round", x)


def _fmod(t: Recorder, x: Any, y: Any) -> tuple[Symbol, Symbol]:
    """The remainder with the sign of `x`, and whether the one with the sign of `y` is another."""
    rest = t.op("fmod", x, y)
    differs = t.op("ne", t.op("lt", rest, 0.0), t.op("lt", y, 0.0))
    return rest, t.op("logical_and", t.op("ne", rest, 0.0), differs)


def _remainder(t: Recorder, x: Any, y: Any) -> Any:
    rest, differs = _fmod(t, x, y)
    return t.op("where", differs, t.op("add", rest, y), rest)


def _floor_divide(t: Recorder, x: Any, y: Any) -> Any:
    # a whole number but for rounding, so that x // y and x % y belong together
    rest, differs = _fmod(t, x, y)
    ratio = t.op("div", t.op("sub", x, rest), y)
    ratio = t.op("where", differs, t.op("sub", ratio, 1.0), ratio)
    down = t.op("floor", ratio)
    down = t.op("where", t.op("gt", t.op("sub", ratio, down), 0.5), t.op("add", down, 1.0), down)
    quotient = t.op("div", x, y)
    down = t.op("where", t.op("ne", ratio, 0.0), down, t.op("copysign", 0.0, quotient))
    return t.op("where", t.op("eq", y, 0.0), quotient, down)


def _xor(t: Recorder, x: Any, y: Any) -> Any:
    return t.op("ne", t.op("logical_not", x), t.op("logical_not", y))


def _relu(t: Recorder, x: Any, *, inplace: bool = False) -> Any:
    if inplace:
        raise TypeError("a rule returns new values: leave `inplace` out.")
    return t.op("where", t.op("le", x, 0.0), 0.0, x)


def _heaviside(t: Recorder, x: Any, values: Any) -> Any:
    return t.op("where", t.op("eq", x, 0.0), values, t.op("gt", x, 0.0))


def _logaddexp(t: Recorder, x: Any, y: Any) -> Any:
    most = t.op("maximum", x, y)
    sum_ = t.op("add", most, t.op("log1p", t.op("exp", t.op("neg", t.op("abs", t.op("sub", x, y))))))
    return t.op("where", t.op("eq", t.op("abs", most), math.inf), most, sum_)  # two infinities have no difference


def _divide(t: Recorder, x: Any, y: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode == "floor":
        return _floor_divide(t, x, y)
    quotient = t.op("div", x, y)
    return quotient if rounding_mode is None else t.op("trunc", quotient)


def _value(name: str) -> Callable[..., Any]:
    def rewrite(t: Recorder, s: Any, a: Any, b: Any, value: Any = 1.0) -> Any:
        return t.op(name, s, a, b, value)

    return rewrite


def _mean(t: Recorder, x: Any) -> Any:
    same = t.behind_broadcast(x)
    return t.op("div", t.reduce("leaf_sum", x), t.input("size")) if same is None else same


def _size(t: Recorder, x: Any) -> Any:
    if t.level(x) is not Level.ELEMENT:
        raise TypeError("it is one number, the same for every element: take the size of `u`.")
    return t.input("size")


def _vector_norm(t: Recorder, x: Any, ord: Any = 2) -> Any:
    if ord == 2:
        return t.op("sqrt", t.reduce("leaf_sum", t.op("mul", x, x)))
    if ord == 1:
        return t.reduce("leaf_sum", t.op("abs", x))
    if ord == math.inf:
        return t.reduce("leaf_amax", t.op("abs", x))
    raise TypeError("a norm of a leaf is of order 1, 2 or inf.")


def _norm(t: Recorder, x: Any, p: Any = "fro") -> Any:
    return _vector_norm(t, x, 2 if p in ("fro", None) else p)


def _of_leaf(rewrite: Callable[..., Any]) -> Callable[..., Any]:
    """A reduction, which refuses arguments of torch's that say along which dimension."""
    operands = rewrite.__code__.co_argcount - 1

    def reduction(
        t: Recorder, *args: Any, dim: Any = None, axis: Any = None, keepdim: bool = False, **named: Any
    ) -> Any:
        if len(args) > operands or any(x is not None for x in (dim, axis)) or keepdim:
            raise TypeError(f"it reduces along a dimension. {WHOLE}")
        named = {k: x for k, x in named.items() if x is not None}
        if "dtype" in named:
            raise TypeError("reductions are computed in double precision: leave `dtype` out.")
        return rewrite(t, *args, **named)

    return reduction


def _like(t: Recorder, x: Any, value: Any) -> Any:
    return t.broadcast(value) if t.level(x) is Level.ELEMENT else t.symbol(value)


def _nan_to_num(t: Recorder, x: Any, nan: float = 0.0, posinf: float | None = None, neginf: float | None = None) -> Any:
    if posinf is None or neginf is None:
        raise TypeError("the largest number depends on the leaf's dtype: give `posinf` and `neginf`.")
    x = t.op("where", t.op("ne", x, x), nan, x)
    x = t.op("where", t.op("eq", x, math.inf), posinf, x)
    return t.op("where", t.op("eq", x, -math.inf), neginf, x)


def _alias(name: str) -> Callable[..., Any]:
    return lambda t, *args: t.op(name, *args)


def _extremum(name: str) -> Callable[..., Any]:
    def rewrite(t: Recorder, x: Any, *others: Any, dim: Any = None, keepdim: bool = False) -> Any:
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
