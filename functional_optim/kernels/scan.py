"""What and where tensors are, for thousands of them at once."""

import ctypes
import enum
import struct
from collections.abc import Sequence
from types import MemberDescriptorType
from typing import Any, NamedTuple

import torch

from .._compiler.c.threads import SERIAL, parallel_address
from .layout import span
from .native import FIELDS, loaded


class Found(NamedTuple):
    """Where the tensors of a list are, as 64-bit integers.

    Args:
      addresses: of their elements.
      versions: of their versions, which parts of one tensor share.
      outers: of the versions of the distributed tensors that they are parts of.
    """

    addresses: bytes
    versions: bytes
    outers: bytes = b""


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


class What(enum.Enum):
    """What is taken from a tensor."""

    ITSELF = enum.auto()
    GRADIENT = enum.auto()


class Take(NamedTuple):
    """What a list of tensors is filled with.

    Args:
      objects: for each tensor, the tensor itself, one whose gradient it is, or a dict.
      what: what is taken from a tensor, or the key in the dict.
      part: if it is a tensor of this class, what it has in this slot is meant.
    """

    objects: list[Any]
    what: What | str
    part: tuple[type, str] | None = None

    @property
    def is_outer(self) -> bool:
        """Whether the tensors themselves are looked at, and others in them are meant."""
        return self.part is not None and self.what is What.ITSELF


class _Column(ctypes.Structure):
    """Mirrors `column_t`."""

    _fields_ = [
        *(("list", ctypes.c_void_p), ("n", ctypes.c_int64), ("width", ctypes.c_int64)),
        *((name, ctypes.c_char_p) for name in ("kind_of", "kinds", "addresses", "versions")),
        *(("from_", ctypes.c_void_p), ("key", ctypes.c_void_p), ("gradient", ctypes.c_int64)),
        *(("raw", ctypes.c_char_p), ("outer", ctypes.c_void_p), ("slot", ctypes.c_int64), ("outers", ctypes.c_char_p)),
    ]


SHARE = 256  # tensors; a thread is not worth waking for fewer


class Search:
    """Finds the tensors of lists that are what they were described as.

    Args:
      kinds: what they were, for each list.
      takes: what each list is filled with, if it is not full already.
    """

    def __init__(self, kinds: Sequence[Kinds], takes: Sequence[Take | None]) -> None:
        self.kinds, self.takes = kinds, takes
        self.table = (_Column * len(kinds))()  # to be copied: two threads may search at once
        for c, kind, take in zip(self.table, kinds, takes, strict=True):
            c.n, c.width, c.kind_of, c.kinds = kind.n, kind.width, kind.kind_of, kind.kinds
            if take is not None:
                c.from_, c.gradient = id(take.objects), take.what is What.GRADIENT
                c.key = id(take.what) if isinstance(take.what, str) else None
                c.raw = bytes(8 * kind.n)  # C writes to it and reads it again, with the interpreter's lock all the time
                if take.part is not None:
                    c.outer, c.slot = id(take.part[0]), _slots[take.part]
        self.lengths = [kind.n for kind in kinds]
        self.elements = max((kind.elements for kind in kinds), default=0)
        self.most_threads = sum(self.lengths) // SHARE

    def find(self, columns: Sequence[list[Any]]) -> list[Found] | None:
        """Where the tensors of lists are; None if one is something else.

        Args:
          columns: the lists; those to be filled have their length already.
        """
        sources = [column if take is None else take.objects for column, take in zip(columns, self.takes, strict=True)]
        if list(map(len, columns)) != self.lengths or list(map(len, sources)) != self.lengths:
            return None
        if not columns:
            return []
        found, table = [], type(self.table).from_buffer_copy(self.table)
        for c, column, take in zip(table, columns, self.takes, strict=True):
            size = 8 * c.n
            # C fills them before anybody else sees them
            places = Found(bytes(size), bytes(size), bytes(size if take is not None and take.is_outer else 0))
            c.list, c.addresses, c.versions, c.outers = id(column), *places[:2], places.outers or None
            found.append(places)
        # for tensors that a kernel will not wake other threads for, they are not woken here: if they are busy, that
        # takes longer than the step
        parallel = parallel_address() if self.elements > SERIAL else None
        n_threads = min(torch.get_num_threads(), self.most_threads) if parallel else 1
        native, place = loaded[0], ctypes.addressof(table)
        return found if native.scan(native.torch, place, len(columns), parallel, n_threads) else None


def find(kinds: Sequence[Kinds], columns: Sequence[list[Any]]) -> list[Found] | None:
    """Where the tensors of lists are that are what they were described as; None if one is something else.

    Args:
      kinds: what they were.
      columns: the lists.
    """
    return Search(kinds, [None] * len(kinds)).find(columns)


def addresses(tensors: Sequence[torch.Tensor]) -> bytes:
    """Addresses of tensors, as 64-bit integers."""
    return struct.pack(f"{len(tensors)}q", *map(torch.Tensor.data_ptr, tensors))


def pick(numbers: bytes, positions: bytes) -> bytes:
    """Some of the 64-bit integers that `Found` has, by their positions, which are such integers too."""
    picked, native = bytes(len(positions)), loaded[0]  # C fills it before anybody else sees it
    native.pick(native.torch, numbers, positions, len(positions) // 8, picked)
    return picked


def part_of(tensor: Any, name: str) -> tuple[type, str] | None:
    """What `Take.part` is for tensors like this one; None if it is not clear where in memory they have it."""
    cls = type(tensor)
    if isinstance(getattr(cls, name, None), MemberDescriptorType) and (cls, name) not in _slots:
        words = (ctypes.c_uint64 * (cls.__basicsize__ // 8)).from_address(id(tensor))
        places = [k for k, x in enumerate(words) if x == id(getattr(tensor, name))]
        if len(places) == 1:
            _slots[cls, name] = places[0]
    return (cls, name) if (cls, name) in _slots else None


_slots: dict[tuple[type, str], int] = {}  # which word of an object it is
