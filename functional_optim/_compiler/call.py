"""The arguments of a backend that evaluates programs with torch operations: columns of tensors, a table of numbers."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from .passes import Signature


Column = list[torch.Tensor]  # a tensor per leaf


class Shard(Protocol):
    """The join of leaves with their other parts, where they are parts of tensors that are spread over processes."""

    def combine(self, partials: torch.Tensor, kind: str) -> None:
        """Reduces numbers over processes, in place.

        Args:
          partials: float64 numbers, as many in each process.
          kind: a row of `REDUCTIONS`.
        """

    def __hash__(self) -> int: ...


class LeafTable(NamedTuple):
    """The sizes of leaves, and the numbers that they have.

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
      inputs: a column for each of the program's arrays, then for each of its numbers per leaf.
      outputs: a column to write to for each output, or None for new tensors.
      scalars: the scalar table: rows of numbers, or of tensors that hold one.
      leaves: their sizes and rows.
      shard: the join of the leaves with their other parts, if they have any.
    """

    signature: Signature
    like: Column
    inputs: Sequence[Column]
    outputs: Sequence[Column | None]
    scalars: Sequence[Sequence[float | torch.Tensor]]
    leaves: LeafTable
    shard: Shard | None
