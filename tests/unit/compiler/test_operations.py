"""Every operation that a rule may use, on every backend, against torch itself.

A case is a function that a rule could contain. It is called twice: with symbols, which makes a program that a backend
runs, and with tensors, which is what torch computes. Results are compared as integers that count floating-point
numbers, so a tolerance of 3 is 3 units in the last place (ulp), NaN equals NaN, and -0.0 differs from 0.0 by one.
"""

import ctypes
import functools
import math
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch

import functional_optim as fo
from _lib.floats import fma
from _lib.marks import INTERPRETER
from _lib.programs import device_of, run_program
from functional_optim._compiler import trace
from functional_optim._compiler.c.build import find_compiler
from functional_optim._compiler.c.emit import prelude
from functional_optim._compiler.functions import fused_mean, fused_mean_square, fused_number, fused_shrink
from functional_optim._compiler.ops import OPS
from functional_optim._runtime.backend import BACKENDS, try_again


F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
INF, NAN = math.inf, math.nan


# -- cases --------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """An expression that a rule may contain.

    Args:
      arity: how many operands it takes.
      of: the expression, on symbols and on tensors alike.
      kind: which row of `ULPS` bounds its error.
      torch: the expression on tensors, where torch writes it otherwise or has no name for it.
      any_zero: whether the sign of a zero is left open.
    """

    arity: int
    of: Callable[..., Any]
    kind: str = "exact"
    torch: Callable[..., Any] | None = None
    any_zero: bool = False


# The ulp that a backend may differ from torch by, for (float32, float64): its own error plus torch's, rounded up.
#
# torch's vector functions (SLEEF and MKL) are within 1 ulp, and so is its square root. The C library is within 1, or
# 2 for `tanh` and `log1p`. The reference and foreach call torch itself, but on lists and scalars, where torch may take
# another path: 1 + 1. libdevice is within 4 in float32 (`pow`, `tan`) and 2 in float64, by the tables of the CUDA
# programming guide; NumPy, which stands in for it in Triton's interpreter, is within 4 and 1.
ULPS: dict[str, dict[str, tuple[int, int]]] = {
    "exact": {"torch": (0, 0), "c": (0, 0), "triton": (0, 0)},
    # C and Triton round correctly
    "sqrt": {"torch": (1, 1), "c": (1, 1), "triton": (1, 1)},
    # the square root's error passes into the quotient, which rounds once more on either side
    "rsqrt": {"torch": (2, 2), "c": (2, 2), "triton": (2, 2)},
    "library": {"torch": (2, 2), "c": (2, 2), "triton": (5, 3)},
    "tanh": {"torch": (2, 2), "c": (3, 3), "triton": (5, 3)},
    "expm1": {"torch": (2, 2), "c": (3, 3), "triton": (5, 3)},
    "pow": {"torch": (2, 2), "c": (2, 2), "triton": (5, 3)},
    # the reference raises x to a third that is off by 1e-8 in float32 and by 1.9e-17 in float64, which makes a factor
    # of exp(1e-8 * log(x)): with log(x) up to 89 and 710, an error of 15 * 2**-24 and of 118 * 2**-53, so of as many
    # ulp, and the power's own; the C library's cube root in float64 is within 4
    "cbrt": {"torch": (17, 120), "c": (2, 5), "triton": (2, 2)},
    "composed": {"torch": (2, 2), "c": (2, 2), "triton": (5, 3)},
    "atan": {"torch": (2, 2), "c": (2, 2), "triton": (5, 3)},
    "sinh": {"torch": (2, 2), "c": (2, 2), "triton": (5, 3)},
    # the logarithm, up to log(2), cancels the larger operand: the errors of numbers around 1/2, 1 + 1 ulp on either
    # side, in results down to 0.01 among these operands; in Triton log1p has the error that it has above
    "logaddexp": {"torch": (2**8, 2**8), "c": (2**8, 2**8), "triton": (2**8, 2**18)},
    # 1 / (1 + exp(-x)): the exponential's error, then a sum and a quotient that round, on either side
    "sigmoid": {"torch": (4, 4), "c": (4, 4), "triton": (7, 4)},
}


def _cbrt(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(numpy.cbrt(x.numpy().astype(numpy.longdouble)).astype(numpy.float64))


def _floor_divide(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """torch's, with NaN where its vector code has no remainder because the quotient overflows."""
    return torch.where(torch.fmod(x, y).isnan() & (y != 0), NAN, torch.floor_divide(x, y))


