"""Checks of `_runtime/shard.py` by four processes; `integration/test_shard.py` reads what they found.

Each check knows the whole tensors, so that every process can tell what it must hold. Values are whole numbers or
halves of them, whose sums are exact in any order.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from _lib.compare import EXACT
from functional_optim._compiler.ops import REDUCTIONS
from functional_optim._runtime import shard


SHAPES = [(4, 4), (5, 3), (1, 7)]
PLACED = (Shard(0), Shard(1), Replicate())
# parts of 1 that processes hold of a partial value
WEIGHTS = {1: [1.0], 2: [0.25, 0.75], 4: [0.25, 0.5, 0.75, -0.5]}


def meshes() -> list[DeviceMesh]:
    world = dist.get_world_size()
    return [init_device_mesh("cpu", (world,)), *([init_device_mesh("cpu", (2, 2))] if world == 4 else [])]


def placements(mesh: DeviceMesh, among: tuple[Placement, ...]) -> Iterator[tuple[Placement, ...]]:
    return itertools.product(among, repeat=mesh.ndim)


def numbers(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).double()


def distributed(whole: torch.Tensor, mesh: DeviceMesh, placed: tuple[Placement, ...]) -> Any:
    """A DTensor with the values of a tensor that all processes have; partial ones are in unequal parts."""
    made = distribute_tensor(
        whole, mesh, [Replicate() if p.is_partial() else p for p in placed], src_data_rank=None
    ).to_local()
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for k, p in enumerate(placed):
        if p.is_partial():
            made = made * WEIGHTS[mesh.size(k)][coordinate[k]]
    return DTensor.from_local(made, mesh, placed, shape=whole.shape, stride=whole.stride())


def gradients_are_placed_like_their_parameters(rank: int, folder: Path) -> None:
    for mesh in meshes():
        for shape in SHAPES:
            whole = numbers(shape)
            for of_p in placements(mesh, PLACED):
                p = distributed(torch.zeros(shape), mesh, of_p)
                expected = distributed(whole, mesh, of_p).to_local()
                for of_x in placements(mesh, (*PLACED, Partial())):
                    x = distributed(whole, mesh, of_x)
                    assert shard.same_placement(x, p) == (of_x == of_p)
                    placed: Any = shard.placed_like(x, p, "x")
                    assert (placed is x) == (of_x == of_p)
                    assert shard.same_placement(placed, p)
                    torch.testing.assert_close(
                        shard.local_tensor(placed), expected, **EXACT, msg=lambda m, c=(of_p, of_x): f"{c}: {m}"
                    )
        p, x = (distributed(torch.tensor(6.0), mesh, (q,) * mesh.ndim) for q in (Replicate(), Partial()))
        assert shard.local_tensor(shard.placed_like(x, p, "x")).item() == 6.0


def sums_and_maxima_are_those_of_whole_tensors(rank: int, folder: Path) -> None:
    """For every placement, a tensor with fewer rows than processes too, whose empty parts hold the identity."""
    for mesh in meshes():
        for shape, placed in itertools.product(SHAPES, placements(mesh, PLACED)):
            whole = numbers(shape)
            p = distributed(whole, mesh, placed)
            for kind, (identity, reduce) in REDUCTIONS.items():
                part = shard.local_tensor(p)
                value = reduce(part).reshape(1) if part.numel() else torch.tensor([identity], dtype=torch.float64)
                where = shard.mesh_shard(p)
                assert (where is None) == all(q.is_replicate() for q in placed)
                if where is not None:
                    where.combine(value, kind)
                torch.testing.assert_close(value[0], reduce(whole), **EXACT)


def inputs(rank: int) -> torch.Tensor:
    """A number per process and kind of number: a NaN of each process by itself, infinities, whole numbers."""
    world = dist.get_world_size()
    nan = torch.where(torch.arange(world) == rank, torch.nan, 1.0 + rank).double()
    special = [torch.inf if rank else 0.0, 0.0 if rank else -torch.inf, -torch.inf, torch.nan]
    return torch.cat([nan, torch.tensor(special, dtype=torch.float64), numbers((4,), seed=rank)])


def combine_is_the_reduction_of_all(rank: int, folder: Path) -> None:
    for mesh in meshes():
        for dims in (d for n in range(1, mesh.ndim + 1) for d in itertools.combinations(range(mesh.ndim), n)):
            coordinate = mesh.get_coordinate()
            assert coordinate is not None
            ranks = mesh.mesh[tuple(slice(None) if k in dims else c for k, c in enumerate(coordinate))].flatten()
            everyone = torch.stack([inputs(int(r)) for r in ranks])
            for kind, (_, reduce) in REDUCTIONS.items():
                value = inputs(rank)
                shard.MeshShard(mesh, dims).combine(value, kind)
                expected = torch.stack([reduce(column) for column in everyone.unbind(1)])
                torch.testing.assert_close(value, expected, **EXACT, equal_nan=True)


def equal_layouts_are_equal_keys(rank: int, folder: Path) -> None:
    """Parameters of one layout are communicated together, also if their meshes were made separately."""
    one, two = (init_device_mesh("cpu", (dist.get_world_size(),)) for _ in range(2))
    a, b = (shard.mesh_shard(distributed(numbers((4, 4)), m, (Shard(0),))) for m in (one, two))
    assert a == b
    assert hash(a) == hash(b)
    for mesh in meshes()[1:]:
        hsdp = shard.mesh_shard(distributed(numbers((4, 4)), mesh, (Replicate(), Shard(1))))
        assert hsdp == shard.MeshShard(mesh, (1,))
        assert hsdp != a


def a_process_outside_of_the_mesh(rank: int, folder: Path) -> None:
    count = dist.get_world_size() // 2
    mesh = DeviceMesh("cpu", list(range(count)))
    p = distribute_tensor(torch.zeros(4, 2).double(), mesh, [Shard(0)], src_data_rank=None)
    x = distribute_tensor(numbers((4, 2)), mesh, [Replicate()], src_data_rank=None)
    placed: Any = shard.placed_like(x, p, "x")
    assert shard.same_placement(placed, p)
    again: Any = shard.as_dtensor_like(shard.local_tensor(placed), p)
    assert again.shape == (4, 2)
    assert shard.local_tensor(again).numel() == (8 // count if rank < count else 0)
    for kind in REDUCTIONS:
        value = torch.ones(3, dtype=torch.float64)
        shard.MeshShard(mesh, (0,)).combine(value, kind)
        expected = float(count) if kind == "sum" and rank < count else 1.0
        assert value.tolist() == [expected] * 3


def join_keeps_the_place_of_every_leaf(rank: int, folder: Path) -> None:
    """Processes that each lack another gradient: entries of one leaf meet, those of different leaves do not."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    whole, part = shard.MeshShard(mesh, (0,)), shard.MeshShard(DeviceMesh("cpu", [0, world - 1]), (0,))
    shards = [whole, None, part, whole, None, whole]
    for kind, (identity, reduce) in REDUCTIONS.items():

        def entries(r: int, identity: float = identity) -> torch.Tensor:
            made = 10.0 * torch.arange(6, dtype=torch.float64) + r
            made[r::world] = identity  # no gradient here
            return made

        value = entries(rank)
        shard.VectorJoin(shards)(value, kind)
        members = {whole: range(world), part: (0, world - 1), None: (rank,)}
        expected = [
            reduce(torch.stack([entries(r)[k] for r in (members[s] if rank in members[s] else (rank,))])).item()
            for k, s in enumerate(shards)
        ]
        assert value.tolist() == expected


