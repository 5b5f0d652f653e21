"""Start of every emitted module of Triton: functions that its kernels call."""

# fp32 division and square root are approximate in Triton unless asked for by these names
HEADER = """\
import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def _div(x, y):
    z = x / y
    if z.dtype == tl.float32:
        z = tl.div_rn(x, y)
    return z


@triton.jit
def _sqrt(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    return tl.sqrt(x)


@triton.jit
def _bf16(x):
    # of float32, to nearest even; the interpreter, which would truncate, has a function of its own in this place
    return x.to(tl.bfloat16)


@triton.jit
def _array(place, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(place).to(tl.pointer_type(dtype))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _count(place):
    counter = tl.load(place).to(tl.pointer_type(tl.int64))
    tl.store(counter, tl.load(counter) + 1)


@triton.jit
def _near(x):
    # two factors of a number of up to 2**240, both in the range of float32; the second is 1 where the number is in it
    small = tl.abs(x) < 7.52316384526264e-37
    y = tl.where(x < -1.329227995784916e36, -1.329227995784916e36, x)
    y = tl.where(x > 1.329227995784916e36, 1.329227995784916e36, y)
    return tl.where(small, 7.52316384526264e-37, y).to(tl.float32)


@triton.jit
def _far(x):
    out = (tl.abs(x) < 7.52316384526264e-37) | (tl.abs(x) > 1.329227995784916e36)
    return tl.where(out, x / _near(x).to(tl.float64), 1.0).to(tl.float32)


@triton.jit
def _high(x):
    # two terms of a number in float32, the second of which is what the first has no digits for
    return x.to(tl.float32)


@triton.jit
def _low(x):
    y = x - x.to(tl.float32).to(tl.float64)
    return tl.where(y - y == 0, y, 0.0).to(tl.float32)


@triton.jit
def _total_sum(start, n):
    y = tl.zeros((1024,), tl.float64)
    for i in range(0, n, 1024):
        k = i + tl.arange(0, 1024)
        y += tl.load(start + k, k < n, 0.0)
    return tl.sum(y)


@triton.jit
def _amax(x):
    bad = tl.sum((x != x).to(tl.int32))
    y = tl.max(tl.where(x != x, float("-inf"), x))
    return tl.where(bad > 0, float("nan"), y)


@triton.jit
def _total_amax(start, n):
    y = tl.full((1024,), float("-inf"), tl.float64)
    for i in range(0, n, 1024):
        k = i + tl.arange(0, 1024)
        x = tl.load(start + k, k < n, float("-inf"))
        y = tl.where((x > y) | (x != x), x, y)
    return _amax(y)
"""
