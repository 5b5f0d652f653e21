"""Every operation that a rule may use, on every backend, against torch itself.

A case is a function that a rule could contain. It is called twice: with symbols, which makes a program that a backend
runs, and with tensors, which is what torch computes. Results are compared as integers that count floating-point
numbers, so a tolerance of 3 is 3 units in the last place (ulp), NaN equals NaN, and -0.0 differs from 0.0 by one.
"""

import ctypes
import functools
import inspect
import itertools
import math
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import functional_optim as fo
from functional_optim.kernels import BACKENDS, Call, Column, trace
from functional_optim.kernels.build import find_compiler
from functional_optim.kernels.emit_c import HEADER
from functional_optim.kernels.ops import OPS
from functional_optim.kernels.plan import Signature


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


# How many ulp a backend may differ from torch, for (float32, float64): the sum of both errors, rounded up.
#
# torch's own vector functions (SLEEF and MKL) are within 1 ulp, and so is its square root. The C library is within
# 1 ulp. NumPy, which Triton's interpreter calls, is within 4 in its float32 vector functions and within 1 in float64.
# The reference and foreach call torch, but through lists and scalars, so torch may take its scalar path: 1 + 1.
# Functions that Triton lacks are composed in float64. For float32 that is exact up to the last rounding; for float64
# cancellation shows: `tanh` subtracts 1 from 2 / (1 + exp(-2x)) down to |x| = 1e-3, which leaves an error of
# 2**-52 / 1e-3, or 2**11 ulp with the exponential's own; `expm1` and `log1p` do so down to 1e-5: 2**18 ulp.
# `pow` and `cbrt` round y * log2(x), up to 1074 in size, before they raise 2 to it: 2 * 1074 * log(2) < 2**11 ulp.
# Library, so a backend's own error, then kind by kind what is added up.
ULPS: dict[str, dict[str, tuple[int, int]]] = {
    "exact": {"torch": (0, 0), "c": (0, 0), "triton": (0, 0)},
    "sqrt": {"torch": (1, 1), "c": (1, 1), "triton": (1, 1)},
    # the square root's error passes into the quotient, which rounds once more on either side
    "rsqrt": {"torch": (2, 2), "c": (2, 2), "triton": (2, 2)},
    "library": {"torch": (2, 2), "c": (2, 2), "triton": (5, 2)},
    "tanh": {"torch": (2, 2), "c": (2, 2), "triton": (2, 2**11)},
    "expm1": {"torch": (2, 2), "c": (2, 2), "triton": (2, 2**18)},
    "pow": {"torch": (2, 2), "c": (2, 2), "triton": (2, 2**11)},
    # 1 / (1 + exp(-x)): the exponential's error, then a sum and a quotient that round, on either side
    "sigmoid": {"torch": (4, 4), "c": (4, 4), "triton": (7, 4)},
}


def _cbrt(x: torch.Tensor) -> torch.Tensor:
    import numpy

    return torch.from_numpy(numpy.cbrt(x.double().numpy()))