def local_results_become_dtensors(rank: int, folder: Path) -> None:
    for mesh in meshes():
        for shape, placed in itertools.product(SHAPES, placements(mesh, PLACED)):
            whole = numbers(shape)
            p = distributed(torch.zeros(shape).double(), mesh, placed)
            local = distributed(whole, mesh, placed).to_local().float()
            made: Any = shard.as_dtensor_like(local, p)
            assert shard.same_placement(made, p)
            assert (made.dtype, made.stride()) == (torch.float32, p.stride())
            assert shard.local_tensor(made).data_ptr() == local.data_ptr()
            torch.testing.assert_close(made.full_tensor(), whole.float(), **EXACT)


def parts_that_are_on_their_way(rank: int, folder: Path) -> None:
    mesh = meshes()[0]
    whole = numbers((4, 4))
    x = distributed(whole, mesh, (Shard(0),)).redistribute(mesh, [Replicate()], async_op=True)
    assert type(x.to_local()) is not torch.Tensor
    assert type(shard.local_tensor(x)) is torch.Tensor
    torch.testing.assert_close(shard.local_tensor(x), whole, **EXACT)


def layers() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)]).double()


def fsdp2_sees_what_is_written(rank: int, folder: Path) -> None:
    """The root, a layer that is kept gathered, and one that is not; forward passes before, inside and after."""
    x = numbers((2, 4))
    for before, inside in itertools.product((False, True), repeat=2):
        model, alone = layers(), layers()
        fully_shard(model[0], reshard_after_forward=False)
        fully_shard(model[1])
        fully_shard(model)
        outputs: list[list[torch.Tensor]] = []
        for m in (model, alone):
            params = list(m.parameters())
            seen = [m(x)] if before else []
            with torch.no_grad():
                try:
                    with shard.gathered_anew(params):
                        for p in params:
                            shard.local_tensor(p).add_(1.0)
                        if inside:
                            seen += [*([m[0](x)] if before else []), m(x), m[0](x), m(x)]  # the root starts the layers
                        raise KeyError  # what is left by an exception is left well
                except KeyError:
                    for p in params:
                        shard.local_tensor(p).sub_(1.0)
                seen += [m(x)]
            seen += [m(x)]
            seen[-1].sum().backward()
            outputs.append([y.detach() for y in seen])
        torch.testing.assert_close(*outputs, **EXACT)
        grads = [p.grad.full_tensor() for p in model.parameters()]  # type: ignore[union-attr, operator]
        torch.testing.assert_close(grads, [p.grad for p in alone.parameters()], **EXACT)
    assert not torch.nn.modules.module._global_forward_pre_hooks


