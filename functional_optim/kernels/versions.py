"""Counting up the versions of tensors that kernels have written to, by which autograd notices writes."""

import struct
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .call import Column
from .scan import Found


PACKED = 8  # tensors per tensor that they are parts of, from which on it pays to know the latter


class Owners(NamedTuple):
    """The few tensors that those of some columns are parts of, with which parts share their versions.

    As long as they live, nothing else can get their memory: tensors in the same places are parts of them.

    Args:
      found: where the tensors in the columns were.
      owners: what they are parts of; nothing is kept alive by this.
    """

    found: list[Found | None]
    owners: list[weakref.ref[torch.Tensor]]

    @classmethod
    def of(cls, columns: Sequence[Column]) -> "Owners | None":
        """The owners of tensors; None if some have none, or there are too many to gain by it."""
        owners: dict[int, tuple[torch.Tensor, int, int]] = {}
        for column in columns:
            for x, address in zip(column, struct.unpack(f"{len(column)}q", column.addresses), strict=True):
                base = x._base
                if base is None:
                    return None
                if id(base) not in owners:
                    owners[id(base)] = base, base.data_ptr(), base.data_ptr() + base.nbytes
                _, start, stop = owners[id(base)]
                if not start <= address < stop:  # after `x.data = y`
                    return None
        if not owners or len(owners) * PACKED > sum(map(len, columns)):
            return None
        return cls([c.found for c in columns], [weakref.ref(base) for base, _, _ in owners.values()])

    def get(self, columns: Sequence[Column]) -> list[torch.Tensor] | None:
        """The owners, if columns are what they were."""
        alive = [x for owner in self.owners if (x := owner()) is not None]
        return alive if len(alive) == len(self.owners) and [c.found for c in columns] == self.found else None
