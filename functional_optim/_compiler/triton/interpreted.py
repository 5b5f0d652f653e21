"""Stand-ins in Triton's interpreter, which runs kernels with NumPy: libdevice, of which it has none, and a rounding."""

import ctypes
import functools
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


# functions that NumPy has by the same name
SAME = (
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "sinh", "cosh", "tanh"),
    *("hypot", "floor", "ceil", "trunc", "rint", "copysign", "fmod"),
)


@functools.lru_cache(maxsize=1)
def libdevice() -> SimpleNamespace:
    """Functions of the names and meanings of `triton.language.extra.libdevice`, on tensors of the interpreter."""
    import numpy
    import torch

    def erf(x: Any) -> Any:
        return torch.erf(torch.from_numpy(x)).numpy()

    def cbrt(x: Any) -> Any:
        # NumPy's own is that of the C library on machines without AVX-512, off by up to 4 units in double precision;
        # the caller rounds the result to the dtype of `x`
        return numpy.cbrt(x.astype(numpy.longdouble))

    functions = {name: getattr(numpy, name) for name in SAME}
    functions |= {
        "atan": numpy.arctan,
        "atan2": numpy.arctan2,
        "pow": numpy.power,
        "erf": erf,
        "cbrt": cbrt,
        "fma": _fma(),
    }
    return SimpleNamespace(**{name: _on_tensors(function) for name, function in functions.items()})


def to_bf16() -> Callable[..., Any]:
    """The rounding of float32 to bfloat16, to nearest even; the interpreter's own conversion truncates."""
    import torch

    return _on_tensors(lambda x: torch.from_numpy(x).bfloat16().float().numpy())


def _fma() -> Callable[..., Any]:
    """The fused multiply-add of the C library, on arrays; NumPy has none."""
    import numpy

    library = ctypes.CDLL(None)
    exact = {}
    for dtype, name, ctype in ((numpy.float32, "fmaf", ctypes.c_float), (numpy.float64, "fma", ctypes.c_double)):
        function = getattr(library, name)
        function.argtypes, function.restype = [ctype] * 3, ctype
        exact[numpy.dtype(dtype)] = numpy.frompyfunc(function, 3, 1)

    def fma(x: Any, y: Any, z: Any) -> Any:
        return exact[z.dtype](x, y, z)

    return fma


def _on_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays as one of tensors of the interpreter."""

    def call(*operands: Any) -> Any:
        import numpy
        import triton.language as tl

        like = functools.reduce(operator.add, operands)  # of the shape and dtype of the result
        with numpy.errstate(all="ignore"):
            data = numpy.asarray(function(*[x.handle.data for x in operands]), dtype=like.handle.data.dtype)
        return tl.core.tensor(type(like.handle)(data, like.handle.dtype), like.type)

    return call
