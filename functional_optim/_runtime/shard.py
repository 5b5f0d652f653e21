"""DTensors and processes: local tensors, placements, and reductions over processes.

Modules of torch.distributed are named here only, and looked up in `sys.modules`: without them there is no DTensor, and
importing them takes long.

Collectives come in the same order in all processes, because the layout of the whole parameters alone decides it:

1. Before each pass over memory there is one vector per kind of reduction that ends there. It has an entry for each
   leaf *of the optimizer* that is in parts, in order, and for a reduction over the tree one for each distinct
   `MeshShard`. A leaf without a gradient, or with an empty part, keeps its entry, which is then the identity of the
   reduction (0 for a sum, -inf for a maximum); a process without any gradient takes part too. `_runtime/join.py` lays
   the vectors out; dtypes play no part in it, because that of a missing gradient is not known.
2. `VectorJoin` completes a vector by one all-reduce per distinct `MeshShard` and mesh dimension. Numbers over the tree
   are then reduced to one.
3. `placed_like` may be a collective. It is called for the leaves in order.
"""

import contextlib
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_dtensor(x: object) -> "TypeGuard[DTensor]":
    """Whether an object is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def is_fsdp1(p: torch.Tensor) -> bool:
    """Whether a parameter is a part of a flat parameter of `FullyShardedDataParallel`.

    Its shape, and norms over it, are those of the part in this process, and nothing public says which one it is.
    """
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None:
        return False
    # with `use_orig_params=True` parameters are plain, but for this private mark; without the mark the answer is False
    return isinstance(p, module.FlatParameter) or getattr(p, "_fsdp_flattened", False)


def local_tensor(x: torch.Tensor) -> torch.Tensor:
    """The plain tensor that holds this process's elements of a tensor.

    Args:
      x: a tensor.

    Returns:
      The local tensor of a DTensor, with any communication finished; any other tensor itself. An empty tensor in a
      process outside of the mesh.

    Example:
      >>> x = torch.zeros(2)
      >>> local_tensor(x) is x
      True
    """
    if not is_dtensor(x):
        return x
    # private; `to_local` makes a view of each parameter, a microsecond apiece, and has autograd record it
    local: torch.Tensor = x._local_tensor
    if type(local) is torch.Tensor:
        return local
    wait = getattr(local, "wait", None)  # of a tensor whose collective may still run
    return local if wait is None else wait()


def is_in_mesh(x: torch.Tensor) -> bool:
    """Whether this process is one of those that a DTensor is spread over; true of a plain tensor."""
    return not is_dtensor(x) or x.device_mesh.get_coordinate() is not None


def real_view(x: torch.Tensor, name: str = "a tensor", path: str | None = None) -> torch.Tensor:
    """Complex numbers as pairs of real ones, in a last dimension of 2; a real tensor itself.

    Args:
      x: the tensor.
      name: its name in messages.
      path: that of its leaf, if the name is one of many.

    Raises:
      ValueError: the tensor is conjugated when it is read, so that its memory holds other numbers.

    Example:
      >>> real_view(torch.zeros(3, dtype=torch.complex64)).shape
      torch.Size([3, 2])
    """
    if not x.is_complex():
        return x
    if x.is_conj():
        raise ValueError(
            f"{name if path is None else f'{name} {path!r}'} is a conjugated view, whose memory holds the conjugates, "
            f"so a step cannot write to it; resolve it before the step, as in `p.data = p.data.resolve_conj()`."
        )
    return torch.view_as_real(x)


def same_placement(x: torch.Tensor, p: torch.Tensor) -> bool:
    """Whether the local tensors of two tensors hold the same elements: both plain, or one shape, mesh and placements.

    Shapes of plain tensors are not compared.
    """
    if not is_dtensor(p):
        return not is_dtensor(x)
    return (
        is_dtensor(x)
        and bool(x.placements == p.placements)
        and bool(x.device_mesh == p.device_mesh)
        and x.shape == p.shape
    )


def placed_like(x: torch.Tensor, p: torch.Tensor, name: str) -> torch.Tensor:
    """A gradient, or a state of its parameter's shape, with the mesh and placements of its parameter.

    A collective over the mesh, unless the placements are the same already: `Partial` values are summed, shards are
    gathered or cut. dtype and device stay.

    Args:
      x: the gradient or state.
      p: the parameter.
      name: the name of `x` in messages.

    Returns:
      `x` itself, or a DTensor with the same values.

    Raises:
      TypeError: one is a DTensor and the other is not.
      ValueError: shapes or meshes differ, or `p` is placed as `Partial`.

    Example:
      >>> g = torch.ones(2)
      >>> placed_like(g, torch.zeros(2), "the gradient of 'w'") is g
      True
    """
    if same_placement(x, p):
        return x
    if not is_dtensor(p):
        raise TypeError(
            f"{name} is a DTensor, but its parameter is a plain tensor of shape {tuple(p.shape)}; use its "
            f"`full_tensor()`, or distribute the parameter."
        )
    if not is_dtensor(x):
        raise TypeError(
            f"{name} is a plain tensor of shape {tuple(x.shape)}, but its parameter is a DTensor of shape "
            f"{tuple(p.shape)} with placements {p.placements}; pass "
            f"`torch.distributed.tensor.distribute_tensor(x, p.device_mesh, p.placements)`."
        )
    if x.shape != p.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but its parameter has shape {tuple(p.shape)}.")
    if x.device_mesh != p.device_mesh:
        raise ValueError(
            f"{name} is on {x.device_mesh}, but its parameter is on {p.device_mesh}; "
            f"torch redistributes within one mesh only."
        )
    _refuse_partial(p, f"the parameter of {name}")
    return x.redistribute(p.device_mesh, p.placements)


def check_placed(x: torch.Tensor, p: torch.Tensor, name: str) -> torch.Tensor:
    """Refuses a state that is not placed as its parameter is, and would not be if it were written to.

    Raises:
      ValueError: meshes, placements or shapes differ.
    """
    if not same_placement(x, p):
        raise ValueError(
            f"{name} is {_placement(x)}, but its parameter is {_placement(p)}; load it with `load_state_dict`, which "
            f"distributes it."
        )
    return x


def _placement(x: torch.Tensor) -> str:
    if not is_dtensor(x):
        return f"a plain tensor of shape {tuple(x.shape)}"
    return f"a DTensor of shape {tuple(x.shape)} with placements {x.placements} on {x.device_mesh}"


def loaded_like(x: torch.Tensor, p: torch.Tensor | None) -> torch.Tensor:
    """A tensor of a file, distributed over processes as a parameter is.

    A collective only if `x` is a DTensor of another mesh or other placements.

    Args:
      x: a DTensor, or a whole tensor that is the same in all processes.
      p: a tensor of that shape, plain or a DTensor; None asks for a whole, plain tensor.

    Returns:
      The elements as a plain tensor, or as a DTensor with the mesh and placements of `p`; `x` itself if it is that.

    Example:
      >>> x = torch.ones(2)
      >>> loaded_like(x, torch.zeros(2)) is x
      True
    """
    if is_dtensor(x) and not (is_dtensor(p) and x.device_mesh == p.device_mesh):
        x = x.full_tensor()
    if p is None or same_placement(x, p) or not is_dtensor(p):
        return x
    if not is_dtensor(x):
        module = sys.modules["torch.distributed.tensor"]
        x = type(p).from_local(x, p.device_mesh, [module.Replicate()] * p.device_mesh.ndim, run_check=False)
    return x.redistribute(p.device_mesh, p.placements)


def as_dtensor_like(local: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """A DTensor with the shape, mesh and placements of another, around a local tensor; no collective.

    With it transformations that are no rules get DTensors in `update` as they do in `init`, so that a norm in them is
    that of the whole tensor; `local_tensor` takes their results apart again.

    Args:
      local: a tensor with the shape of `local_tensor(p)`, of any dtype.
      p: a parameter.

    Returns:
      A DTensor that shares memory with `local`, or has a copy where parameters are offloaded from the mesh's device;
      `local` itself, if `p` is a plain tensor.

    Example:
      >>> x = torch.ones(2)
      >>> as_dtensor_like(x, torch.zeros(2)) is x
      True
    """
    if not is_dtensor(p):
        return local
    if local.device.type != p.device_mesh.device_type:  # offloaded; `from_local` would move it to the mesh's device
        made = torch.empty_like(p, dtype=local.dtype)
        local_tensor(made).copy_(local)
        return made
    return type(p).from_local(
        local,
        p.device_mesh,
        p.placements,
        run_check=False,
        shape=p.shape,
        stride=p.stride(),
    )


def whole_tensor(local: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """All elements of a tensor of which this process has the part that it has of a parameter; a collective.

    Example:
      >>> x = torch.ones(2)
      >>> whole_tensor(x, torch.zeros(2)) is x
      True
    """
    return as_dtensor_like(local, p).full_tensor() if is_dtensor(p) else local  # type: ignore[attr-defined]


def own_part(whole: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process has of a parameter of the same shape; no collective.

    Example:
      >>> x = torch.ones(2)
      >>> own_part(x, torch.zeros(2)) is x
      True
    """
    return local_tensor(loaded_like(whole, p))


