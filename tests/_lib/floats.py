"""Floating-point arithmetic with one rounding, by fractions."""

import math
import struct
from fractions import Fraction

import torch


def _fma(x: float, y: float, z: float, narrow: bool) -> float:
    """One number; if it is to be rounded to a narrower dtype, to odd, so that this is as good as the only rounding."""
    if not all(map(math.isfinite, (x, y, z))):
        return z if math.isfinite(x) and math.isfinite(y) else x * y + z
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    if exact == 0:
        return x * y + z  # the sign is that of two roundings
    try:
        size = float(abs(exact))
    except OverflowError:
        size = math.inf
    if narrow and size != abs(exact) and size < math.inf:
        size = math.nextafter(size, 0.0) if size > abs(exact) else size
        (bits,) = struct.unpack("q", struct.pack("d", size))
        (size,) = struct.unpack("d", struct.pack("q", bits | 1))
    return size if exact > 0 else -size


def fma(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The product of two tensors and the sum with a third, rounded once, in the dtype of the last."""
    narrow = z.dtype is not torch.float64
    operands = [t.double() for t in torch.broadcast_tensors(x, y, z)]
    numbers = [_fma(*xs, narrow) for xs in zip(*[t.flatten().tolist() for t in operands], strict=True)]
    return torch.tensor(numbers, dtype=torch.float64).reshape(operands[0].shape).to(z.dtype)
