"""What backends are called with: columns of tensors, and a table of numbers."""

from collections.abc import Hashable, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch

from .addresses import addresses, guarded_addresses
from .alike import look
from .plan import Signature


class Column(list[torch.Tensor]):
    """A tensor per leaf.

    Args:
      tensors: the tensors.
      guarded: whether a `Guard` of plain tensors holds for all that anybody asks for.
    """

    def __init__(self, tensors: Iterable[torch.Tensor] = (), guarded: bool = False) -> None:
        super().__init__(tensors)
        self.guarded = guarded
        self.held: Any = None  # what whoever prepares steps knows of the tensors from the last one

    @cached_property
    def addresses(self) -> bytes:
        """Where the tensors are, as 64-bit integers. Asked for once the column is complete."""
        return guarded_addresses(self) if self.guarded else addresses(self)

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


class Call(NamedTuple):
    """One evaluation of a program over the leaves that share it.

    Args:
      signature: the program and its dtypes.
      like: a column of tensors whose shape, layout and device new ones take.
      inputs: a column (one tensor per leaf) for each of the program's arrays, then for each of its numbers per leaf.
      outputs: a column to write to for each output, or None for new tensors.
      scalars: the scalar table: rows of numbers, or of tensors that hold one.
      rows: each leaf's row.
      sizes: each leaf's number of elements.
      shard: what joins the leaves to their other parts, if they have any.
      wholes: each leaf's number of elements, all parts counted.
    """

    signature: Signature
    like: Column
    inputs: Sequence[Column]
    outputs: Sequence[Column | None]
    scalars: Sequence[Sequence[float | torch.Tensor]]
    rows: tuple[int, ...]
    sizes: tuple[int, ...]
    shard: Shard | None
    wholes: tuple[int, ...]
