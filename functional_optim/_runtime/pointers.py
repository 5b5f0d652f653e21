"""The check of all tensors of a step, and their data pointers, in one operation.

With a C compiler both are one loop of `pointers.c`, an operation that torch dispatches like any other. Without one both
are done in Python, for kernels of Triton, too, such as those that its interpreter runs.
"""

import contextlib
import ctypes
import functools
from collections.abc import Sequence
from operator import attrgetter, eq, le, or_
from typing import Any, NamedTuple

import torch

from .._compiler.cache import BuildError
from .internals import has_members, is_zero_tensor
from .library import ITEM, SPAN, library, operations, spec_rows
from .spec import TensorSpec, lies_outside


class Difference(NamedTuple):
    """The first tensor that is not as its spec says.

    Args:
      position: its position among the tensors of the step.
      outside: whether the spec is right, but the storage has been freed or cut.
    """

    position: int
    outside: bool


class Pointers:
    """Memory for the data pointers of a step, for the status of reading them, and for pointers to new tensors.

    Args:
      n: number of tensors to be read.
      n_new: number of new tensors.
      n_shared: number of repeated pointers, after these.
    """

    def __init__(self, n: int, n_new: int = 0, n_shared: int = 0) -> None:
        self.n, self.memory = n, (ctypes.c_int64 * (n + 1 + n_new + n_shared))()
        with torch.inference_mode(False):  # steps outside of that mode write to it, too
            self.tensor = torch.frombuffer(self.memory, dtype=torch.int64)
            self.new = self.tensor[n + 1 : n + 1 + n_new]
        self.address = ctypes.addressof(self.memory)

    def content(self) -> bytes:
        """The pointers that have been read, as bytes."""
        return ctypes.string_at(self.address, 8 * self.n)

    def all_content(self) -> bytes:
        """All pointers, those to new tensors too, as bytes."""
        return ctypes.string_at(self.address, 8 * len(self.memory))


class PointerOrder:
    """Pointers in the order of the columns of kernels.

    Args:
      positions: the position of each among the pointers of a step.

    Example:
      >>> pointers, found = Pointers(3), Pointers(2)
      >>> pointers.memory[:3] = [16, 32, 40]
      >>> PointerOrder([2, 0]).copy(pointers, 0, 2, found.address)
      56
      >>> found.memory[:2]
      [40, 16]
    """

    def __init__(self, positions: Sequence[int]) -> None:
        self.positions = (ctypes.c_int64 * len(positions))(*positions)
        self.start = ctypes.addressof(self.positions)
        self.function: Any = None
        with contextlib.suppress(BuildError):
            self.function = library().order_pointers
            self.function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
            self.function.restype = ctypes.c_int64

    def copy(self, pointers: Pointers, first: int, last: int, address: int) -> int:
        """Copies a run of pointers.

        Args:
          pointers: the pointers of a step.
          first: the first one of the run.
          last: the end of the run.
          address: host memory for it.

        Returns:
          The bitwise or of all that were copied, whose low bits tell what they are multiples of.
        """
        n = last - first
        if self.function is not None:
            return int(self.function(pointers.address, self.start + 8 * first, n, address))
        found: list[ctypes.c_int64 | int] = [pointers.memory[k] for k in self.positions[first:last]]
        (ctypes.c_int64 * n).from_address(address)[:] = found
        return functools.reduce(or_, (pointers.memory[k] for k in self.positions[first:last]), 0)


