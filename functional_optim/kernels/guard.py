"""Whether tensors still are what tables were prepared for: class, dtype, shape, strides, device, requires_grad."""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch

from .alike import look
from .call import Column
from .layout import PLAIN, meta
from .scan import Kinds, find


REQUIRES_GRAD = attrgetter("requires_grad")


def is_plain(x: torch.Tensor) -> bool:
    """Whether a tensor is of torch's own kinds, whose memory a kernel may be handed."""
    if type(x) not in PLAIN or x.layout is not torch.strided or x.device.type == "meta":
        return False
    return not (x.is_neg() or x._is_zerotensor())


def _have_addresses(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether no tensor is a wrapper of `torch.func` that has left its function, which looks like any other."""
    try:
        return all(x.data_ptr() or not torch._is_functional_tensor(x) for x in tensors)
    except RuntimeError:
        return False


class Guard:
    """Remembers what the tensors of a column are.

    Args:
      column: the column.
      positions: which of its tensors count; by default all.

    Example:
      >>> guard = Guard(Column([torch.zeros(2)]))
      >>> guard.holds(Column([torch.ones(2)])), guard.holds(Column([torch.ones(3)]))
      (True, False)
    """

    def __init__(self, column: Column, positions: Sequence[int] | None = None) -> None:
        self.length = len(column)
        self.positions = range(self.length) if positions is None else positions
        tensors, looks = self._chosen(column), [column.looks[i] for i in self.positions]
        self.plain = all(map(is_plain, dict(zip(looks, tensors, strict=True)).values())) and _have_addresses(tensors)
        self.requires_grad = any(map(REQUIRES_GRAD, tensors))
        self.keys: list[Any] = looks if self.plain else list(map(self._key, tensors))
        self.kinds: Kinds | None = None

    def _chosen(self, column: Sequence[Any]) -> list[Any]:
        return list(column) if len(self.positions) == len(column) else [column[i] for i in self.positions]

    @staticmethod
    def _key(x: Any) -> tuple[Any, ...]:
        if not isinstance(x, torch.Tensor) or x.layout is not torch.strided:
            return type(x), getattr(x, "layout", None)
        return type(x), x.is_neg(), meta(x)

    def holds(self, column: Column) -> bool:
        """Whether the tensors of another column are the same in all that a kernel depends on.

        If they are, and of torch's own kinds, the column is told where they are.
        """
        return _hold([self], [column])

    def looks_right(self, column: Column) -> bool:
        """Whether the tensors of another column are the same, as far as Python can see."""
        if len(column) != self.length:
            return False
        if list(map(look if self.plain else self._key, self._chosen(column))) != self.keys:
            return False
        if self.plain:
            self.kinds = Kinds.of(column, self.positions)
        return True

    def has_gradients(self, column: Column) -> bool:
        """Whether some of the tensors of another column require gradients as these did."""
        return any(map(REQUIRES_GRAD, self._chosen(column))) == self.requires_grad


def _hold(guards: Sequence[Guard], columns: Sequence[Column]) -> bool:
    """Whether all guards hold; only then, and where C can be asked, do columns know where their tensors are."""
    for column in columns:
        column.locate(None)
    described = []
    for guard, column in zip(guards, columns, strict=True):
        if guard.kinds is not None:
            described.append((guard.kinds, column))
        elif not guard.looks_right(column):
            return False
    found = find([kinds for kinds, _ in described], [column for _, column in described])
    if found is None:
        return False
    for (_, column), places in zip(described, found, strict=True):
        column.locate(places)
    return not torch.is_grad_enabled() or all(g.has_gradients(c) for g, c in zip(guards, columns, strict=True))


class Guards:
    """Remembers what the tensors of several columns are.

    Args:
      columns: the columns by name.
      positions: which tensors of each count; by default all.
    """

    def __init__(self, columns: Mapping[Any, Column], positions: Mapping[Any, Sequence[int]] | None = None) -> None:
        self.each = {name: Guard(c, None if positions is None else positions[name]) for name, c in columns.items()}
        self.plain = all(guard.plain for guard in self.each.values())
        self.requires_grad = any(guard.requires_grad for guard in self.each.values())

    def holds(self, columns: Mapping[Any, Column]) -> bool:
        """Whether the tensors of other columns are the same."""
        return _hold(list(self.each.values()), [columns[name] for name in self.each])
