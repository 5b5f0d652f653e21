"""Distributed tensors in one process: steps are taken from memory."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from functional_optim.leafwise.recall import Recall
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import functional_optim as fo
from functional_optim.adapters import AdamW, TransformOptimizer


N = 12


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


MAKERS: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    "AdamW": lambda params: AdamW(params, lr=0.1),
    "clip + AdamW + EMA": lambda params: TransformOptimizer(
        params, fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1), fo.params_ema(0.9))
    ),
}


def sharded(x: torch.Tensor, mesh: DeviceMesh) -> Any:
    return distribute_tensor(x, mesh, [Shard(0)])


@pytest.mark.parametrize("distributed", ["all", "some"])
@pytest.mark.parametrize("maker", MAKERS)
def test_steps_from_memory(mesh: DeviceMesh, maker: str, distributed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recalled: list[bool] = []
    take = Recall.lists

    def heard(*args: Any) -> Any:
        found = take(*args)
        recalled.append(found is not None)
        return found

    monkeypatch.setattr(Recall, "lists", heard)
    params: list[Any] = [
        torch.nn.Parameter(sharded(torch.ones(4), mesh) if distributed == "all" or k % 2 else torch.ones(4))
        for k in range(N)
    ]
    opt = MAKERS[maker](params)
    for _ in range(9):
        recalled.clear()
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()

    assert any(recalled) == (distributed == "all")
