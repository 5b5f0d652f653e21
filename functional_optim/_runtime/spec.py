"""TensorSpec: the description of a tensor that a launch depends on."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from .internals import is_zero_tensor


PLAIN = (torch.Tensor, torch.nn.Parameter)  # the classes whose memory a kernel may be handed


class TensorSpec(NamedTuple):
    """Class, dtype, shape, strides and device of a strided tensor.

    Args:
      cls: the class.
      dtype: the dtype.
      shape: the sizes.
      stride: the strides, in elements.
      device: the device.
      lazy: whether the elements are negated or conjugated when they are read, or not stored at all.

    Example:
      >>> TensorSpec.of(torch.zeros(2)) == TensorSpec.of(torch.ones(2))
      True
      >>> TensorSpec.of(torch.zeros(2)) == TensorSpec.of(torch.zeros(3))
      False
    """

    cls: type
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    device: torch.device
    lazy: bool

    @classmethod
    def of(cls, x: torch.Tensor) -> "TensorSpec":
        """The spec of a strided tensor."""
        lazy = x.is_neg() or x.is_conj() or is_zero_tensor(x)
        return cls(type(x), x.dtype, sizes_of(x), _constants(x.stride()), x.device, lazy)

    @property
    def plain(self) -> bool:
        """Whether a kernel may be handed the memory of such a tensor."""
        return self.cls in PLAIN and self.device.type != "meta" and not self.lazy

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last one."""
        if not self.numel:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return int((last + 1) * self.dtype.itemsize)

    @property
    def layout(self) -> tuple[tuple[int, int], ...] | None:
        """Order of the elements in memory, outermost dimension first; None if there are holes or repetitions.

        Two tensors of one shape and layout can be walked side by side by address. Dimensions of size one do not count.
        """
        dims = [(stride, k) for k, (size, stride) in enumerate(zip(self.shape, self.stride, strict=True)) if size != 1]
        dims.sort(reverse=True)
        expected = 1
        for stride, k in reversed(dims):
            if stride != expected:
                return None
            expected *= self.shape[k]
        return tuple(dims)

    @property
    def repeats(self) -> bool:
        """Whether several elements may share one place in memory, as those of an expanded tensor do."""
        if 0 in self.shape:  # empty tensors of NumPy have strides of 0
            return False
        reach = 0  # of the dimensions with smaller strides
        for stride, size in sorted(zip(self.stride, self.shape, strict=True)):
            if size > 1:
                if stride <= reach:
                    return True
                reach += (size - 1) * stride
        return False


def sizes_of(x: torch.Tensor) -> torch.Size:
    """The shape of a tensor; its sizes are numbers, also where a compiler takes them for variables.

    Raises:
      ValueError: sizes are variables of a graph that nothing guards, so it would compute with those of other tensors.
    """
    return torch.Size(_constants(x.shape))


def _constants(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if torch.SymInt not in map(type, sizes):
        return sizes
    if not torch.compiler.is_compiling():
        raise ValueError(
            "sizes of a tensor are symbols, as with `make_fx(..., tracing_mode='symbolic')`, but the operations of a "
            "step follow from its shapes, which such a graph would not be guarded by; trace with "
            "`tracing_mode='fake'`, or use `torch.export.export` or `torch.compile`."
        )
    return tuple(map(int, sizes))


def are_ordinary(*lists: Iterable[torch.Tensor]) -> bool:
    """Whether there are tensors, and all are torch's own, none of them one by which a compiler traces."""
    tensors = list(itertools.chain(*lists))
    return bool(tensors) and all(type(x) in PLAIN for x in tensors)


def lies_outside(x: torch.Tensor, spec: TensorSpec) -> bool:
    """Whether elements of a tensor that has memory lie outside of its storage, which has been freed or cut."""
    return spec.span > 0 and x.storage_offset() * x.element_size() + spec.span > x.untyped_storage().nbytes()


def walk_together(specs: Sequence[TensorSpec]) -> bool:
    """Whether strided tensors of one shape can be walked side by side by address."""
    layouts = {spec.layout for spec in set(specs)}
    return len(layouts) == 1 and None not in layouts


def compute_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype that elements are computed in: float64 if an array holds it, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def specs_of(column: Sequence[Any]) -> list[TensorSpec | None]:
    """The spec of each tensor of a column; None where there is no tensor."""
    return [None if x is None else TensorSpec.of(x) for x in column]
