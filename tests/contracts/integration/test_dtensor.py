"""Distributed tensors in one process: whatever happens between two steps, the next one is right, or refused."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

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


def part(x: Any) -> torch.Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def sharded(x: torch.Tensor, mesh: DeviceMesh) -> Any:
    return distribute_tensor(x, mesh, [Shard(0)])


def use_another(opt: torch.optim.Optimizer, params: list[Any], mesh: DeviceMesh) -> None:
    params[3]._local_tensor = params[3]._local_tensor.clone()


def shard_state(opt: torch.optim.Optimizer, params: list[Any], mesh: DeviceMesh) -> None:
    for state in [opt.state[p] for p in params if not isinstance(p, DTensor)][:1]:
        key = next(k for k, x in state.items() if x.ndim)
        state[key] = sharded(state[key], mesh)


CHANGES: dict[str, Callable[[torch.optim.Optimizer, list[Any], DeviceMesh], object]] = {
    "nothing": lambda opt, params, mesh: None,
    "a gradient that is gone": lambda opt, params, mesh: setattr(params[3], "grad", None),
    "a part elsewhere": use_another,
    "a state that is distributed": shard_state,
}


def test_step_that_autograd_would_have_to_record_is_refused(mesh: DeviceMesh) -> None:
    """Nothing is changed, rather than a derivative left out."""
    p: Any = torch.nn.Parameter(sharded(torch.ones(4), mesh))
    p.grad = sharded(torch.ones(4), mesh)
    opt = AdamW([p], lr=0.1, differentiable=True)
    with pytest.raises(RuntimeError, match=r"is a DTensor.* differentiable=False"):
        opt.step()
    assert part(p).tolist() == [1.0] * 4
    assert not opt.state


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("distributed", ["all", "some"])
@pytest.mark.parametrize("maker", MAKERS)
def test_step_after_a_change_of_dtensor_params_grads_or_state(
    mesh: DeviceMesh, maker: str, distributed: str, change: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(4, generator=generator) for _ in range(N)]
    both = []
    for _ in range(2):
        params: list[Any] = [
            torch.nn.Parameter(sharded(x.clone(), mesh) if distributed == "all" or k % 2 else x.clone())
            for k, x in enumerate(values)
        ]
        both.append((MAKERS[maker](params), params))
    outcomes: list[list[Any]] = [[], []]
    for step in range(9):
        grads = [torch.randn(4, generator=generator) for _ in range(N)]
        both[1] = (copy.copy(both[1][0]), both[1][1])  # a new object over the same parameters and states
        for (opt, params), outcome in zip(both, outcomes, strict=True):
            for p, g in zip(params, grads, strict=True):
                p.grad = sharded(g.clone(), mesh) if isinstance(p, DTensor) else g.clone()
            if step == 5:
                CHANGES[change](opt, params, mesh)
            before = [part(p).detach().clone() for p in params]
            try:
                opt.step()
            except (RuntimeError, TypeError, ValueError) as error:
                torch.testing.assert_close([part(p).detach() for p in params], before, rtol=0, atol=0)
                outcome.append(type(error))
    assert outcomes[0] == outcomes[1]
    states = [[{k: part(x) for k, x in opt.state[p].items()} for p in params] for opt, params in both]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    torch.testing.assert_close(*[[part(p).detach() for p in params] for _, params in both], rtol=0, atol=0)
    assert [p._version for p in both[0][1]] == [p._version for p in both[1][1]]