ARITHMETIC = {
    "neg": Case(1, lambda x: -x),
    "abs": Case(1, abs),
    "add": Case(2, lambda x, y: x + y),
    "sub": Case(2, lambda x, y: x - y),
    "mul": Case(2, lambda x, y: x * y),
    "div": Case(2, torch.div),
    "floor": Case(1, torch.floor),
    "ceil": Case(1, torch.ceil),
    "trunc": Case(1, torch.trunc),
    "round": Case(1, torch.round),
    "copysign": Case(2, torch.copysign),
    "fmod": Case(2, torch.fmod),
    "remainder": Case(2, torch.remainder),
    "sign": Case(1, torch.sign),
    # torch leaves open which of 0.0 and -0.0 is larger
    "maximum": Case(2, torch.maximum, any_zero=True),
    "minimum": Case(2, torch.minimum, any_zero=True),
    # torch's vector and scalar code disagree on the sign of a zero
    "lerp": Case(3, lambda x, y, z: torch.lerp(x, y, z), any_zero=True),
    "addcmul": Case(
        4, lambda x, y, z, w: torch.addcmul(x, y, z, value=w), torch=lambda x, y, z, w: x.addcmul(w * y, z)
    ),
    "addcdiv": Case(
        4, lambda x, y, z, w: torch.addcdiv(x, y, z, value=w), torch=lambda x, y, z, w: x.addcdiv(w * y, z)
    ),
    "fused_mean": Case(4, fused_mean, any_zero=True),
    "fused_mean_square": Case(
        4, fused_mean_square, torch=lambda v, u, b, c: torch.addcmul(v * b, c * u, u), any_zero=True
    ),
    "fused_shrink": Case(3, fused_shrink),
    "fused_number": Case(1, fused_number),
    "where": Case(3, lambda x, y, z: torch.where(x > 0, y, z)),
    "real": Case(2, lambda x, y: (x > y) * y, torch=lambda x, y: (x > y).to(y.dtype) * y),
    "to_float32": Case(1, lambda x: x.to_float32(), torch=lambda x: x.to(F32)),
    "to_bfloat16": Case(1, lambda x: x.to_bfloat16(), torch=lambda x: x.to(BF16)),
    "to_float16": Case(1, lambda x: x.to_float16(), torch=lambda x: x.to(F16)),
}

TRUTH = {
    "gt": Case(2, lambda x, y: x > y),
    "ge": Case(2, lambda x, y: x >= y),
    "lt": Case(2, lambda x, y: x < y),
    "le": Case(2, lambda x, y: x <= y),
    "eq": Case(2, lambda x, y: x == y),
    "ne": Case(2, lambda x, y: x != y),
    "isfinite": Case(1, torch.isfinite),
    "logical_and": Case(2, torch.logical_and),
    "logical_or": Case(2, torch.logical_or),
    "logical_not": Case(1, torch.logical_not),
    "logical_xor": Case(2, torch.logical_xor),
    "xor": Case(2, lambda x, y: (x > 0) ^ (y > 0)),
    "bitwise_xor": Case(2, lambda x, y: torch.bitwise_xor(x > 0, y > 0)),
    "eq/truth": Case(2, lambda x, y: (x > 0) == (y > 0)),
    "add/truth": Case(2, lambda x, y: (x > 0) + (y > 0)),  # as torch has it for bools: either, and both
    "mul/truth": Case(2, lambda x, y: (x > 0) * (y > 0)),
    "where/truth": Case(3, lambda x, y, z: torch.where(x > 0, y > 0, z > 0)),
}

LIBRARY = {
    "sqrt": Case(1, torch.sqrt, "sqrt"),
    "rsqrt": Case(1, torch.rsqrt, "rsqrt"),
    "exp": Case(1, torch.exp, "library"),
    "exp2": Case(1, torch.exp2, "library"),
    "log": Case(1, torch.log, "library"),
    "log2": Case(1, torch.log2, "library"),
    "sin": Case(1, torch.sin, "library"),
    "cos": Case(1, torch.cos, "library"),
    "expm1": Case(1, torch.expm1, "expm1"),
    "log1p": Case(1, torch.log1p, "expm1"),
    "tanh": Case(1, torch.tanh, "tanh"),
    "log10": Case(1, torch.log10, "composed"),
    "erf": Case(1, torch.erf, "library"),
    "tan": Case(1, torch.tan, "composed"),
    "atan": Case(1, torch.atan, "atan"),
    "atan2": Case(2, torch.atan2, "atan"),
    "sinh": Case(1, torch.sinh, "sinh"),
    "cosh": Case(1, torch.cosh, "sinh"),
    "hypot": Case(2, torch.hypot, "composed"),
    "logaddexp": Case(2, torch.logaddexp, "logaddexp"),
    "pow": Case(2, torch.pow, "pow"),
    "cbrt": Case(1, fo.cbrt, "cbrt", torch=_cbrt),
}

