"""What backends are called with: columns of tensors, and a table of numbers."""

import struct
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import NamedTuple, Protocol

import torch

from .._compiler.passes import Signature
from .alike import look
from .scan import Found, addresses, pick


class Part:
    """Some of the tensors of a column.

    Args:
      positions: which, at least one.
    """

    def __init__(self, positions: Sequence[int]) -> None:
        # a getter of one thing returns no tuple
        self.get = itemgetter(*positions) if len(positions) > 1 else itemgetter(slice(positions[0], positions[0] + 1))
        self.positions = struct.pack(f"{len(positions)}q", *positions)


class Column(list[torch.Tensor]):
    """A tensor per leaf.

    Args:
      tensors: the tensors.
    """

    def __init__(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        super().__init__(tensors)
        self.found: Found | None = None  # where they are, once a `Guard` has seen
        self.seen = False  # whether it is made of columns that a `Guard` has seen
        self.parts: dict[Part, Column] = {}

    def locate(self, found: Found | None) -> None:
        """Notes where the tensors are, or that it is not known."""
        self.found = found
        self.parts.clear()
        if found is None:
            self.__dict__.pop("addresses", None)
        else:
            self.addresses = found.addresses

    @classmethod
    def of(cls, places: Sequence[tuple["Column", int]]) -> "Column":
        """Some tensors of other columns.

        Args:
          places: columns and positions.
        """
        made = cls(column[i] for column, i in places)
        columns = {id(column): column for column, _ in places}
        if all(column.found is not None for column in columns.values()):
            known = {key: memoryview(column.addresses).cast("q") for key, column in columns.items()}
            made.seen, made.addresses = True, struct.pack(f"{len(made)}q", *[known[id(c)][i] for c, i in places])
        return made

    def part(self, which: Part) -> "Column":
        """Some tensors of this column, which is complete; what has been taken before is remembered."""
        made = self.parts.get(which)
        if made is None:
            made = self.parts[which] = Column(which.get(self))
            if self.found is not None:
                made.seen, made.addresses = True, pick(self.found.addresses, which.positions)
        return made

    @cached_property
    def addresses(self) -> bytes:
        """Where the elements of the tensors are, as 64-bit integers. Asked for once the column is complete."""
        return addresses(self)

    @cached_property
    def looks(self) -> list[Hashable]:
        """What the tensors look like. Asked for once the column is complete."""
        return list(map(look, self))


class Shard(Protocol):
    """What joins leaves to their other parts, if they are parts of tensors that are spread over processes."""

    def combine(self, partials: torch.Tensor, kind: str) -> None:
        """Reduces numbers over processes, in place.

        Args:
          partials: float64 numbers, as many in each process.
          kind: a row of `REDUCTIONS`.
        """

    def __hash__(self) -> int: ...


@dataclass(frozen=True, eq=False)  # what is made of it is remembered by what it is, not by thousands of numbers
class LeafTable:
    """How large leaves are, and which numbers they have.

    Args:
      sizes: each leaf's number of elements.
      wholes: each leaf's number of elements, all parts counted.
      rows: each leaf's row of the scalar table.
    """

    sizes: tuple[int, ...]
    wholes: tuple[int, ...]
    rows: tuple[int, ...]


class Call(NamedTuple):
    """One evaluation of a program over the leaves that share it.

    Args:
      signature: the program and its dtypes.
      like: a column of tensors whose shape, layout and device new ones take.
      inputs: a column (one tensor per leaf) for each of the program's arrays, then for each of its numbers per leaf.
      outputs: a column to write to for each output, or None for new tensors.
      scalars: the scalar table: rows of numbers, or of tensors that hold one.
      leaves: their sizes and rows.
      shard: what joins the leaves to their other parts, if they have any.
    """

    signature: Signature
    like: Column
    inputs: Sequence[Column]
    outputs: Sequence[Column | None]
    scalars: Sequence[Sequence[float | torch.Tensor]]
    leaves: LeafTable
    shard: Shard | None
