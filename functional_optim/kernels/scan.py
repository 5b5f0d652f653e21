"""What and where tensors are, for thousands of them at once."""

import ctypes
import itertools
import struct
from array import array
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from .build import SERIAL, parallel_address
from .layout import PLAIN, span
from .native import FIELDS, loaded


class Found(NamedTuple):
    """Where the tensors of a list are, as 64-bit integers.

    Args:
      addresses: of their elements.
      versions: of their versions, which parts of one tensor share.
    """

    addresses: bytes
    versions: bytes


class Kinds(NamedTuple):
    """What the tensors of a list are: class, dispatch keys, dtype, device, sizes and strides.

    Args:
      n: length of the list.
      width: length of a description in words.
      kind_of: which description each tensor has, as 32-bit integers; -1 for objects that do not count.
      kinds: the descriptions.
      elements: how many all tensors have together.
    """

    n: int
    width: int
    kind_of: bytes
    kinds: bytes
    elements: int

    @classmethod
    def of(cls, tensors: Sequence[Any], positions: Sequence[int]) -> "Kinds | None":
        """Describes tensors of torch's own classes.

        Args:
          tensors: the list.
          positions: which of its tensors count.

        Returns:
          None, where there is nothing but Python to ask.
        """
        if not loaded:
            return None
        native = loaded[0]
        chosen = [tensors[i] for i in positions]
        width = len(FIELDS) + 2 * max((x.ndim for x in chosen), default=0)
        out = ctypes.create_string_buffer(8 * width * len(chosen))
        if native.describe(native.torch, chosen, len(chosen), width, out) < len(chosen):
            return None
        known: dict[bytes, int] = {}
        kinds: list[int] = []
        raw, size = out.raw, 8 * width
        kind_of = [-1] * len(tensors)
        elements = 0
        for k, i in enumerate(positions):
            words = raw[k * size : (k + 1) * size]
            x = tensors[i]
            if words not in known:
                known[words] = len(known)
                kind = list(struct.unpack(f"{width}q", words))
                kind[FIELDS.index("ITEMSIZE")], kind[FIELDS.index("SPAN")] = x.element_size(), span(x)
                kinds += kind
            kind_of[i] = known[words]
            elements += x.numel()
        packed = struct.pack(f"{len(kind_of)}i", *kind_of), struct.pack(f"{len(kinds)}q", *kinds)
        return cls(len(tensors), width, *packed, elements)


class _Column(ctypes.Structure):
    """Mirrors `column_t`."""

    _fields_ = [
        *(("list", ctypes.py_object), ("n", ctypes.c_int64), ("width", ctypes.c_int64)),
        *(("kind_of", ctypes.c_char_p), ("kinds", ctypes.c_char_p)),
        *(("addresses", ctypes.c_void_p), ("versions", ctypes.c_void_p)),
    ]


SHARE = 256  # tensors; a thread is not worth waking for fewer


def find(kinds: Sequence[Kinds], columns: Sequence[list[Any]]) -> list[Found] | None:
    """Where the tensors of lists are that are what they were described as; None if one is something else.

    Args:
      kinds: what they were.
      columns: the lists.
    """
    if any(len(column) != kind.n for kind, column in zip(kinds, columns, strict=True)):
        return None
    if not columns:
        return []
    native, total = loaded[0], sum(map(len, columns))
    buffer = ctypes.create_string_buffer(16 * total)
    here = ctypes.addressof(buffer)
    table = (_Column * len(columns))()
    starts = [0, *itertools.accumulate(map(len, columns))]
    for k, (kind, column) in enumerate(zip(kinds, columns, strict=True)):
        places = here + 8 * starts[k], here + 8 * (starts[k] + total)
        table[k] = _Column(column, kind.n, kind.width, kind.kind_of, kind.kinds, *places)
    # for tensors that a kernel will not wake other threads for, they are not woken here: if they are busy, that takes
    # longer than the step
    parallel = parallel_address() if max(kind.elements for kind in kinds) > SERIAL else None
    n_threads = min(torch.get_num_threads(), total // SHARE) if parallel else 1
    if not native.scan(native.torch, ctypes.addressof(table), len(columns), parallel, n_threads):
        return None
    numbers = buffer.raw
    parts = [numbers[8 * a : 8 * b] for a, b in itertools.pairwise(starts)]
    versions = [numbers[8 * (total + a) : 8 * (total + b)] for a, b in itertools.pairwise(starts)]
    return list(map(Found, parts, versions))


def count_up(found: Found, positions: "array[int]") -> None:
    """Counts up the versions of tensors, by which autograd notices that they have been written to.

    Args:
      found: where they are; they must still exist.
      positions: which of them, as 64-bit integers.
    """
    native = loaded[0]
    native.count_up(native.torch, found.versions, positions.buffer_info()[0], len(positions))


def count_up_all(tensors: list[torch.Tensor]) -> None:
    """Counts up the versions of all tensors of a list, whatever class they are of."""
    done = 0
    if loaded and tensors:
        native = loaded[0]
        done = native.count_up_all(native.torch, tensors, len(tensors), id(type(tensors[0])))
    torch.autograd.graph.increment_version(tensors[done:])


def addresses(tensors: Sequence[torch.Tensor]) -> bytes:
    """Addresses of tensors, as 64-bit integers."""
    return struct.pack(f"{len(tensors)}q", *map(torch.Tensor.data_ptr, tensors))


def gradients(tensors: list[Any]) -> list[Any]:
    """The gradients of tensors; in half the time if all are of one class, and nothing but torch has a say in it."""
    cls = type(tensors[0]) if tensors else object
    plain = getattr(cls, "grad", None) is torch.Tensor.grad and not torch._C._len_torch_function_stack()
    if loaded and plain and (cls in PLAIN or not torch._C._is_torch_function_enabled()):
        native, found = loaded[0], [None] * len(tensors)
        if native.gradients(native.torch, tensors, len(tensors), id(cls), "grad", found) == len(tensors):
            return found
    return list(map(attrgetter("grad"), tensors))
