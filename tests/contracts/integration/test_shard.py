"""`_runtime/shard.py`: on four processes, by `shard_checks.py`, and what one process can tell."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from _lib.processes import MARKS, results
from _lib.shard_checks import CHECKS
from functional_optim._runtime import shard


pytestmark = MARKS
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The findings of four processes, whose meshes have two and four along a dimension."""
    return results(CHECKS, 4, tmp_path_factory.mktemp)


@pytest.mark.parametrize("check", CHECKS)
def test_several_processes(check: str, found: dict[str, str]) -> None:
    assert not found[check], found[check]


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_what_cannot_be_placed_is_refused(mesh: DeviceMesh) -> None:
    whole = torch.zeros(4, 2)
    p = distribute_tensor(whole, mesh, [Shard(0)])
    partial = DTensor.from_local(whole, mesh, [Partial()])
    other = init_device_mesh("cpu", (1, 1))
    name = "the gradient of 'w'"
    for x, parameter, error, words in (
        (whole, p, TypeError, rf"{name} is a plain tensor of shape \(4, 2\).*distribute_tensor"),
        (p, whole, TypeError, rf"{name} is a DTensor, .* plain tensor of shape \(4, 2\).*full_tensor"),
        (distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)]), p, ValueError, r"has shape \(4, 3\).*shape \(4, 2\)"),
        (distribute_tensor(whole, other, [Shard(0), Shard(1)]), p, ValueError, "within one mesh"),
        (p, partial, ValueError, rf"the parameter of {name} has placements \(Partial.*redistribute it"),
    ):
        assert not shard.same_placement(x, parameter)
        with pytest.raises(error, match=words):
            shard.placed_like(x, parameter, name)
    with pytest.raises(ValueError, match=r"shape \(4, 2\) has placements \(Partial.*redistribute it"):
        shard.mesh_shard(partial)


def test_plain_tensors_are_left_alone() -> None:
    x, p = torch.ones(2), torch.zeros(2)
    assert shard.same_placement(x, p)
    assert shard.placed_like(x, p, "x") is x
    assert shard.as_dtensor_like(x, p) is x
    assert shard.local_tensor(x) is x
    assert shard.mesh_shard(p) is None
    assert not shard.is_dtensor(x)
    with shard.gathered_anew([p]):
        assert not torch.nn.modules.module._global_forward_pre_hooks


def test_local_tensors_share_memory_and_versions(mesh: DeviceMesh) -> None:
    """As those of `to_local`, and without a graph."""
    p: Any = torch.nn.Parameter(distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)]))
    local = shard.local_tensor(p)
    assert not local.requires_grad
    assert local.data_ptr() == p.to_local().data_ptr()
    local.add_(1.0)
    assert p.to_local()._version == local._version == 1
    assert p.full_tensor().sum() == 8.0


def test_pairs_of_real_numbers() -> None:
    x = torch.tensor([1 + 2j])
    assert shard.real_view(x).tolist() == [[1.0, 2.0]]
    assert shard.real_view(x).data_ptr() == x.data_ptr()
    assert shard.real_view(x.real) is not x


def test_offloaded_parameters_stay_where_they_are(mesh: DeviceMesh) -> None:
    """The device of a mesh is that of communication; parameters may wait elsewhere."""
    elsewhere = DTensor.from_local(torch.empty(4, 2, device="meta"), init_device_mesh("meta", (1,)), [Replicate()])
    p = torch.zeros_like(elsewhere, device="cpu")
    assert shard.local_tensor(p).device.type == "cpu"
    local = torch.arange(8, dtype=torch.float64).view(4, 2)
    made = shard.as_dtensor_like(local, p)
    assert shard.same_placement(made, p)
    assert torch.equal(shard.local_tensor(made), local)


def test_importing_leaves_dtensor_alone() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import functional_optim._runtime.shard as s; "
        "assert not s.is_dtensor(torch.ones(1)) and not s.is_fsdp1(torch.ones(1)); "
        "print([m for m in set(sys.modules) - before if m.startswith('torch.distributed')])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