# Other names for the same, and torch's special cases. A name may have variants behind a slash.
REWRITTEN = {
    "add/alpha": Case(2, lambda x, y: torch.add(x, y, alpha=-2), torch=lambda x, y: x + -2 * y),
    "sub/alpha": Case(2, lambda x, y: torch.sub(x, y, alpha=0.1), torch=lambda x, y: x - 0.1 * y),
    "subtract": Case(2, torch.subtract),
    "rsub": Case(2, torch.rsub),
    "multiply": Case(2, torch.multiply),
    "truediv": Case(2, lambda x, y: x / y),
    "divide": Case(2, torch.divide),
    "true_divide": Case(2, torch.true_divide),
    "radd": Case(2, lambda x, y: x.radd(y), torch=lambda x, y: y + x),
    "rmul": Case(2, lambda x, y: x.rmul(y), torch=lambda x, y: y * x),
    "rdiv": Case(2, lambda x, y: x.rdiv(y), torch=lambda x, y: y / x),
    "rtruediv": Case(2, lambda x, y: x.rtruediv(y), torch=lambda x, y: y / x),
    "rpow": Case(2, lambda x, y: x.rpow(y), "pow", torch=lambda x, y: y**x),
    "add/number": Case(1, lambda x: 2.5 + x),
    "sub/number": Case(1, lambda x: 2.5 - x),
    "mul/number": Case(1, lambda x: -0.3 * x),
    "truediv/number": Case(1, lambda x: 1.0 / x),
    "pow/2": Case(1, lambda x: x**2),
    "pow/3": Case(1, lambda x: x**3),
    "pow/1": Case(1, lambda x: x**1),
    "pow/0": Case(1, lambda x: x**0.0),
    "pow/0.5": Case(1, lambda x: x**0.5, "sqrt"),
    "pow/-0.5": Case(1, lambda x: x**-0.5, "rsqrt"),
    "pow/-1": Case(1, lambda x: x**-1),
    "pow/-2": Case(1, lambda x: x**-2),
    "pow/4": Case(1, lambda x: x**4, "pow"),
    "pow/0.75": Case(1, lambda x: x**0.75, "pow"),
    "pow/number": Case(1, lambda x: 0.9**x, "pow"),
    # in float64 whatever the argument, so a float32 program rounds once more than torch does
    "float_power": Case(2, torch.float_power, "pow"),
    "square": Case(1, torch.square),
    "reciprocal": Case(1, torch.reciprocal),
    "sigmoid": Case(1, torch.sigmoid, "sigmoid"),
    "mod": Case(2, lambda x, y: x % y),
    "mod/number": Case(1, lambda x: 2.5 % x),
    "div/trunc": Case(2, lambda x, y: torch.div(x, y, rounding_mode="trunc")),
    "div/floor": Case(2, lambda x, y: torch.div(x, y, rounding_mode="floor"), torch=_floor_divide),
    "erf/special": Case(1, torch.special.erf, "library"),
    "real/torch": Case(1, torch.real),
    "floordiv": Case(2, lambda x, y: x // y, torch=_floor_divide),
    "floor_divide": Case(2, torch.floor_divide, torch=_floor_divide),
    "fix": Case(1, torch.fix),
    "trunc/python": Case(1, lambda x: math.trunc(x), torch=torch.trunc),
    "round/python": Case(1, lambda x: round(x), torch=torch.round),
    "floor/python": Case(1, lambda x: math.floor(x), torch=torch.floor),
    "ceil/python": Case(1, lambda x: math.ceil(x), torch=torch.ceil),
    "frac": Case(1, torch.frac),
    # torch leaves open which zero it returns
    "relu": Case(1, torch.relu, any_zero=True),
    "heaviside": Case(2, torch.heaviside),
    "sgn": Case(1, torch.sgn),
    "arctan": Case(1, torch.arctan, "atan"),
    "arctan2": Case(2, torch.arctan2, "atan"),
    "negative": Case(1, torch.negative),
    "absolute": Case(1, torch.absolute),
    "pos": Case(1, lambda x: +x),
    "clamp": Case(1, lambda x: torch.clamp(x, -0.5, 2.0)),
    "clamp/empty": Case(1, lambda x: torch.clamp(x, 2.0, -0.5)),
    "clamp/min": Case(1, lambda x: torch.clamp(x, min=1.0)),
    "clamp/max": Case(1, lambda x: torch.clamp(x, max=1.0)),
    "clamp/values": Case(3, lambda x, y, z: torch.clamp(x, y, z), any_zero=True),
    "clip": Case(1, lambda x: torch.clip(x, -0.5, 2.0)),
    "clamp_min": Case(1, lambda x: torch.clamp_min(x, 1.0)),
    "clamp_max": Case(1, lambda x: torch.clamp_max(x, 1.0)),
    "max": Case(2, torch.max, any_zero=True),
    "min": Case(2, torch.min, any_zero=True),
    "greater": Case(2, torch.greater),
    "greater_equal": Case(2, torch.greater_equal),
    "less": Case(2, torch.less),
    "less_equal": Case(2, torch.less_equal),
    "not_equal": Case(2, torch.not_equal),
    "isnan": Case(1, torch.isnan),
    "isinf": Case(1, torch.isinf),
    "nan_to_num/values": Case(1, lambda x: torch.nan_to_num(x, 1.0, 2.0, -2.0)),
    "and": Case(2, lambda x, y: (x > 0) & (y > 0)),
    "or": Case(2, lambda x, y: (x > 0) | (y > 0)),
    "invert": Case(1, lambda x: ~(x > 0)),
    "bitwise_and": Case(2, lambda x, y: torch.bitwise_and(x > 0, y > 0)),
    "bitwise_or": Case(2, lambda x, y: torch.bitwise_or(x > 0, y > 0)),
    "bitwise_not": Case(1, lambda x: torch.bitwise_not(x > 0)),
    "masked_fill": Case(2, lambda x, y: x.masked_fill(y > 0, -1.0)),
    "lerp/number": Case(2, lambda x, y: torch.lerp(x, y, 0.1)),
    "lerp/large": Case(2, lambda x, y: torch.lerp(x, y, 0.9)),
    "addcmul/number": Case(3, lambda x, y, z: torch.addcmul(x, y, z, value=-0.3)),
    "addcmul/1": Case(3, lambda x, y, z: torch.addcmul(x, y, z)),
    "addcdiv/number": Case(3, lambda x, y, z: torch.addcdiv(x, y, z, value=-0.3)),
    "addcdiv/1": Case(3, lambda x, y, z: torch.addcdiv(x, y, z)),
    "to": Case(1, lambda x: x.to(BF16)),
    "to/float16": Case(1, lambda x: x.to(dtype=F16)),
    "type_as": Case(2, lambda x, y: x.type_as(y)),
    "float": Case(1, lambda x: x.float()),
    # elements stay in the dtype that they are computed in
    "double": Case(1, lambda x: x.double()),
    "bfloat16": Case(1, lambda x: x.bfloat16()),
    "half": Case(1, lambda x: x.half()),
    "numel": Case(1, lambda x: x * 0 + x.numel(), torch=lambda x: x * 0 + x.shape[-1]),
    "detach": Case(1, lambda x: x.detach()),
    "clone": Case(1, torch.clone),
    "zeros_like": Case(1, torch.zeros_like),
    "ones_like": Case(1, torch.ones_like),
    "full_like": Case(1, lambda x: torch.full_like(x, 0.1)),
}

CASES = ARITHMETIC | TRUTH | LIBRARY | REWRITTEN


class Reducing(NamedTuple):
    """A reduction: the expression on symbols, and on a leaf, or all leaves in one, in float64.

    Args:
      of: the expression on a symbol.
      torch: the expression on a tensor.
      exact: whole numbers up to this leave no rounding errors in the squares or the sums of many leaves.
      ulp: how far a square root may be off.
    """

    of: Callable[[Any], Any]
    torch: Callable[[torch.Tensor], torch.Tensor]
    exact: int = 2**22
    ulp: int = 0
    arity: int = 1


norm = torch.linalg.vector_norm
LEAF_REDUCTIONS = {
    "leaf_sum": Reducing(fo.leaf_sum, torch.sum),
    "leaf_mean": Reducing(fo.leaf_mean, torch.mean),
    "leaf_norm": Reducing(fo.leaf_norm, norm, 2**12, 1),
    "leaf_amax": Reducing(fo.leaf_amax, torch.amax),
    "leaf_size": Reducing(fo.leaf_size, lambda x: torch.tensor(float(x.numel()), dtype=F64)),
    "leaf_sum/ones": Reducing(
        lambda x: fo.leaf_sum(torch.ones_like(x)), lambda x: torch.tensor(float(x.numel()), dtype=F64)
    ),
    "leaf_mean/full": Reducing(lambda x: fo.leaf_mean(torch.full_like(x, 0.1)), lambda x: torch.full_like(x[0], 0.1)),
    "leaf_amax/full": Reducing(lambda x: fo.leaf_amax(torch.full_like(x, 0.1)), lambda x: torch.full_like(x[0], 0.1)),
    "sum": Reducing(torch.sum, torch.sum),
    "mean": Reducing(torch.mean, torch.mean),
    "amax": Reducing(torch.amax, torch.amax),
    "amin": Reducing(torch.amin, torch.amin),
    "max": Reducing(torch.max, torch.max),
    "min": Reducing(torch.min, torch.min),
    "norm": Reducing(lambda x: x.norm(), norm, 2**12, 1),
    "vector_norm": Reducing(lambda x: x.vector_norm(), norm, 2**12, 1),
    "linalg_vector_norm": Reducing(norm, norm, 2**12, 1),
    "linalg_vector_norm/1": Reducing(lambda x: norm(x, 1), lambda x: norm(x, 1)),
    "linalg_vector_norm/inf": Reducing(lambda x: norm(x, INF), lambda x: norm(x, INF)),
    "sum/truth": Reducing(lambda x: torch.sum(x > 0), lambda x: (x > 0).double().sum()),
    "amax/truth": Reducing(lambda x: torch.amax(torch.isnan(x)), lambda x: x.isnan().double().amax()),
}
TREE_REDUCTIONS = {
    "tree_sum": Reducing(fo.tree_sum, torch.sum),
    "tree_norm": Reducing(fo.tree_norm, norm, 2**12, 1),
    "tree_amax": Reducing(fo.tree_amax, torch.amax),
    "tree_sum/ones": Reducing(
        lambda x: fo.tree_sum(torch.ones_like(x)), lambda x: torch.tensor(float(x.numel()), dtype=F64)
    ),
}


def test_cases_cover_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case named after an operation does record that name, so nothing in the table goes untested."""
    tested: set[str] = set()
    record = trace._record

    def spy(name: str, *args: Any, **kwargs: Any) -> Any:
        recorded.append(name.strip("_"))
        return record(name, *args, **kwargs)

    monkeypatch.setattr(trace, "_record", spy)
    for label, case in (CASES | LEAF_REDUCTIONS | TREE_REDUCTIONS).items():
        recorded: list[str] = []
        tracer = trace.Tracer()
        case.of(*(tracer.input("array", x) for x in "xyzw"[: case.arity]))
        ops = {v.op for v in tracer.values}
        tested |= {label.partition("/")[0]} & ({*recorded} | ops)

    # results of reductions over uniform values, and a part of Adam that is tested in its place
    assert {*OPS, *trace.REWRITES} - tested == {"spread", "fused_weight"}


# torch's fused kernels on CUDA
ON_CUDA: dict[str, Callable[..., Any]] = {
    "fused_mean": lambda m, u, b, c: fma(b, m, fma(-b, u, u)),
    "fused_mean_square": lambda v, u, b, c: fma(b, v, fma(-b, u * u, u * u)),
    "fused_shrink": lambda p, r, c: fma(-r, p, p),
}


# torch's vector code has NaN for the remainder where the quotient overflows; its scalar code, NumPy and C have it.
def _fmod(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(numpy.fmod(x.numpy(), y.numpy()))


def _remainder(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    rest = _fmod(x, y)
    return torch.where((rest != 0) & ((rest < 0) != (y < 0)), rest + y, rest)


EXACT: dict[str, Callable[..., Any]] = {
    "fmod": _fmod,
    "remainder": _remainder,
    "mod": _remainder,
    "floordiv": lambda x, y: torch.from_numpy(numpy.floor_divide(x.numpy(), y.numpy())),
    "floor_divide": lambda x, y: torch.from_numpy(numpy.floor_divide(x.numpy(), y.numpy())),
    "div/floor": lambda x, y: torch.from_numpy(numpy.floor_divide(x.numpy(), y.numpy())),
    "mod/number": lambda x: _remainder(torch.full_like(x, 2.5), x),
}


# -- operands -----------------------------------------------------------------------------------------------------


def specials(dtype: torch.dtype) -> torch.Tensor:
    """Numbers at which something changes."""
    f = torch.finfo(dtype)
    least = f.smallest_normal * f.eps
    positive = [
        *(0.0, least, 0.7 * f.smallest_normal, f.smallest_normal, 1e-20, 1e-6, 1e-4, 0.01, 1 / 3, 0.5, 1 - f.eps / 2),
        *(1.0, 1 + f.eps, 1.5, 2.0, 3.0, math.pi, 10.5, 80.0, 1e4 + 0.1, 1e10, 1e30, f.max, INF),
    ]
    return torch.tensor([NAN, *(s * x for x in positive for s in (1, -1))], dtype=dtype)


def pick(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Four rows of `n` special numbers."""
    chosen = torch.randint(len(specials(dtype)), (4, n), generator=torch.Generator().manual_seed(seed))
    return specials(dtype)[chosen]


@functools.cache
def elements(dtype: torch.dtype) -> torch.Tensor:
    """One leaf: all pairs of special numbers in the first two operands, then random ones of any size."""
    special = specials(dtype)
    pairs = torch.cartesian_prod(special, special).t()
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(4, 1000, generator=generator, dtype=dtype)
    normal[:, 500:] *= 10 ** (60 * torch.rand(4, 500, generator=generator, dtype=dtype) - 30)
    return torch.cat([torch.cat([pairs, pick(pairs.shape[1], dtype, 2)[2:]]), normal], 1)[:, None]


@functools.cache
def leaves_of_one(dtype: torch.dtype) -> torch.Tensor:
    """Many leaves of one element."""
    rows = pick(80, dtype, 3)
    rows[0, : len(specials(dtype))] = specials(dtype)
    return rows[:, :, None]


@functools.cache
def few_leaves(dtype: torch.dtype) -> torch.Tensor:
    """Some leaves of all special numbers in the first operand, with the same other ones for all elements."""
    special = specials(dtype)
    rows = pick(12, dtype, 4)[:, :, None].repeat(1, 1, len(special))
    rows[0] = special
    return rows


@functools.cache
def few_leaves_left(dtype: torch.dtype) -> torch.Tensor:
    """The same, with the first two operands exchanged."""
    return few_leaves(dtype)[[1, 0, 2, 3]]


class Pattern(NamedTuple):
    """The operands that are one number for a whole leaf, and so computed with in the prologue.

    Args:
      uniform: those of x, y, z and w.
      operands: makes them, of shape (4, leaves, elements).
      cases: what is computed.
    """

    uniform: str
    operands: Callable[[torch.dtype], torch.Tensor]
    cases: Mapping[str, Case]


SIDES = ("right", "left")  # of an operator, on which a uniform value stands
OPERATORS = {name: case for name, case in (ARITHMETIC | TRUTH | LIBRARY).items() if case.arity > 1}
PATTERNS = {
    "elements": Pattern("", elements, CASES),
    "uniform": Pattern("xyzw", leaves_of_one, CASES),
    "right": Pattern("yzw", few_leaves, OPERATORS),
    "left": Pattern("x", few_leaves_left, {k: c for k, c in OPERATORS.items() if c.arity < 4}),
}


# -- running a program --------------------------------------------------------------------------------------------


Rule = tuple[int, Callable[..., Any]]  # how many operands an expression takes, and the expression


def run(
    backend: str,
    rules: Mapping[str, Rule],
    like: Sequence[torch.Tensor],
    arrays: Mapping[str, Sequence[torch.Tensor]],
    scalars: Mapping[str, Sequence[float]],
    stored: torch.dtype,
    compute: torch.dtype,
    per_leaf: bool = False,
) -> dict[str, Sequence[torch.Tensor]]:
    """Evaluates expressions as one program.

    Args:
      backend: who runs it.
      rules: expressions of some of x, y, z and w.
      like: for each leaf a tensor of its size.
      arrays: those operands that differ per element: a tensor for each leaf.
      scalars: those that are one number for a leaf: a number for each leaf.
      stored: the dtype that values are stored in.
      compute: the dtype computed in.
      per_leaf: whether the values are one number per leaf.
    """
    tracer = trace.Tracer()
    symbols = [tracer.input("scalar" if name in scalars else "array", name) for name in "xyzw"]
    outputs = {name: of(*symbols[:n]) for name, (n, of) in rules.items()}
    program = tracer.finish(outputs, frozenset(outputs) if per_leaf else frozenset())
    new = [torch.empty(() if per_leaf else x.shape, dtype=stored) for x in like]
    columns = {"updates": like, **arrays, **dict.fromkeys(outputs, new)}
    results = run_program(backend, program, columns, scalars, compute)
    return {name: results[name] for name in outputs}


@functools.cache
def run_cases(backend: str, dtype: torch.dtype, pattern: str, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Evaluates some cases of a pattern as one program; without results if that is not possible."""
    uniform, _, cases = PATTERNS[pattern]
    xs = dict(zip("xyzw", operands(backend, dtype, pattern), strict=True))
    try:
        results = run(
            backend,
            {name: (cases[name].arity, cases[name].of) for name in names},
            xs["x"].unbind(),
            {name: x.unbind() for name, x in xs.items() if name not in uniform},
            {name: x[:, 0].tolist() for name, x in xs.items() if name in uniform},
            dtype,
            F32 if pattern == "uniform" else dtype,
            per_leaf=pattern == "uniform",
        )
    except Exception:
        if len(names) == 1:
            raise
        try_again()
        return {}
    return {name: torch.stack(list(column)) for name, column in results.items()}


def actual(backend: str, dtype: torch.dtype, pattern: str, name: str) -> torch.Tensor:
    """Results of a backend. All cases are one program, which is much faster, unless one of them breaks it."""
    results = run_cases(backend, dtype, pattern, tuple(PATTERNS[pattern].cases))
    return results[name] if results else run_cases(backend, dtype, pattern, (name,))[name]


def operands(backend: str, dtype: torch.dtype, pattern: str) -> torch.Tensor:
    """The operands of a pattern."""
    xs = PATTERNS[pattern].operands(dtype)
    # for Triton, uniform values are the same text as elements, which is what Triton's interpreter is so slow to read
    return xs[:, ::8] if backend == "triton" and pattern == "uniform" else xs


def expected(backend: str, dtype: torch.dtype, pattern: str, name: str) -> torch.Tensor:
    """Results of torch."""
    case = PATTERNS[pattern].cases[name]
    of = (ON_CUDA.get(name) if backend == "triton" else None) or case.torch or case.of
    if name == "fused_number" and backend == "triton" and pattern == "uniform":
        of = torch.Tensor.float  # the dtype that elements are computed in
    if name in EXACT and (backend in ("c", "triton") or pattern == "uniform"):
        of = EXACT[name]
    result: torch.Tensor = of(*operands(backend, dtype, pattern)[: case.arity])
    return result.to(dtype)


def ordered(x: torch.Tensor) -> torch.Tensor:
    """Floats as integers in the same order, one apart where the floats are neighbours; NaN is one of them."""
    kind = {F32: torch.int32, F64: torch.int64, BF16: torch.int16, F16: torch.int16}[x.dtype]
    bits, top = x.contiguous().view(kind).long(), torch.iinfo(kind).max
    return torch.where(x.isnan(), top, torch.where(bits < 0, bits ^ top, bits))


def assert_within(actual: torch.Tensor, expected: torch.Tensor, ulp: int, any_zero: bool = False) -> None:
    """Compares floats by how many lie between them."""
    actual, expected = actual.flatten(), expected.flatten()
    if any_zero:
        actual, expected = actual + 0.0, expected + 0.0  # -0.0 + 0.0 is 0.0
    apart = (ordered(actual) - ordered(expected)).double().abs()
    worst = apart.argmax()
    torch.testing.assert_close(
        apart,
        torch.zeros_like(apart),
        rtol=0,
        atol=ulp,
        msg=lambda message: f"{message}\nwhere {actual[worst].item()} should be {expected[worst].item()}",
    )


def allowed(backend: str, kind: str, dtype: torch.dtype) -> int:
    """The tolerance of a kind of operation."""
    return ULPS[kind][backend if backend in ("c", "triton") else "torch"][dtype is F64]


ON_EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
pytestmark = INTERPRETER


@ON_EVERY_BACKEND
@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_operations_on_elements(backend: str, dtype: torch.dtype, name: str) -> None:
    assert_within(
        actual(backend, dtype, "elements", name),
        expected(backend, dtype, "elements", name),
        allowed(backend, CASES[name].kind, dtype),
        CASES[name].any_zero,
    )


@ON_EVERY_BACKEND
@pytest.mark.parametrize("name", CASES)
def test_uniform_values_are_computed_in_double_precision(backend: str, name: str) -> None:
    """Also where elements are computed in float32."""
    assert_within(
        actual(backend, F64, "uniform", name),
        expected(backend, F64, "uniform", name),
        allowed(backend, CASES[name].kind, F64),
        CASES[name].any_zero,
    )


@ON_EVERY_BACKEND
@DTYPES
@pytest.mark.parametrize(("pattern", "name"), [(side, name) for side in SIDES for name in PATTERNS[side].cases])
def test_operations_on_an_element_and_a_uniform_value(
    backend: str, dtype: torch.dtype, pattern: str, name: str
) -> None:
    assert_within(
        actual(backend, dtype, pattern, name),
        expected(backend, dtype, pattern, name),
        allowed(backend, CASES[name].kind, dtype),
        CASES[name].any_zero,
    )


DIFFERENTIABLE = {
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "round": torch.round,
    "frac": torch.frac,
    "fmod": torch.fmod,
    "remainder": torch.remainder,
    "copysign": torch.copysign,
    "relu": torch.relu,
    "erf": torch.erf,
    "log10": torch.log10,
    "tan": torch.tan,
    "atan": torch.atan,
    "atan2": torch.atan2,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "hypot": torch.hypot,
    "logaddexp": torch.logaddexp,
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives_of_operations_are_those_of_torch(name: str) -> None:
    of, arity = DIFFERENTIABLE[name], CASES[name].arity
    xs = torch.tensor([[-2.5, -1.25, -0.5, 0.0, 0.75, 1.5, 3.25], [2.0, -0.5, 0.75, -2.0, 1.5, 1.5, -2.0]], dtype=F64)
    grads, params = (x.clone().requires_grad_() for x in xs)
    rule = fo.elementwise(lambda u, p: of(*(u, p)[:arity]) + 0 * p)()
    u, p = (x.clone().requires_grad_() for x in xs)
    (of(*(u, p)[:arity]) + 0 * p).sum().backward()

    updates, _ = rule.update(grads, rule.init(params), params)
    updates.sum().backward()

    # two formulas for one derivative round a few times each
    torch.testing.assert_close((grads.grad, params.grad), (u.grad, p.grad), rtol=2**-48, atol=2**-52, equal_nan=True)


# -- reductions ---------------------------------------------------------------------------------------------------


# around a vector, the blocks of 512, Triton's of 1024 and chunks of 4096, and C's chunks of 32768
SIZES = (1, 2, 7, 8, 9, 511, 512, 513, 1025, 4096, 4097, 32767, 32768, 32769, 2 * 32768 + 5)


@functools.cache
def reduce(backend: str, dtype: torch.dtype, exact: int) -> dict[str, torch.Tensor]:
    """All reductions of leaves of whole numbers, as one program."""
    leaves = whole_numbers(backend, dtype, exact)
    cases = {k: (1, r.of) for k, r in (LEAF_REDUCTIONS | TREE_REDUCTIONS).items() if r.exact == exact}
    results = run(backend, cases, leaves, {"x": leaves}, {}, F64, dtype, per_leaf=True)
    return {name: torch.stack(list(column)) for name, column in results.items()}


def sizes(backend: str) -> tuple[int, ...]:
    """The sizes; Triton's interpreter takes long over chunks that mean nothing to Triton."""
    return (*SIZES[:-4], 16385) if backend == "triton" else SIZES


def whole_numbers(backend: str, dtype: torch.dtype, exact: int) -> list[torch.Tensor]:
    """A leaf of each size."""
    generator = torch.Generator().manual_seed(exact)
    return [torch.randint(-exact // 8, exact, (n,), generator=generator).to(dtype) for n in sizes(backend)]


@ON_EVERY_BACKEND
@DTYPES
@pytest.mark.parametrize("name", LEAF_REDUCTIONS)
def test_leaf_reductions(backend: str, dtype: torch.dtype, name: str) -> None:
    """Of whole numbers, whose sums float64 holds and float32 does not, so any order gives the same."""
    case = LEAF_REDUCTIONS[name]
    expected = torch.stack([case.torch(x.double()) for x in whole_numbers(backend, dtype, case.exact)])
    assert_within(reduce(backend, dtype, case.exact)[name], expected, case.ulp)


@ON_EVERY_BACKEND
@DTYPES
@pytest.mark.parametrize("name", TREE_REDUCTIONS)
def test_tree_reductions(backend: str, dtype: torch.dtype, name: str) -> None:
    case = TREE_REDUCTIONS[name]
    expected = case.torch(torch.cat(whole_numbers(backend, dtype, case.exact)).double())
    assert_within(reduce(backend, dtype, case.exact)[name], expected.expand(len(sizes(backend))), case.ulp)


@ON_EVERY_BACKEND
def test_sums_are_accumulated_in_double_precision(backend: str) -> None:
    """Adding n numbers errs by at most n roundings of the sum of their sizes, on either side."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, generator=generator) for n in sizes(backend)]
    [sums] = run(backend, {"sum": (1, fo.leaf_sum)}, leaves, {"x": leaves}, {}, F64, F32, per_leaf=True).values()
    size = torch.stack([x.double().abs().sum() for x in leaves])
    expected = torch.stack([x.double().sum() for x in leaves])
    torch.testing.assert_close(torch.stack(list(sums)) / size, expected / size, rtol=0, atol=2 * max(SIZES) * 2**-53)


SPECIALS = ((NAN,), (INF,), (-INF,), (INF, -INF), (NAN, INF))


def with_special(n: int, special: tuple[float, ...]) -> torch.Tensor:
    """A leaf of ones but for what is in the middle and at the end."""
    x = torch.ones(n)
    x[n // 2], x[-1] = special[0], special[-1]
    return x


@ON_EVERY_BACKEND
@pytest.mark.parametrize("name", ["leaf_sum", "leaf_norm", "leaf_amax", "amin"])
def test_leaf_reductions_of_what_is_not_finite(backend: str, name: str) -> None:
    case = LEAF_REDUCTIONS[name]
    leaves = [with_special(n, special) for special in SPECIALS for n in (1, 2, 9, 1030)]
    leaves += [with_special(32775, SPECIALS[0]), torch.full((1030,), -INF)]
    [actual] = run(backend, {name: (1, case.of)}, leaves, {"x": leaves}, {}, F64, F32, per_leaf=True).values()
    expected = [case.torch(x.double()) for x in leaves]
    assert_within(torch.stack(list(actual)), torch.stack(expected), case.ulp)


@ON_EVERY_BACKEND
@pytest.mark.parametrize("name", ["tree_sum", "tree_amax"])
@pytest.mark.parametrize("special", SPECIALS, ids=lambda x: ",".join(map(str, x)))
def test_tree_reductions_of_what_is_not_finite(backend: str, name: str, special: tuple[float, ...]) -> None:
    case = TREE_REDUCTIONS[name]
    leaves = [torch.ones(3), with_special(1030, special), torch.ones(1)]
    [actual] = run(backend, {name: (1, case.of)}, leaves, {"x": leaves}, {}, F64, F32, per_leaf=True).values()
    assert_within(torch.stack(list(actual)), case.torch(torch.cat(leaves).double()).expand(3), case.ulp)


@ON_EVERY_BACKEND
def test_uniform_updates_count_once_for_each_element(backend: str) -> None:
    """A rule may reduce what a rule before it has made the same for every element."""
    two = fo.elementwise(lambda u: 2.0)()
    sums = fo.elementwise(lambda u: u * 0 + fo.tree_sum(u) + 10 * fo.leaf_sum(u) + 100 * fo.leaf_amax(-u))()
    params = [torch.zeros(shape, device=device_of(backend)) for shape in ((), (2, 3), (1030,))]
    tx = fo.chain(two, sums)
    with fo.use_backend(backend):
        updates, _ = tx.update(params, tx.init(params), params)
    expected = [torch.full_like(p, 2 * 1037 + 20 * p.numel() - 200) for p in params]
    torch.testing.assert_close(updates, expected, rtol=0, atol=0)  # small whole numbers


def test_torch_norm_is_the_norm_of_a_leaf() -> None:
    tracer = trace.Tracer()
    x = tracer.input("array", "x")
    assert tracer.values[torch.norm(x).index] == tracer.values[fo.leaf_norm(x).index]


@ON_EVERY_BACKEND
def test_empty_leaves_are_left_out_of_reductions(backend: str) -> None:
    tx = fo.chain(fo.zero_nans(), fo.clip_by_global_norm(1.0), fo.clip_by_block_rms(10.0))
    with device_of(backend):
        params = {"empty": torch.zeros(0, 3), "full": torch.zeros(2)}
        grads = {"empty": torch.zeros(0, 3), "full": torch.tensor([3.0, 4.0])}
        expected = {"empty": torch.zeros(0, 3), "full": torch.tensor([0.6, 0.8])}
    with fo.use_backend(backend):
        updates, _ = tx.update(grads, tx.init(params), params)
    torch.testing.assert_close(updates, expected, rtol=2e-7, atol=0)  # 3 / 5 and 4 / 5 round twice


@ON_EVERY_BACKEND
def test_a_tree_of_empty_leaves(backend: str) -> None:
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adam(0.1))
    params = [torch.zeros(shape, device=device_of(backend)) for shape in ((0,), (3, 0))]
    with fo.use_backend(backend):
        new, state = fo.apply_gradients(tx, params, params, tx.init(params))
    torch.testing.assert_close((new, state[1][0].count.item()), (params, 1))


# -- conversions --------------------------------------------------------------------------------------------------


HALVES = pytest.mark.parametrize("half", [BF16, F16], ids=["bfloat16", "float16"])


def every(half: torch.dtype) -> torch.Tensor:
    """All 65536 numbers of a half type."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(half)


def around_ties(stored: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """Numbers half way between two neighbours of a narrower type, and those a little before and after."""
    if stored is F32:
        x = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-44, 36).repeat(250)
    else:
        x = every(stored)
    after = torch.nextafter(x.float(), torch.tensor(INF)) if stored is F32 else (ordered(x) + 1).clamp(max=2**15 - 1)
    after = after if stored is F32 else torch.where(after < 0, after ^ (2**15 - 1), after).short().view(stored)
    ties = (x.double() + after.double()) / 2
    ties = ties.to(dtype)[ties.isfinite()]
    nearby = [torch.nextafter(ties, torch.tensor(s * INF, dtype=dtype)) for s in (1, -1)]
    # within a rounding to float32 of a tie, which double rounding would mistake for one
    return torch.cat([ties, *nearby, ties * (1 + 2.0**-40), ties * (1 - 2.0**-40)])


def fewer(backend: str, x: torch.Tensor) -> torch.Tensor:
    """Cases for a second of Triton's interpreter. It mangles subnormal bfloat16, which have zeros in their place."""
    if backend != "triton":
        return x
    normal = x.double().abs() >= torch.finfo(BF16).smallest_normal
    return torch.where(normal | ~x.isfinite() | (x.dtype is F16), x, 0)[::17].contiguous()


@ON_EVERY_BACKEND
@HALVES
def test_every_half_is_loaded_exactly(backend: str, half: torch.dtype) -> None:
    x = fewer(backend, every(half))
    [y] = run(backend, {"y": (1, lambda x: x)}, [x], {"x": [x]}, {}, F32, F32)["y"]
    assert_within(y, x.float(), 0)


@ON_EVERY_BACKEND
@pytest.mark.parametrize("stored", [BF16, F16, F32], ids=["bfloat16", "float16", "float32"])
@DTYPES
def test_stores_round_as_torch_does(backend: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    """To the nearest, ties to even; torch takes float64 to a half type by way of float32."""
    x = fewer(backend, torch.cat([around_ties(stored, dtype), specials(dtype)]))
    [y] = run(backend, {"y": (1, lambda x: x)}, [x], {"x": [x]}, {}, stored, dtype)["y"]
    assert_within(y, x.to(stored), 0)


CONVERT = """
void halves_to_floats(const uint16_t *x, float *y, int64_t n) { for (int64_t i = 0; i < n; ++i) y[i] = from_f16(x[i]); }
void floats_to_halves(const float *x, uint16_t *y, int64_t n) { for (int64_t i = 0; i < n; ++i) y[i] = to_f16(x[i]); }
"""


@pytest.fixture(scope="module", params=["-DSOFT_F16", "-DHARD_F16"], ids=["software", "compiler"])
def conversions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The conversions that emitted C starts with: written out, and the compiler's own where it has them."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder: Path = tmp_path_factory.mktemp("conversions")
    (folder / "convert.c").write_text(prelude("float") + CONVERT)
    command = [*compiler, "-O2", "-shared", "-fPIC", request.param, "convert.c", "-o", "convert.so", "-lm"]
    subprocess.run(command, cwd=folder, check=True, timeout=100)
    return ctypes.CDLL(str(folder / "convert.so"))


def convert(function: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    function(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(x.numel()))
    return y


def test_c_widens_every_half(conversions: ctypes.CDLL) -> None:
    x = every(F16)
    assert_within(convert(conversions.halves_to_floats, x, torch.empty(x.shape)), x.float(), 0)


def test_c_rounds_floats_to_halves(conversions: ctypes.CDLL) -> None:
    """Ties, what surrounds them, and one float in 4099."""
    spread = torch.arange(-(2**31), 2**31, 4099).int().view(F32)
    x = torch.cat([around_ties(F16, F32), spread])
    assert_within(convert(conversions.floats_to_halves, x, torch.empty(x.shape, dtype=F16)), x.half(), 0)