class _Known(NamedTuple):
    """The DTensors of a column: their positions, those with None, a function that picks them, and their specs."""

    positions: list[int]
    none: list[int]
    pick: Callable[[Any], Sequence[Any]] | None
    specs: list[Any]


class LocalTensors:
    """Local tensors of columns that were found to be placed as they have to be.

    A comparison of meshes and placements costs 2 us, and a step would make thousands. A DTensor keeps both, and its
    shape, in one object, `_spec` (private), which torch puts another one in place of but does not change. So the specs
    that were found to fit are remembered, and compared all at once: those of the same object are equal.

    Example:
      >>> LocalTensors().find("params", [torch.zeros(2)]) is None
      True
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, _Known] = {}

    def remember(self, key: Hashable, column: Sequence[Any], positions: Iterable[int]) -> None:
        """Remembers the specs of the DTensors of a column, which have been found to fit.

        Args:
          key: the column.
          column: its tensors.
          positions: the positions of those to remember; where there is None, there must be None again.
        """
        positions = list(positions)
        dtensors = [i for i in positions if is_dtensor(column[i])]
        pick = None
        if dtensors != list(range(len(column))):
            pick = itemgetter(*dtensors) if len(dtensors) > 1 else lambda tensors: [tensors[i] for i in dtensors]
        none = [i for i in positions if column[i] is None]
        self._known[key] = _Known(dtensors, none, pick, [_SPEC(column[i]) for i in dtensors])

    def fit(self, key: Hashable, column: Sequence[Any]) -> bool:
        """Whether the tensors of a column are placed like the remembered ones."""
        known = self._known[key]
        try:
            specs = list(map(_SPEC, column if known.pick is None else known.pick(column)))
        except AttributeError:
            return False
        return specs == known.specs and all(column[i] is None for i in known.none)

    def find(self, key: Hashable, column: Sequence[Any]) -> list[Any] | None:
        """The column with local tensors in the places of the DTensors that are remembered.

        Returns:
          A new list; None if a tensor may be placed otherwise, or communication has to be finished.
        """
        if key not in self._known or not self.fit(key, column):
            return None
        known = self._known[key]
        local = list(map(_LOCAL, column if known.pick is None else known.pick(column)))
        if set(map(type, local)) - {torch.Tensor}:
            return None
        if known.pick is None:
            return local
        mixed = list(column)
        for i, x in zip(known.positions, local, strict=True):
            mixed[i] = x
        return mixed


_SPEC, _LOCAL = attrgetter("_spec"), attrgetter("_local_tensor")


@dataclass(frozen=True)
class MeshShard:
    """Dimensions of a device mesh over which a tensor is in parts; a reduction of parts is completed over them.

    Equal values mean the same processes, so it is a key for reductions that are communicated together.

    Args:
      mesh: the `DeviceMesh`.
      dims: the dimensions, in order.
    """

    mesh: "DeviceMesh"
    dims: tuple[int, ...]

    def combine(self, partials: torch.Tensor, kind: str) -> None:
        """Reduces numbers over the processes of the dimensions, in place; a process outside of the mesh does nothing.

        Args:
          partials: contiguous floating-point numbers, as many in each process.
          kind: "sum" or "amax", which is NaN where one is.
        """
        if self.mesh.get_coordinate() is None:
            return
        moved = partials.to(self.mesh.device_type)  # offloaded parameters are elsewhere
        _all_reduce(moved, kind, [self.mesh.get_group(dim) for dim in self.dims])
        if moved is not partials:
            partials.copy_(moved)


def _all_reduce(partials: torch.Tensor, kind: str, groups: "Iterable[ProcessGroup]") -> None:
    op = {"sum": torch.distributed.ReduceOp.SUM, "amax": torch.distributed.ReduceOp.MAX}[kind]
    if kind == "sum":
        for group in groups:
            torch.distributed.all_reduce(partials, op, group)
        return
    # gloo's maximum keeps a NaN of the first process only, so the NaNs travel as flags
    nan = partials.isnan()
    both = torch.stack([partials.masked_fill(nan, -torch.inf), nan.to(partials.dtype)])
    for group in groups:
        torch.distributed.all_reduce(both, op, group)
    partials.copy_(both[0].masked_fill_(both[1] > 0, torch.nan))


def mesh_shard(p: torch.Tensor) -> MeshShard | None:
    """The mesh dimensions over which a parameter is in parts, or None where each process has all of it.

    Raises:
      ValueError: `p` is placed as `Partial`.
    """
    if not is_dtensor(p):
        return None
    _refuse_partial(p, f"a parameter of shape {tuple(p.shape)}")
    mesh, placements = p.device_mesh, p.placements
    dims = tuple(k for k, place in enumerate(placements) if not place.is_replicate() and mesh.size(k) > 1)
    return MeshShard(mesh, dims) if dims else None


def _refuse_partial(p: "DTensor", name: str) -> None:
    if any(place.is_partial() for place in p.placements):
        raise ValueError(
            f"{name} has placements {p.placements}, so that no process knows its elements; redistribute it to Shard or "
            f"Replicate before it is optimized."
        )


class VectorJoin:
    """Completes the entries of a vector whose leaves are in parts; see the order of collectives above.

    Args:
      shards: the `MeshShard` of each entry, or None for an entry that is complete. The same in all processes.

    Example:
      >>> values = torch.tensor([1.0, 2.0])
      >>> VectorJoin([None, None])(values, "sum")
      >>> values
      tensor([1., 2.])
    """

    def __init__(self, shards: Sequence[MeshShard | None]) -> None:
        entries: dict[MeshShard, list[int]] = {}
        for k, shard in enumerate(shards):
            if shard is not None:
                entries.setdefault(shard, []).append(k)
        self._entries = entries
        self._parts: dict[torch.device, list[tuple[MeshShard, torch.Tensor]]] = {}  # by the device of values

    def __call__(self, values: torch.Tensor, kind: str) -> None:
        """Reduces each entry over the processes that hold parts of its leaf, in place.

        Args:
          values: floating-point numbers, one per entry; the identity of the reduction where nothing is here.
          kind: as for `MeshShard.combine`.
        """
        if values.device not in self._parts:  # a step that copied them to a device would wait for it
            parts = [(shard, torch.tensor(ks, device=values.device)) for shard, ks in self._entries.items()]
            self._parts[values.device] = parts
        for shard, entries in self._parts[values.device]:
            part = values[entries]
            shard.combine(part, kind)
            values[entries] = part


@contextlib.contextmanager
def gathered_anew(params: Iterable[torch.Tensor], models: Iterable[torch.nn.Module] = ()) -> Iterator[None]:
    """FSDP2 modules gather their parameters anew in the first forward pass inside the block, and in that after it.

    A module may keep gathered parameters after a forward pass (the root does), and would neither see values that are
    written to its sharded parameters nor see them put back. Modules are found when they are called; other methods, also
    those registered with `register_fsdp_forward_method`, see parameters as gathered before, but for those of `models`.

    Args:
      params: the parameters that are written to.
      models: modules that gather anew however they are used.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not any(map(is_dtensor, params)):
        yield
        return
    fresh: set[torch.nn.Module] = set()

    def reshard(module: torch.nn.Module, args: Any = ()) -> None:
        if isinstance(module, fsdp.FSDPModule) and module not in fresh:
            for each in module.modules():  # before the root's own hook: during its forward pass nothing is resharded
                if isinstance(each, fsdp.FSDPModule) and each not in fresh:
                    each.reshard()
                    fresh.add(each)

    for model in models:
        for module in model.modules():
            reshard(module)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(reshard)
    try:
        yield
    finally:
        hook.remove()
        for module in fresh:
            module.reshard()  # type: ignore[operator]