ARITHMETIC = {
    "neg": Case(1, lambda x: -x),
    "abs": Case(1, abs),
    "add": Case(2, lambda x, y: x + y),
    "sub": Case(2, lambda x, y: x - y),
    "mul": Case(2, lambda x, y: x * y),
    "div": Case(2, torch.div),
    "floor": Case(1, torch.floor),
    "sign": Case(1, torch.sign),
    # torch leaves open which of 0.0 and -0.0 is larger
    "maximum": Case(2, torch.maximum, any_zero=True),
    "minimum": Case(2, torch.minimum, any_zero=True),
    "lerp": Case(3, lambda x, y, z: torch.lerp(x, y, z)),
    "addcmul": Case(4, lambda x, y, z, w: torch.addcmul(x, y, z, value=w), torch=lambda x, y, z, w: x.addcmul(w * y, z)),
    "addcdiv": Case(4, lambda x, y, z, w: torch.addcdiv(x, y, z, value=w), torch=lambda x, y, z, w: x.addcdiv(w * y, z)),
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
    "eq/truth": Case(2, lambda x, y: (x > 0) == (y > 0)),
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
    "pow": Case(2, torch.pow, "pow"),
    "cbrt": Case(1, fo.cbrt, "pow", torch=_cbrt),
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
    "floordiv": Case(2, lambda x, y: x // y),
    "floor_divide": Case(2, torch.floor_divide),
    "mod": Case(2, lambda x, y: x % y),
    "remainder": Case(2, torch.remainder),
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
    "nan_to_num": Case(1, torch.nan_to_num),
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
    "double": Case(1, lambda x: x.double()),
    "bfloat16": Case(1, lambda x: x.bfloat16()),
    "half": Case(1, lambda x: x.half()),
    "detach": Case(1, lambda x: x.detach()),
    "clone": Case(1, torch.clone),
    "zeros_like": Case(1, torch.zeros_like),
    "ones_like": Case(1, torch.ones_like),
    "full_like": Case(1, lambda x: torch.full_like(x, 0.1)),
}

CASES = ARITHMETIC | TRUTH | LIBRARY | REWRITTEN


class Reducing(NamedTuple):
    """A reduction of a leaf: the expression on symbols, and on tensors in float64."""

    of: Callable[[Any], Any]
    torch: Callable[[torch.Tensor], torch.Tensor]


LEAF_REDUCTIONS = {
    "leaf_sum": Reducing(fo.leaf_sum, torch.sum),
    "leaf_mean": Reducing(fo.leaf_mean, torch.mean),
    "leaf_norm": Reducing(fo.leaf_norm, torch.linalg.vector_norm),
    "leaf_amax": Reducing(fo.leaf_amax, torch.amax),
    "sum": Reducing(torch.sum, torch.sum),
    "mean": Reducing(torch.mean, torch.mean),
    "amax": Reducing(torch.amax, torch.amax),
    "amin": Reducing(torch.amin, torch.amin),
    "max": Reducing(torch.max, torch.max),
    "min": Reducing(torch.min, torch.min),
    "norm": Reducing(torch.norm, torch.linalg.vector_norm),
    "linalg_vector_norm": Reducing(torch.linalg.vector_norm, torch.linalg.vector_norm),
    "linalg_vector_norm/1": Reducing(lambda x: torch.linalg.vector_norm(x, 1), lambda x: x.abs().sum()),
    "linalg_vector_norm/inf": Reducing(lambda x: torch.linalg.vector_norm(x, INF), lambda x: x.abs().amax()),
    "vector_norm": Reducing(lambda x: x.vector_norm(), torch.linalg.vector_norm),
    "sum/truth": Reducing(lambda x: torch.sum(x > 0), lambda x: (x > 0).double().sum()),
    "amax/truth": Reducing(lambda x: torch.amax(torch.isnan(x)), lambda x: x.isnan().double().amax()),
}
TREE_REDUCTIONS = {
    "tree_sum": Reducing(fo.tree_sum, torch.sum),
    "tree_norm": Reducing(fo.tree_norm, torch.linalg.vector_norm),
    "tree_amax": Reducing(fo.tree_amax, torch.amax),
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
        case.of(*(tracer.input("array", x) for x in "xyzw"[: arity(case)]))
        ops = {v.op for v in tracer.values}
        tested |= {label.partition("/")[0]} & ({*recorded} | ops)

    assert {*OPS, *trace.REWRITES} - tested == set()


# -- running a program --------------------------------------------------------------------------------------------


def ordered(x: torch.Tensor) -> torch.Tensor:
    """Floats as integers in the same order, one apart where the floats are neighbours; NaN is one of them."""
    kind = {F32: torch.int32, F64: torch.int64, BF16: torch.int16, F16: torch.int16}[x.dtype]
    bits, top = x.contiguous().view(kind).long(), torch.iinfo(kind).max
    return torch.where(x.isnan(), top, torch.where(bits < 0, bits ^ top, bits))


def specials(dtype: torch.dtype) -> list[float]:
    """Numbers at which something changes."""
    f = torch.finfo(dtype)
    least = f.smallest_normal * f.eps
    positive = [
        *(0.0, least, 0.7 * f.smallest_normal, f.smallest_normal, 1e-20, 1e-6, 1e-4, 0.01, 1 / 3, 0.5, 1 - f.eps / 2),
        *(1.0, 1 + f.eps, 1.5, 2.0, 3.0, math.pi, 10.5, 80.0, 1e4 + 0.1, 1e10, 1e30, f.max, INF),
    ]
    return [NAN, *(s * x for x in positive for s in (1, -1))]


def operands(dtype: torch.dtype) -> torch.Tensor:
    """Four rows of numbers: all pairs of special ones in the first two, then random ones of any size."""
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor(specials(dtype), dtype=dtype)
    pairs = torch.cartesian_prod(special, special).t()
    n = pairs.shape[1]
    rest = special[torch.randint(len(special), (2, n), generator=generator)]
    normal = torch.randn(4, 500, generator=generator, dtype=dtype)
    large = torch.randn(4, 500, generator=generator, dtype=dtype) * 10 ** (
        60 * torch.rand(4, 500, generator=generator, dtype=dtype) - 30
    )
    return torch.cat([torch.cat([pairs, rest]), normal, large], 1)


Columns = Sequence[torch.Tensor]


def run(
    backend: str, rules: dict[str, tuple[int, Callable[..., Any]]], xs: torch.Tensor, uniform: str, compute: torch.dtype
) -> dict[str, torch.Tensor]:
    """Evaluates expressions as one program.

    Args:
      backend: who runs it.
      rules: expressions and their number of operands.
      xs: the operands, of shape (operands, leaves, elements).
      uniform: those that are one number for a whole leaf, of `"xyzw"`.
      compute: the dtype computed in.
    """
    tracer = trace.Tracer()
    symbols = [tracer.input("scalar" if name in uniform else "array", name) for name in "xyzw"]
    outputs = {name: of(*symbols[:n]) for name, (n, of) in rules.items()}
    program = tracer.finish(outputs, frozenset(outputs) if uniform == "xyzw" else frozenset())
    columns = {name: xs["xyzw".index(name)] for name in "xyzw"}
    signature = Signature(program, (xs.dtype,) * len(program.arrays), (xs.dtype,) * len(outputs), compute)
    call = Call(
        signature,
        Column(torch.empty_like(xs[0]).unbind()),
        [Column(columns[name].unbind()) for name in program.arrays],
        [None] * len(outputs),
        [[columns[name][k, 0].item() for name in program.scalars] for k in range(xs.shape[1])],
        tuple(range(xs.shape[1])),
        (xs.shape[2],) * xs.shape[1],
    )
    [results] = BACKENDS[backend]([call])
    return {name: torch.stack(list(column)) for name, column in zip(outputs, results, strict=True)}


def expected(case: Case, xs: torch.Tensor) -> torch.Tensor:
    """What torch computes."""
    result: torch.Tensor = (case.torch or case.of)(*xs[: case.arity])
    return result.to(xs.dtype)


def assert_within(actual: torch.Tensor, expected: torch.Tensor, ulp: int, any_zero: bool = False) -> None:
    """Compares floats by how many lie between them."""
    if any_zero:
        actual, expected = actual + 0.0, expected + 0.0  # -0.0 + 0.0 is 0.0
    torch.testing.assert_close(ordered(actual), ordered(expected), rtol=0, atol=ulp)
