"""Local tensors: plain real ones that hold the elements of DTensors and of complex parameters."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._runtime.checks import check_kind
from .._runtime.groups import Key
from .._runtime.shard import LocalTensors, as_dtensor_like, is_dtensor, local_tensor, mesh_shard, real_view
from .template import ParamList


Placer = Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor]


def tensor_of(x: Any, name: str, path: str | None = None) -> Any:
    """The plain real tensor that holds a tensor's elements, or this process's part of them.

    Raises:
      ValueError: the tensor is conjugated when it is read; with its name.
    """
    return None if x is None else real_view(local_tensor(x), name, path)


class LocalColumns:
    """Columns of tensors that go with parameters, as the plain real tensors that hold their elements.

    Args:
      params: the parameters.
      present: those that take part.

    Attributes:
      wrapped: the parameters that take part and whose elements are in another tensor.
      dtensors: those of them that are DTensors.
      complex: those of them that are complex, and so pairs of real numbers.
      shards: the mesh dimensions over which each parameter is in parts.
    """

    def __init__(self, params: ParamList, present: Sequence[int]) -> None:
        self.params = params.tensors
        self.names, self.present = params.names, present
        self.wrapped = [i for i in present if self.params[i].is_complex() or is_dtensor(self.params[i])]
        self.dtensors = [i for i in self.wrapped if is_dtensor(self.params[i])]
        self.complex = [i for i in self.wrapped if self.params[i].is_complex()]
        self.shards = [mesh_shard(p) for p in self.params]
        self._placed = LocalTensors()
        self._placed.remember("params", self.params, self.dtensors)

    def fits(self, params: Sequence[torch.Tensor]) -> bool:
        """Whether parameters are placed, and complex or real, as they were when this was made."""
        complex_now = [i for i in self.present if params[i].is_complex()]
        return complex_now == self.complex and (not self.dtensors or self._placed.fit("params", params))

    def of(
        self,
        key: Key,
        tensors: Sequence[Any],
        place: Placer | None = None,
        name: str = "params at",
        *,
        written: bool = True,
    ) -> Sequence[Any]:
        """The local tensors of a column.

        Args:
          key: the column.
          tensors: a tensor per parameter.
          place: conversion of a DTensor that may be placed otherwise than its parameter.
          name: the beginning of the name of a tensor in messages.
          written: whether they may be written to. Others may be conjugated when they are read, as autograd leaves
            gradients of complex parameters, and copies of them are returned.
        """
        if not self.wrapped:
            return tensors
        found = self.known(key, tensors)
        if found is not None:
            return found
        column = list(tensors)
        if place is not None:
            for i in self.dtensors:
                if column[i] is not None:
                    column[i] = place(column[i], self.params[i], f"{name} {self.names[i]!r}")
        self._placed.remember(key, column, self.dtensors)
        for i in self.wrapped:
            x = column[i]
            x = x.resolve_conj() if not written and isinstance(x, torch.Tensor) else x
            column[i] = tensor_of(x, name, self.names[i])
        return column

    def check_slots(self, name: str, tensors: Sequence[Any]) -> None:
        """Refuses entries of a slot that are real where their parameters are complex.

        Raises:
          ValueError: with the name of the slot and of the parameter.
        """
        for i in self.complex:
            if isinstance(tensors[i], torch.Tensor):
                check_kind(f"{name} at {self.names[i]!r}", tensors[i], self.params[i])

    def known(self, key: Key, tensors: Sequence[Any]) -> list[Any] | None:
        """The local tensors of a column of DTensors that is placed as it was before; None if it may not be."""
        return self._placed.find(key, tensors) if self.dtensors and not self.complex else None

    def like(self, x: torch.Tensor, i: int) -> torch.Tensor:
        """A plain real tensor as its parameter is: a DTensor, or complex."""
        p = self.params[i]
        return as_dtensor_like(torch.view_as_complex(x) if p.is_complex() else x, p)
