"""Counting up the versions of tensors that kernels have written to, by which autograd notices writes."""

from array import array

import torch

from . import scan
from .call import Column


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
        scan.count_up(column.found, positions)
    else:
        torch.autograd.graph.increment_version([column[i] for i in positions])
