"""Refusing to write to memory that two tensors of a step share."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .spec import TensorSpec


class SharedMemoryError(ValueError):
    """Tensors that a step writes share memory.

    Args:
      first, second: the tensors, as messages call them; the same if several elements of one share memory.
    """

    def __init__(self, first: str, second: str) -> None:
        super().__init__(self.text(first, second, "a step", "pass a tied parameter once, or clone one of the two"))
        self.first, self.second = first, second

    @staticmethod
    def text(first: str, second: str, writer: str, remedy: str) -> str:
        """The message of an error in the words of a caller: of the writer, and the way out."""
        if first == second:
            return (
                f"{first} is an expanded tensor or a view of windows, several of whose elements share memory, so "
                f"{writer} cannot write to it; pass `x.clone()`."
            )
        return (
            f"{first} and {second} share memory, so {writer}, which writes in place, would corrupt them. "
            f"{remedy[0].upper()}{remedy[1:]}."
        )

    def for_donation(self) -> ValueError:
        """The same error in the words of `donate=True`."""
        remedy = "pass a tied parameter once, clone one of the two, or use donate=False"
        return ValueError(self.text(self.first, self.second, "donate=True", remedy))


class Clash(NamedTuple):
    """Positions of two tensors that share memory; the first one is read or written, the second one is written."""

    first: int
    second: int


class OverlapCheck:
    """Search for two tensors that share an element which one of them writes.

    Args:
      specs: the specs.
      written: for each tensor, whether it is written; the others are read.

    Example:
      >>> x = torch.zeros(4, 2)
      >>> def find(tensors, written):
      ...     return OverlapCheck([TensorSpec.of(t) for t in tensors], written).find([t.data_ptr() for t in tensors])
      >>> find([x[:, 0], x[:, 1]], [True, True])
      >>> find([x, x], [True, False])
      Clash(first=1, second=0)
    """

    def __init__(self, specs: Sequence[TensorSpec], written: Sequence[bool]) -> None:
        spans = {spec: spec.span for spec in set(specs)}
        self.specs = specs
        self.spans = torch.tensor([spans[spec] for spec in specs], dtype=torch.int64, device="cpu")
        self.writes = torch.tensor(written, dtype=torch.bool, device="cpu")

    def find(self, addresses: torch.Tensor | Sequence[int]) -> Clash | None:
        """The first clash, or None.

        Args:
          addresses: data pointers, all but those of tensors without elements.
        """
        starts = torch.as_tensor(addresses, dtype=torch.int64, device="cpu")
        stops, (first, order) = starts + self.spans, starts.sort(stable=True)
        # `stops[order]` would start threads, and wait for them, for a few thousand numbers
        if bool((stops.index_select(0, order)[:-1] <= first[1:]).all()):
            return None  # each ends before the next one starts
        if ((starts == 0) & (self.spans > 0)).any():
            return None  # tensors on meta, or wrappers without memory of their own
        order = order[stops[order] > first]  # tensors without elements share nothing
        # the extent of all that is written before a tensor starts reaches into it, or it reaches into one that is
        # written
        ends = torch.where(self.writes, stops, torch.iinfo(torch.int64).min)[order].cummax(0).values
        before = torch.where(ends.roll(1) > starts[order], 1, 0)
        before[:1] = 0
        reads = stops[order].cummax(0).values.roll(1) > starts[order]
        reads[:1] = False
        suspects = (before.bool() | (reads & self.writes[order])).nonzero()[:, 0].tolist()
        for k in suspects:
            found = self._find_earlier(k, order, starts, stops)
            if found is not None:
                return found
        return None

    def _find_earlier(self, k: int, order: torch.Tensor, starts: torch.Tensor, stops: torch.Tensor) -> Clash | None:
        """A clash of a tensor with one that starts before it."""
        i = int(order[k])
        earlier = order[:k]
        for j in earlier[(stops[earlier] > starts[i]) & (self.writes[earlier] | self.writes[i])].tolist():
            if _share_elements((int(starts[i]), self.specs[i]), (int(starts[j]), self.specs[j])):
                return Clash(j, i) if self.writes[i] else Clash(i, j)
        return None


def _share_elements(a: tuple[int, TensorSpec], b: tuple[int, TensorSpec]) -> bool:
    """Whether tensors whose extents overlap may have a byte in common.

    Each is a comb: blocks of contiguous bytes at multiples of its larger strides. Views that interleave, such as the
    columns of a matrix or the real and imaginary parts of a complex tensor, keep apart modulo the common divisor.
    """
    (address_a, spec_a), (address_b, spec_b) = a, b
    (block_a, strides_a), (block_b, strides_b) = _comb(spec_a), _comb(spec_b)
    period = math.gcd(*strides_a, *strides_b)
    if not period:
        return True
    offset = (address_b - address_a) % period
    return offset < block_a or offset + block_b > period


def _comb(spec: TensorSpec) -> tuple[int, list[int]]:
    """Bytes of a contiguous block, and the strides in bytes at which blocks repeat."""
    block = spec.dtype.itemsize
    strides: list[int] = []
    for stride, size in sorted(zip(spec.stride, spec.shape, strict=True)):
        step = stride * spec.dtype.itemsize
        if size > 1 and not strides and step == block:
            block *= size
        elif size > 1:
            strides.append(step)
    return block, strides
