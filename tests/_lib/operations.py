"""Operations that a rule may use, beside those of torch: cases, reductions, and programs that compute them.

Results are compared as integers that count floating-point numbers, so a tolerance of 3 is 3 units in the last place
(ulp), NaN equals NaN, and -0.0 differs from 0.0 by one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy
import pytest
import torch

import functional_optim as fo
from _lib.programs import run_program
from functional_optim._compiler import trace
from functional_optim._compiler.functions import fused_mean, fused_mean_square, fused_number, fused_shrink
from functional_optim._runtime.backend import BACKENDS


F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


INF, NAN = math.inf, math.nan


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
    # in float64 for an argument of any dtype, so a float32 program rounds once more than torch does
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


def specials(dtype: torch.dtype) -> torch.Tensor:
    """Numbers at which something changes."""
    f = torch.finfo(dtype)
    least = f.smallest_normal * f.eps
    positive = [
        *(0.0, least, 0.7 * f.smallest_normal, f.smallest_normal, 1e-20, 1e-6, 1e-4, 0.01, 1 / 3, 0.5, 1 - f.eps / 2),
        *(1.0, 1 + f.eps, 1.5, 2.0, 3.0, math.pi, 10.5, 80.0, 1e4 + 0.1, 1e10, 1e30, f.max, INF),
    ]
    return torch.tensor([NAN, *(s * x for x in positive for s in (1, -1))], dtype=dtype)


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


ON_EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


DTYPES = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