class PointerReader:
    """Compares the tensors of a step with its specs, and reads their data pointers.

    Args:
      tensors: the tensors that the step is bound to.
      specs: their specs.

    Example:
      >>> x = torch.zeros(2)
      >>> reader = PointerReader([x], [TensorSpec.of(x)])
      >>> pointers = Pointers(1)
      >>> reader.read([torch.ones(2)], pointers), reader.read([torch.ones(3)], pointers)
      (None, Difference(position=0, outside=False))
    """

    def __init__(self, tensors: Sequence[torch.Tensor], specs: Sequence[TensorSpec]) -> None:
        self.specs = list(specs)
        self.classes = frozenset(spec.cls for spec in specs)
        self.plain = all(spec.plain for spec in set(specs))
        self.stored = all(spec.device.type != "meta" and not spec.lazy for spec in set(specs))
        registered = operations() if self.plain and specs else None
        self.spare: list[Pointers] = []  # memory that no thread uses, for `fits`
        self.operation = None
        if registered is not None and not any(map(has_members, tensors)):
            self.operation = registered.read_pointers.default
            self._describe(tensors)
        else:
            self.asked = [(torch.strided, spec.dtype, spec.shape, spec.device) for spec in specs]
            self.strides = [spec.stride for spec in specs]
            self.offsets = [x.storage_offset() if self.plain else 0 for x in tensors]
            # bytes of a storage up to the last element
            self.ends = [
                spec.span and offset * spec.dtype.itemsize + spec.span
                for spec, offset in zip(specs, self.offsets, strict=True)
            ]

    def _describe(self, tensors: Sequence[torch.Tensor]) -> None:
        """Fills the table of specs, a row for each that differs."""
        rows = {spec: k for k, spec in enumerate(dict.fromkeys(self.specs))}
        examples = dict(zip(self.specs, tensors, strict=True))
        self.spec_index = torch.tensor([rows[spec] for spec in self.specs], dtype=torch.int64, device="cpu")
        self.table = spec_rows([examples[spec] for spec in rows], max((len(spec.shape) for spec in rows), default=0))
        for spec, k in rows.items():
            self.table[k, SPAN], self.table[k, ITEM] = spec.span, spec.dtype.itemsize

    def read(self, tensors: Sequence[Any], pointers: Pointers) -> Difference | None:
        """Compares tensors, and reads their data pointers where the operation is at hand.

        Args:
          tensors: the tensors of this step.
          pointers: memory for as many pointers.

        Returns:
          The first difference, or None.
        """
        if not self.classes.issuperset(map(type, tensors)):
            return Difference(next(k for k, x in enumerate(tensors) if type(x) not in self.classes), False)
        if self.operation is None:
            found = None if self._fit(tensors) else self._find_difference(tensors)
            if found is None and self.stored:
                data_ptr = torch.Tensor.data_ptr if self.plain else _data_ptr
                pointers.memory[: pointers.n] = list(map(data_ptr, tensors))
            return found
        pointers.memory[pointers.n] = 0  # stays where torch finds another implementation than ours, as for meta tensors
        self.operation(tensors, self.spec_index, self.table, pointers.tensor)
        status = pointers.memory[pointers.n]
        return None if status < 0 else Difference(status >> 1, bool(status & 1))

    def fits(self, tensors: Sequence[Any]) -> bool:
        """Whether tensors have the specs, and all elements are in their storages, for callers that need no pointers."""
        try:
            pointers = self.spare.pop()
        except IndexError:
            pointers = Pointers(len(self.specs))
        found = self.read(tensors, pointers)
        self.spare.append(pointers)
        return found is None

    def _fit(self, tensors: Sequence[Any]) -> bool:
        """Whether tensors are as they were when the step was bound, asked of all at once.

        If not, they may fit nevertheless: offsets in storages are compared, too, which specs leave open.
        """
        return (
            self.plain
            and all(map(eq, map(_ASK, tensors), self.asked))  # no lists: 700 tuples start the garbage collector
            and all(map(eq, map(torch.Tensor.stride, tensors), self.strides))
            and not any(any(map(ask, tensors)) for ask in _ASK_LAZY)
            and list(map(_OFFSET, tensors)) == self.offsets
            and all(map(le, self.ends, map(_NBYTES, map(_STORAGE, tensors))))
        )

    def _find_difference(self, tensors: Sequence[Any]) -> Difference | None:
        for k, (x, spec) in enumerate(zip(tensors, self.specs, strict=True)):
            if x.layout is not torch.strided or not _same(TensorSpec.of(x), spec):
                return Difference(k, False)
            if spec.plain and lies_outside(x, spec):
                return Difference(k, True)
        return None


_ASK = attrgetter("layout", "dtype", "shape", "device")
_ASK_LAZY = torch.Tensor.is_neg, torch.Tensor.is_conj, is_zero_tensor
_OFFSET, _STORAGE, _NBYTES = torch.Tensor.storage_offset, torch.Tensor.untyped_storage, torch.UntypedStorage.nbytes


def _same(a: TensorSpec, b: TensorSpec) -> bool:
    """Whether two specs are equal, parameters and tensors taken for the same."""
    return a == b or (a.plain and b.plain and a._replace(cls=b.cls) == b)


def _data_ptr(x: torch.Tensor) -> int:
    """The data pointer of a tensor; 0 for a wrapper, which has none."""
    try:
        return x.data_ptr()
    except RuntimeError:
        return 0
