"""Whether tensors still are what tables were prepared for: type, dtype, shape, strides, device, requires_grad."""

import struct
from collections.abc import Sequence
from operator import is_
from typing import Any

import torch

from .layout import meta


try:  # torch's own check in C++: 30 ns a tensor; without it the same in Python, 1 us a tensor
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # pragma: no cover
    TensorGuards = None  # type: ignore[assignment,misc]

PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_plain(x: torch.Tensor) -> bool:
    """Whether a tensor is of torch's own kinds, whose memory a kernel may be handed."""
    return type(x) in PLAIN and x.layout is torch.strided and x.device.type != "meta" and not x.is_neg()


class Guard:
    """Remembers what some tensors are.

    With many small tensors, most of a step is waiting for what is known of them to arrive from memory. So all that
    is needed of a tensor is asked for at once, block by block, while it is near.

    Args:
      tensors: the tensors.

    Example:
      >>> guard = Guard([torch.zeros(2)])
      >>> guard.holds([torch.ones(2)]), guard.holds([torch.ones(3)])
      (True, False)
    """

    BLOCK = 256  # tensors

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.plain = all(map(is_plain, tensors))
        self.length = len(tensors)
        self.fast: list[Any] = []
        distinct = len(set(map(id, tensors))) == len(tensors)  # torch's check refuses one tensor twice
        if TensorGuards is not None and self.plain and distinct:
            for start in range(0, len(tensors), self.BLOCK):
                block = tensors[start : start + self.BLOCK]
                sizes: list[Any] = [list(x.shape) for x in block]
                strides: list[Any] = [list(x.stride()) for x in block]
                self.fast.append(TensorGuards(*block, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides))
        self.metas = [] if self.fast else [self._key(x) for x in tensors]

    @staticmethod
    def _key(x: torch.Tensor) -> tuple[Any, ...]:
        return (type(x), x.requires_grad, x.is_neg(), meta(x)) if x.layout is torch.strided else (type(x), x.layout)

    def holds(self, tensors: Sequence[Any]) -> bool:
        """Whether other tensors are the same in all that a kernel depends on."""
        return self.addresses(tensors) is not None

    def addresses(self, tensors: Sequence[Any]) -> list[int] | None:
        """Addresses of other tensors, if they are the same in all that a kernel depends on.

        They are left out where tensors are not of torch's own kinds.
        """
        if len(tensors) != self.length:
            return None
        if self.fast:
            found: list[int] = []
            for k, guard in enumerate(self.fast):
                block = tensors[k * self.BLOCK : (k + 1) * self.BLOCK]
                if not guard.check(*block):
                    return None
                found += map(torch.Tensor.data_ptr, block)
            return found
        same = all(
            isinstance(x, torch.Tensor) and self._key(x) == key for x, key in zip(tensors, self.metas, strict=True)
        )
        return [] if same else None


class Ledger:
    """Remembers tensors that were in order, and sees sooner than `Guard` that they still are.

    The very same tensors are in order while nobody has changed them in place, which their versions show, and while
    they are where they were, which rules out what versions do not show: `x.data = ...` and `torch.utils.swap_tensors`.
    Tensors that share memory share a version, so that of a column packed by `layout.pack` is one number. It keeps the
    tensors alive.

    Args:
      columns: the tensors.

    Example:
      >>> x = torch.zeros(2)
      >>> ledger = Ledger([[x]])
      >>> ledger.holds([[x]]), ledger.holds([[x.clone()]]), ledger.holds([[x.add_(1)]])
      (True, False, False)
    """

    def __init__(self, columns: Sequence[Sequence[torch.Tensor]]) -> None:
        self.columns = columns
        self.addresses = [list(map(torch.Tensor.data_ptr, column)) for column in columns]
        self.packed = [struct.pack(f"{len(column)}q", *column) for column in self.addresses]
        owners = {id(x): x for column in columns for x in (y if y._base is None else y._base for y in column)}
        self.owners = list(owners.values())
        self.refresh()

    def refresh(self) -> None:
        """Takes the present versions for those that are in order."""
        self.versions = [x._version for x in self.owners]

    def holds(self, columns: Sequence[Sequence[Any]]) -> bool:
        """Whether these are the same tensors, and nobody has touched them."""
        return (
            all(
                len(new) == len(old) and all(map(is_, new, old)) for new, old in zip(columns, self.columns, strict=True)
            )
            and [x._version for x in self.owners] == self.versions
            and all(
                list(map(torch.Tensor.data_ptr, column)) == addresses
                for column, addresses in zip(columns, self.addresses, strict=True)
            )
        )
