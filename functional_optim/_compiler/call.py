"""The arguments of a backend that evaluates programs with torch operations: columns of tensors, a table of numbers."""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from .passes import Signature
from .program import Value


Column = list[torch.Tensor]  # a tensor per leaf
# a leaf and its reduction; or a reduction over the tree and a shard
ReductionKey = tuple[int, int] | tuple[str, Hashable]


def reduction_key(value: Value, i: int, leaf: int, shard: Hashable) -> ReductionKey:
    """The key of a reduction over a leaf that is in parts.

    Args:
      value: the reduction.
      i: its position in the program.
      leaf: the position of the leaf.
      shard: the processes that have the other parts.
    """
    return (value.name, shard) if value.spans_tree else (leaf, i)


class Join(Protocol):
    """Reductions over leaves that are parts of tensors spread over processes. All processes call it alike."""

    @property
    def stages(self) -> int:
        """Number of stages, the first of which has nothing to join."""

    def __call__(
        self, stage: int, parts: Mapping[ReductionKey, Sequence[torch.Tensor]]
    ) -> Mapping[ReductionKey, torch.Tensor]:
        """Completes the reductions that end before a stage.

        Args:
          stage: the stage.
          parts: numbers of this process, some for each reduction; none where it has no part.

        Returns:
          A number for every reduction.
        """


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
      positions: each leaf's position in the tree.
      shard: the processes that have other parts of the leaves, if there are any.
    """

    signature: Signature
    like: Column
    inputs: Sequence[Column]
    outputs: Sequence[Column | None]
    scalars: Sequence[Sequence[float | torch.Tensor]]
    leaves: LeafTable
    positions: tuple[int, ...]
    shard: Hashable
