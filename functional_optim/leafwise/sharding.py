"""Tensors that are held as others: the parts of DTensors, and complex numbers as pairs of real ones."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch

from ..kernels import Shard


@dataclass(frozen=True)
class MeshShard:
    """Joins the parts of DTensors that are sharded over some dimensions of a device mesh."""

    mesh: Any
    dims: tuple[int, ...]

    def combine(self, partials: torch.Tensor, kind: str) -> None:
        """Reduces numbers over the processes of these dimensions, in place."""
        op = {"sum": torch.distributed.ReduceOp.SUM, "amax": torch.distributed.ReduceOp.MAX}[kind]
        for dim in self.dims:
            torch.distributed.all_reduce(partials, op, self.mesh.get_group(dim))


def distributed(x: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def gradients(params: Sequence[Any]) -> list[Any]:
    """The gradients of parameters."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or set(map(type, params)) != {module.DTensor}:
        return list(map(GRAD, params))
    with torch._C.DisableTorchFunctionSubclass():  # what other classes have to say about it is heard
        return list(map(GRAD, params))


GRAD = attrgetter("grad")


def shard(p: Any) -> Shard | None:
    if not distributed(p):
        return None
    mesh = p.device_mesh
    dims = tuple(k for k, place in enumerate(p.placements) if not place.is_replicate() and mesh.size(k) > 1)
    return MeshShard(mesh, dims) if dims else None


def local(x: Any) -> Any:
    """The plain real tensor that holds a tensor's elements, or this process's part of them.

    Args:
      x: a tensor.

    Returns:
      A view of it.

    Example:
      >>> local(torch.zeros(2, dtype=torch.complex64)).shape
      torch.Size([2, 2])
    """
    x = getattr(x, "_local_tensor", x)  # of a DTensor; `to_local` asks autograd first, for microseconds
    return torch.view_as_real(x) if x.is_complex() else x
