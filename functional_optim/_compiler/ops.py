"""The operation table: one row per operation, one column per target.

A new operation is one new row. The C and Triton columns are format strings over the operands `{0}`, `{1}`,
`{2}`; `{f}` is the suffix of C's math functions (`f` in single precision), `{T}` the type computed in, and `{E}` the
type of the elements, which a uniform value is rounded to when they need it.
The eager column is the definition that the other columns are tested against; the foreach column names the
`torch._foreach_*` function that takes lists of tensors, where there is one.

Every row follows torch where NaN, signed zero and rounding are concerned: `maximum` propagates NaN, `sign(nan)`
is 0, and the compound operations round as torch's CPU kernels do (`lerp` and `addcmul` with one fused
multiply-add, `addcdiv` without).

Rows that begin with `fused_` are parts of Adam and SGD that torch's fused kernels round otherwise on a CPU and on CUDA:
the C column has the bits of the former, the Triton column those of the latter.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Op(NamedTuple):
    """One operation.

    Args:
      c: the C expression.
      triton: the Triton expression.
      eager: the operation on tensors.
      foreach: name of the function on lists of tensors, or `""`.
      boolean: whether the result is a truth value.
      logical: whether the operands are truth values; `"first"` if only the first one is.
      arity: number of operands, of which an expression may leave some out.
    """

    c: str
    triton: str
    eager: Callable[..., torch.Tensor]
    foreach: str = ""
    boolean: bool = False
    logical: bool | str = False
    arity: int = 1


def _sqrt(x: torch.Tensor) -> torch.Tensor:
    # roots in rules are of squares, where the derivative at 0 is that of a norm in torch: 0, not 0 / 0
    zero = x == 0
    return torch.where(zero, 0 * x, torch.sqrt(torch.where(zero, 1, x)))


def _rsqrt(x: torch.Tensor) -> torch.Tensor:
    # the derivative of `torch.rsqrt` has its third power, which vanishes in float32 where x is beyond 1e25
    return torch.reciprocal(torch.sqrt(x))


def _cbrt(x: torch.Tensor) -> torch.Tensor:
    return torch.sign(x) * torch.pow(torch.abs(x), 1 / 3)


OPS: dict[str, Op] = {
    "neg": Op("-{0}", "{0} * -1.0", torch.neg, "neg"),
    "abs": Op("fabs{f}({0})", "tl.abs({0})", torch.abs, "abs"),
    "sqrt": Op("sqrt{f}({0})", "_sqrt({0})", _sqrt, "sqrt"),
    "rsqrt": Op("1 / sqrt{f}({0})", "_div(1.0, _sqrt({0}))", _rsqrt, "rsqrt"),
    "cbrt": Op("cbrt{f}({0})", "libdevice.cbrt({0})", _cbrt),
    "exp": Op("exp{f}({0})", "libdevice.exp({0})", torch.exp, "exp"),
    "exp2": Op("exp2{f}({0})", "libdevice.exp2({0})", torch.exp2),
    "expm1": Op("expm1{f}({0})", "libdevice.expm1({0})", torch.expm1, "expm1"),
    "log": Op("log{f}({0})", "libdevice.log({0})", torch.log, "log"),
    "log2": Op("log2{f}({0})", "libdevice.log2({0})", torch.log2, "log2"),
    "log1p": Op("log1p{f}({0})", "libdevice.log1p({0})", torch.log1p, "log1p"),
    "log10": Op("log10{f}({0})", "libdevice.log10({0})", torch.log10, "log10"),
    "erf": Op("erf{f}({0})", "libdevice.erf({0})", torch.erf, "erf"),
    "sinh": Op("sinh{f}({0})", "libdevice.sinh({0})", torch.sinh, "sinh"),
    "cosh": Op("cosh{f}({0})", "libdevice.cosh({0})", torch.cosh, "cosh"),
    "tanh": Op("tanh{f}({0})", "libdevice.tanh({0})", torch.tanh, "tanh"),
    "sin": Op("sin{f}({0})", "libdevice.sin({0})", torch.sin, "sin"),
    "cos": Op("cos{f}({0})", "libdevice.cos({0})", torch.cos, "cos"),
    "tan": Op("tan{f}({0})", "libdevice.tan({0})", torch.tan, "tan"),
    "atan": Op("atan{f}({0})", "libdevice.atan({0})", torch.atan, "atan"),
    "atan2": Op("atan2{f}({0}, {1})", "libdevice.atan2({0}, {1})", torch.atan2, arity=2),
    "hypot": Op("hypot{f}({0}, {1})", "libdevice.hypot({0}, {1})", torch.hypot, arity=2),
    "floor": Op("floor{f}({0})", "libdevice.floor({0})", torch.floor, "floor"),
    "ceil": Op("ceil{f}({0})", "libdevice.ceil({0})", torch.ceil, "ceil"),
    "trunc": Op("trunc{f}({0})", "libdevice.trunc({0})", torch.trunc, "trunc"),
    "round": Op("rint{f}({0})", "libdevice.rint({0})", torch.round, "round"),
    "copysign": Op("copysign{f}({0}, {1})", "libdevice.copysign({0}, {1})", torch.copysign, arity=2),
    "fmod": Op("fmod{f}({0}, {1})", "libdevice.fmod({0}, {1})", torch.fmod, arity=2),
    "sign": Op("({T})(({0} > 0) - ({0} < 0))", "(({0} > 0).to({T}) - ({0} < 0).to({T}))", torch.sign, "sign"),
    "add": Op("{0} + {1}", "{0} + {1}", torch.add, "add", arity=2),
    "sub": Op("{0} - {1}", "{0} - {1}", torch.sub, "sub", arity=2),
    "mul": Op("{0} * {1}", "{0} * {1}", torch.mul, "mul", arity=2),
    "div": Op("{0} / {1}", "_div({0}, {1})", torch.div, "div", arity=2),
    "pow": Op("pow{f}({0}, {1})", "libdevice.pow({0}, {1})", torch.pow, arity=2),
    "maximum": Op(
        "(({0} > {1} || {0} != {0}) ? {0} : {1})",
        "tl.where({0} > {1}, {0}, tl.where({0} != {0}, {0}, {1}))",
        torch.maximum,
        "maximum",
        arity=2,
    ),
    "minimum": Op(
        "(({0} < {1} || {0} != {0}) ? {0} : {1})",
        "tl.where({0} < {1}, {0}, tl.where({0} != {0}, {0}, {1}))",
        torch.minimum,
        "minimum",
        arity=2,
    ),
    "gt": Op("{0} > {1}", "{0} > {1}", torch.gt, boolean=True, arity=2),
    "ge": Op("{0} >= {1}", "{0} >= {1}", torch.ge, boolean=True, arity=2),
    "lt": Op("{0} < {1}", "{0} < {1}", torch.lt, boolean=True, arity=2),
    "le": Op("{0} <= {1}", "{0} <= {1}", torch.le, boolean=True, arity=2),
    "eq": Op("{0} == {1}", "{0} == {1}", torch.eq, boolean=True, arity=2),
    "ne": Op("{0} != {1}", "{0} != {1}", torch.ne, boolean=True, arity=2),
    "isfinite": Op("{0} - {0} == 0", "{0} - {0} == 0", torch.isfinite, boolean=True),
    "logical_and": Op("{0} && {1}", "tl.where({0}, {1}, {0})", torch.logical_and, boolean=True, logical=True, arity=2),
    "logical_or": Op("{0} || {1}", "tl.where({0}, {0}, {1})", torch.logical_or, boolean=True, logical=True, arity=2),
    "logical_not": Op("!{0}", "({0}) == 0", torch.logical_not, boolean=True, logical=True),
    "where": Op("{0} ? {1} : {2}", "tl.where({0}, {1}, {2})", torch.where, logical="first", arity=3),
    # a uniform value as one per element, so that a reduction counts it once for each
    "broadcast": Op("{0}", "{0} + tl.zeros((BLOCK,), {T})", torch.clone),
    "real": Op("({T}){0}", "({0}).to({T})", torch.Tensor.to, logical=True),
    "lerp": Op(
        "fma{f}(fabs{f}({2}) < ({T})0.5 ? {2} : {2} - 1, {1} - {0}, fabs{f}({2}) < ({T})0.5 ? {0} : {1})",
        "libdevice.fma(tl.where(tl.abs({2}) < 0.5, {2}, {2} - 1), {1} - {0}, tl.where(tl.abs({2}) < 0.5, {0}, {1}))",
        torch.lerp,
        arity=3,
    ),
    "addcmul": Op(
        "fma{f}({3} * {1}, {2}, {0})",
        "libdevice.fma({3} * {1}, {2}, {0})",
        lambda s, a, b, v: torch.addcmul(s, v * a, b),
        arity=4,
    ),
    "addcdiv": Op(
        "{0} + ({3} * {1}) / {2}", "{0} + _div({3} * {1}, {2})", lambda s, a, b, v: torch.addcdiv(s, v * a, b), arity=4
    ),
    # of a moment, an update, the decay and 1 - decay
    "fused_mean": Op(
        "fma{f}(fabs{f}({3}) < ({T})0.5 ? {3} : {3} - 1, {1} - {0}, fabs{f}({3}) < ({T})0.5 ? {0} : {1})",
        "libdevice.fma({2}, {0}, libdevice.fma({2} * -1.0, {1}, {1}))",
        lambda m, u, b, c: torch.lerp(m, u, c),
        arity=4,
    ),
    "fused_mean_square": Op(
        "fma{f}({3} * {1}, {1}, {0} * {2})",
        "libdevice.fma({2}, {0}, libdevice.fma({2} * -1.0, {1} * {1}, {1} * {1}))",
        lambda m, u, b, c: torch.addcmul(m * b, c * u, u),
        arity=4,
    ),
    # of a decay and the number of steps; CUDA's own power in float32 differs from version to version, and is off by a
    # unit in half of all steps or in one of fifteen, so this one is rounded from double precision
    "fused_weight": Op(
        "1 - pow{f}({0}, {1})",
        "(1.0 - libdevice.pow(({0}).to({E}).to(tl.float64), ({1}).to(tl.float64)).to({E})).to({T})",
        lambda b, t: 1 - torch.pow(b, t),
        arity=2,
    ),
    # of a parameter, a rate and 1 - rate
    "fused_shrink": Op("{0} * {2}", "libdevice.fma({1} * -1.0, {0}, {0})", lambda p, r, c: p * c, arity=3),
    # of a number
    "fused_number": Op("{0}", "({0}).to({E}).to({T})", torch.clone),
    "to_float32": Op("({T})(float){0}", "({0}).to(tl.float32).to({T})", lambda x: x.float().to(x.dtype)),
    "to_bfloat16": Op(
        "({T})from_bf16(to_bf16({0}))", "_bf16({0}.to(tl.float32)).to({T})", lambda x: x.bfloat16().to(x.dtype)
    ),
    "to_float16": Op("({T})from_f16(to_f16({0}))", "({0}).to(tl.float16).to({T})", lambda x: x.half().to(x.dtype)),
}


class Reduction(NamedTuple):
    """A reduction of a per-element value to one number, over a leaf or over every leaf of a scope.

    Args:
      identity: the value of an empty reduction.
      eager: the reduction of one tensor, and of the stacked partial results.
    """

    identity: float
    eager: Callable[[torch.Tensor], torch.Tensor]


def _amax(x: torch.Tensor) -> torch.Tensor:
    return torch.amax(x) if x.numel() else x.new_full((), -torch.inf)


REDUCTIONS: dict[str, Reduction] = {
    "sum": Reduction(0.0, torch.sum),
    "amax": Reduction(-torch.inf, _amax),
}
