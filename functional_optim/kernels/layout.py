"""What a kernel may be handed: dtypes, common layouts, and memory that does not overlap."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


PLAIN = (torch.Tensor, torch.nn.Parameter)  # torch's own classes
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Meta(NamedTuple):
    """What a kernel is told of a tensor, and what must be the same at the next call for its tables to hold."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device


def meta(x: torch.Tensor) -> Meta:
    """The metadata of a strided tensor."""
    return Meta(x.dtype, tuple(x.shape), tuple(x.stride()), x.device)


def layout(m: Meta) -> tuple[tuple[int, int], ...] | None:
    """How elements follow one another in memory, outermost first; None if there are holes or repetitions.

    Two tensors of one shape and layout can be walked through side by side by address. Dimensions of size one do not
    count.
    """
    dims = sorted(
        ((stride, k) for k, (size, stride) in enumerate(zip(m.shape, m.stride, strict=True)) if size != 1), reverse=True
    )
    expected = 1
    for stride, k in reversed(dims):
        if stride != expected:
            return None
        expected *= m.shape[k]
    return tuple(dims)


def walk_together(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether strided tensors of one shape can be walked through side by side by address."""
    if all(x.is_contiguous() for x in tensors):
        return True
    layouts = {layout(meta(x)) for x in tensors}
    return len(layouts) == 1 and None not in layouts


def repeats(x: torch.Tensor) -> bool:
    """Whether several elements of a tensor may share one place in memory, as those of an expanded one do."""
    if x.is_contiguous():
        return False
    reach = 0  # of the dimensions with smaller strides
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def compute_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype that elements are computed in: float64 if any array holds it, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


class Extents:
    """Stretches of memory that are about to be written.

    Args:
      starts: their addresses.
      spans: their lengths in bytes; those of none do not count.

    Example:
      >>> x = torch.zeros(4)
      >>> written = Extents(torch.tensor([x.data_ptr()]), torch.tensor([span(x)]))
      >>> written.touched(torch.tensor([x[3:].data_ptr()]), torch.tensor([4]))
      (0, 0)
    """

    def __init__(self, starts: torch.Tensor, spans: torch.Tensor) -> None:
        there = spans.nonzero()[:, 0]
        self.order = there[starts[there].argsort(stable=True)]
        self.starts = starts[self.order]
        self.stops = self.starts + spans[self.order]

    def clash(self) -> tuple[int, int] | None:
        """Positions of two stretches that overlap."""
        bad = (self.starts[1:] < self.stops[:-1]).nonzero()
        return (int(self.order[bad[0, 0]]), int(self.order[bad[0, 0] + 1])) if len(bad) else None

    def touched(self, starts: torch.Tensor, spans: torch.Tensor) -> tuple[int, int] | None:
        """Position of the first of some tensors that overlaps a stretch, and the position of that stretch.

        Args:
          starts: addresses of the tensors.
          spans: their lengths in bytes.
        """
        if not len(self.order):
            return None
        before = torch.searchsorted(self.starts, starts + spans) - 1  # the last stretch that starts before it ends
        bad = (before >= 0) & (self.stops[before.clamp(0)] > starts) & (spans > 0)
        if not bad.any():
            return None
        first = int(bad.nonzero()[0])
        return first, int(self.order[before[first]])


def span(x: torch.Tensor) -> int:
    """Bytes from the first to the last element of a tensor."""
    if not x.numel() or x.is_contiguous():
        return x.numel() * x.element_size()
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return int((last + 1) * x.element_size())
