"""Data pointers that are offsets from others: those of views of buffers, and of the members of stacks."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .groups import Columns, Key
from .packing import PackedColumn
from .pointers import Pointers


class Origin(NamedTuple):
    """The origin of tensors of a step: a buffer of a packed column, or an entry of another one.

    Args:
      key: the column.
      position: the position of the buffer or entry.
      packed: whether the column is packed.
    """

    key: Key
    position: int
    packed: bool

    def of(self, columns: Columns) -> Any:
        """The tensor."""
        column: Any = columns[self.key]
        return column.packed.buffers[self.position] if self.packed else column[self.position]


def origin_of(columns: Columns, key: Key, i: int) -> tuple[Origin, int]:
    """The origin of an entry of a column, and its offset there in elements."""
    column = columns[key]
    place = column.place(i) if isinstance(column, PackedColumn) else None
    return (Origin(key, i, False), 0) if place is None else (Origin(key, place.buffer, True), place.offset)


class Offsets:
    """Data pointers as constant offsets from others.

    Args:
      entries: for each pointer, the position of the other one, and the number of bytes behind it.
    """

    def __init__(self, entries: Sequence[tuple[int, int]]) -> None:
        self.index = torch.tensor([k for k, _ in entries], dtype=torch.int64, device="cpu")
        self.bytes = torch.tensor([n for _, n in entries], dtype=torch.int64, device="cpu")

    def __len__(self) -> int:
        return len(self.bytes)

    def write(self, bases: torch.Tensor, pointers: torch.Tensor) -> None:
        """Writes the pointers."""
        torch.add(bases.index_select(0, self.index), self.bytes, out=pointers)


class OffsetPointers:
    """Data pointers of a step that are offsets from those of buffers or stacks.

    Args:
      offsets: the offsets.
      n_bases: number of buffers or stacks.
      pointers: memory for the pointers.

    Attributes:
      bases: memory for the data pointers of buffers or stacks.
      seen: those that `pointers` were written from, as bytes.
    """

    def __init__(self, offsets: Offsets, n_bases: int, pointers: torch.Tensor) -> None:
        self.offsets, self.pointers, self.bases = offsets, pointers, Pointers(n_bases)
        self.base_pointers, self.seen = self.bases.tensor[:n_bases], b""

    def update(self) -> bool:
        """Writes the pointers, unless the bases that have been read are those of the last time.

        Returns:
          Whether they have been written.
        """
        content = self.bases.content()
        if content == self.seen:
            return False
        self.offsets.write(self.base_pointers, self.pointers)
        self.seen = content
        return True

    def put(self, tensors: Sequence[torch.Tensor]) -> None:
        """Writes the pointers for bases that have been made."""
        self.bases.memory[: len(tensors)] = list(map(torch.Tensor.data_ptr, tensors))
        self.offsets.write(self.base_pointers, self.pointers)
