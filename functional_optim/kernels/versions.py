"""Counting up the versions of tensors that kernels have written to, by which autograd notices writes."""

from array import array
from collections.abc import Sequence

import torch

from .call import Column
from .native import loaded


def count_up(column: Column, positions: "array[int]") -> None:
    """Counts up the versions of tensors. Tensors made in inference mode have none, and are passed over.

    Args:
      column: the tensors.
      positions: which of them, as 64-bit integers.

    Example:
      >>> x, y = torch.ones(2), torch.ones(2)
      >>> count_up(Column([x, y]), array("q", [1]))
      >>> x._version, y._version
      (0, 1)
    """
    if column.found is not None:
        _count_up(column.found.versions, positions)
    else:
        torch.autograd.graph.increment_version([column[i] for i in positions])


def count_up_outers(column: Column, outers: Sequence[torch.Tensor], positions: "array[int]") -> None:
    """Counts up the versions of distributed tensors.

    Args:
      column: their parts that are here.
      outers: the tensors.
      positions: which of them, as 64-bit integers.
    """
    if column.found is not None and column.found.outers:
        _count_up(column.found.outers, positions)
    else:
        torch.autograd.graph.increment_version([outers[i] for i in positions])


def _count_up(versions: bytes, positions: "array[int]") -> None:
    native = loaded[0]
    native.count_up(native.torch, versions, positions.buffer_info()[0], len(positions))