class Doubling(torch.nn.Linear):
    def twice(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * torch.nn.functional.linear(x, self.weight, self.bias)


def fsdp2_methods_see_what_is_written(rank: int, folder: Path) -> None:
    """Methods other than `forward`, of modules that are named; and of a model that only holds FSDP2 modules."""
    x = numbers((2, 4))
    layer: Any = fully_shard(Doubling(4, 4).double(), reshard_after_forward=False)
    register_fsdp_forward_method(layer, "twice")
    holder = torch.nn.Sequential(layer)
    with torch.no_grad():
        before = layer.twice(x)
        with shard.gathered_anew(layer.parameters(), [holder]):
            for p in holder.parameters():
                shard.local_tensor(p).mul_(2.0)
            torch.testing.assert_close(layer.twice(x), 2.0 * before, **EXACT)
            for p in layer.parameters():
                assert not shard.is_dtensor(p)  # gathered still
        for p in layer.parameters():
            shard.local_tensor(p).div_(2.0)
        torch.testing.assert_close(layer.twice(x), before, **EXACT)


def fsdp1_is_told(rank: int, folder: Path) -> None:
    for original in (False, True):
        model = FullyShardedDataParallel(layers(), device_id=torch.device("cpu"), use_orig_params=original)
        assert all(map(shard.is_fsdp1, model.parameters()))
        model(numbers((2, 4))).sum().backward()
        assert all(map(shard.is_fsdp1, model.parameters()))
    sharded: Any = fully_shard(layers())
    assert isinstance(sharded, FSDPModule)
    assert not any(map(shard.is_fsdp1, [*sharded.parameters(), *layers().parameters()]))


CHECKS = {
    check.__name__: check
    for check in (
        gradients_are_placed_like_their_parameters,
        sums_and_maxima_are_those_of_whole_tensors,
        combine_is_the_reduction_of_all,
        equal_layouts_are_equal_keys,
        a_process_outside_of_the_mesh,
        join_keeps_the_place_of_every_leaf,
        local_results_become_dtensors,
        parts_that_are_on_their_way,
        fsdp2_sees_what_is_written,
        fsdp2_methods_see_what_is_written,
        fsdp1_is_told,
    )
}
