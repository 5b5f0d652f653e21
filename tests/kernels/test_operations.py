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
      of: the expression, on symbols and on tensors alike.
      kind: which row of `ULPS` bounds its error.
      torch: the expression on tensors, where torch writes it otherwise or has no name for it.
      any_zero: whether the sign of a zero is left open.
    """

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
    "neg": Case(lambda x: -x),
    "abs": Case(abs),
    "add": Case(lambda x, y: x + y),
    "sub": Case(lambda x, y: x - y),
    "mul": Case(lambda x, y: x * y),
    "div": Case(torch.div),
    "floor": Case(torch.floor),
    "sign": Case(torch.sign),
    # torch leaves open which of 0.0 and -0.0 is larger
    "maximum": Case(torch.maximum, any_zero=True),
    "minimum": Case(torch.minimum, any_zero=True),
    "lerp": Case(lambda x, y, z: torch.lerp(x, y, z)),
    "addcmul": Case(lambda x, y, z, w: torch.addcmul(x, y, z, value=w), torch=lambda x, y, z, w: x.addcmul(w * y, z)),
    "addcdiv": Case(lambda x, y, z, w: torch.addcdiv(x, y, z, value=w), torch=lambda x, y, z, w: x.addcdiv(w * y, z)),
    "where": Case(lambda x, y, z: torch.where(x > 0, y, z)),
    "real": Case(lambda x, y: (x > y) * y, torch=lambda x, y: (x > y).to(y.dtype) * y),
    "to_float32": Case(lambda x: x.to_float32(), torch=lambda x: x.to(F32)),
    "to_bfloat16": Case(lambda x: x.to_bfloat16(), torch=lambda x: x.to(BF16)),
    "to_float16": Case(lambda x: x.to_float16(), torch=lambda x: x.to(F16)),
}

TRUTH = {
    "gt": Case(lambda x, y: x > y),
    "ge": Case(lambda x, y: x >= y),
    "lt": Case(lambda x, y: x < y),
    "le": Case(lambda x, y: x <= y),
    "eq": Case(lambda x, y: x == y),
    "ne": Case(lambda x, y: x != y),
    "isfinite": Case(torch.isfinite),
    "logical_and": Case(torch.logical_and),
    "logical_or": Case(torch.logical_or),
    "logical_not": Case(torch.logical_not),
    "eq/truth": Case(lambda x, y: (x > 0) == (y > 0)),
    "where/truth": Case(lambda x, y, z: torch.where(x > 0, y > 0, z > 0)),
}

LIBRARY = {
    "sqrt": Case(torch.sqrt, "sqrt"),
    "rsqrt": Case(torch.rsqrt, "rsqrt"),
    "exp": Case(torch.exp, "library"),
    "exp2": Case(torch.exp2, "library"),
    "log": Case(torch.log, "library"),
    "log2": Case(torch.log2, "library"),
    "sin": Case(torch.sin, "library"),
    "cos": Case(torch.cos, "library"),
    "expm1": Case(torch.expm1, "expm1"),
    "log1p": Case(torch.log1p, "expm1"),
    "tanh": Case(torch.tanh, "tanh"),
    "pow": Case(torch.pow, "pow"),
    "cbrt": Case(fo.cbrt, "pow", torch=_cbrt),
}

# Other names for the same, and torch's special cases. A name may have variants behind a slash.
REWRITTEN = {
    "add/alpha": Case(lambda x, y: torch.add(x, y, alpha=-2), torch=lambda x, y: x + -2 * y),
    "sub/alpha": Case(lambda x, y: torch.sub(x, y, alpha=0.1), torch=lambda x, y: x - 0.1 * y),
    "subtract": Case(torch.subtract),
    "rsub": Case(torch.rsub),
    "multiply": Case(torch.multiply),
    "truediv": Case(lambda x, y: x / y),
    "divide": Case(torch.divide),
    "true_divide": Case(torch.true_divide),
    "radd": Case(lambda x, y: x.radd(y), torch=lambda x, y: y + x),
    "rmul": Case(lambda x, y: x.rmul(y), torch=lambda x, y: y * x),
    "rdiv": Case(lambda x, y: x.rdiv(y), torch=lambda x, y: y / x),
    "rtruediv": Case(lambda x, y: x.rtruediv(y), torch=lambda x, y: y / x),
    "rpow": Case(lambda x, y: x.rpow(y), "pow", torch=lambda x, y: y**x),
    "add/number": Case(lambda x: 2.5 + x),
    "sub/number": Case(lambda x: 2.5 - x),
    "mul/number": Case(lambda x: -0.3 * x),
    "truediv/number": Case(lambda x: 1.0 / x),
    "floordiv": Case(lambda x, y: x // y),
    "floor_divide": Case(torch.floor_divide),
    "mod": Case(lambda x, y: x % y),
    "remainder": Case(torch.remainder),
    "pow/2": Case(lambda x: x**2),
    "pow/3": Case(lambda x: x**3),
    "pow/1": Case(lambda x: x**1),
    "pow/0": Case(lambda x: x**0.0),
    "pow/0.5": Case(lambda x: x**0.5, "sqrt"),
    "pow/-0.5": Case(lambda x: x**-0.5, "rsqrt"),
    "pow/-1": Case(lambda x: x**-1),
    "pow/-2": Case(lambda x: x**-2),
    "pow/4": Case(lambda x: x**4, "pow"),
    "pow/0.75": Case(lambda x: x**0.75, "pow"),
    "pow/number": Case(lambda x: 0.9**x, "pow"),
    # in float64 whatever the argument, so a float32 program rounds once more than torch does
    "float_power": Case(torch.float_power, "pow"),
    "square": Case(torch.square),
    "reciprocal": Case(torch.reciprocal),
    "sigmoid": Case(torch.sigmoid, "sigmoid"),
    "negative": Case(torch.negative),
    "absolute": Case(torch.absolute),
    "pos": Case(lambda x: +x),
    "clamp": Case(lambda x: torch.clamp(x, -0.5, 2.0)),
    "clamp/empty": Case(lambda x: torch.clamp(x, 2.0, -0.5)),
    "clamp/min": Case(lambda x: torch.clamp(x, min=1.0)),
    "clamp/max": Case(lambda x: torch.clamp(x, max=1.0)),
    "clamp/values": Case(lambda x, y, z: torch.clamp(x, y, z), any_zero=True),
    "clip": Case(lambda x: torch.clip(x, -0.5, 2.0)),
    "clamp_min": Case(lambda x: torch.clamp_min(x, 1.0)),
    "clamp_max": Case(lambda x: torch.clamp_max(x, 1.0)),
    "max": Case(torch.max, any_zero=True),
    "min": Case(torch.min, any_zero=True),
    "greater": Case(torch.greater),
    "greater_equal": Case(torch.greater_equal),
    "less": Case(torch.less),
    "less_equal": Case(torch.less_equal),
    "not_equal": Case(torch.not_equal),
    "isnan": Case(torch.isnan),
    "isinf": Case(torch.isinf),
    "nan_to_num": Case(torch.nan_to_num),
    "nan_to_num/values": Case(lambda x: torch.nan_to_num(x, 1.0, 2.0, -2.0)),
    "and": Case(lambda x, y: (x > 0) & (y > 0)),
    "or": Case(lambda x, y: (x > 0) | (y > 0)),
    "invert": Case(lambda x: ~(x > 0)),
    "bitwise_and": Case(lambda x, y: torch.bitwise_and(x > 0, y > 0)),
    "bitwise_or": Case(lambda x, y: torch.bitwise_or(x > 0, y > 0)),
    "bitwise_not": Case(lambda x: torch.bitwise_not(x > 0)),
    "masked_fill": Case(lambda x, y: x.masked_fill(y > 0, -1.0)),
    "lerp/number": Case(lambda x, y: torch.lerp(x, y, 0.1)),
    "lerp/large": Case(lambda x, y: torch.lerp(x, y, 0.9)),
    "addcmul/number": Case(lambda x, y, z: torch.addcmul(x, y, z, value=-0.3)),
    "addcmul/1": Case(lambda x, y, z: torch.addcmul(x, y, z)),
    "addcdiv/number": Case(lambda x, y, z: torch.addcdiv(x, y, z, value=-0.3)),
    "addcdiv/1": Case(lambda x, y, z: torch.addcdiv(x, y, z)),
    "to": Case(lambda x: x.to(BF16)),
    "to/float16": Case(lambda x: x.to(dtype=F16)),
    "type_as": Case(lambda x, y: x.type_as(y)),
    "float": Case(lambda x: x.float()),
    "double": Case(lambda x: x.double()),
    "bfloat16": Case(lambda x: x.bfloat16()),
    "half": Case(lambda x: x.half()),
    "detach": Case(lambda x: x.detach()),
    "clone": Case(torch.clone),
    "zeros_like": Case(torch.zeros_like),
    "ones_like": Case(torch.ones_like),
    "full_like": Case(lambda x: torch.full_like(x, 0.1)),
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


# -- running a program ----------------------------------------------------------------------------------------------


def arity(case: Case | Reducing) -> int:
    """How many operands a case takes."""
    try:
        return len([p for p in inspect.signature(case.of).parameters.values() if p.default is p.empty])
    except ValueError:  # a function of torch in C does not say
        text = (getattr(case.torch or case.of, "__doc__", None) or case.of.__doc__ or "").strip().splitlines()[0]
        return 2 if "other" in text or "exponent" in text else 1
