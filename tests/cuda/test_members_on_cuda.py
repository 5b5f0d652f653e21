"""Steps of ensembles on a CUDA device: numbers, waiting, capture."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.func import vmap

import functional_optim as fo
from _lib.on_cuda import NEEDS_A_DEVICE, Tree, draw, side_stream
from functional_optim._runtime.programs import Programs


pytestmark = NEEDS_A_DEVICE
N, STEPS = 5, 20
CHAINS: dict[str, Callable[[Any], fo.GradientTransformation]] = {
    "adamw": lambda x: fo.adamw(x, weight_decay=0.1),
    "clip, adamw": lambda x: fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(x)),
    "lamb": lambda x: fo.lamb(x, weight_decay=0.1),
    "schedule": lambda x: fo.sgd(fo.cosine_decay_schedule(x, STEPS), 0.9),
}


def rates() -> torch.Tensor:
    return torch.logspace(-3, -1, N, dtype=torch.float64).cuda()


def stacks(seed: int, dtype: torch.dtype) -> Tree:
    """The leaves of all members, some of them no multiple of 16 bytes apart."""
    drawn = [draw(N * seed + k, dtype, "cuda") for k in range(N)]
    return {name: torch.stack([tree[name] for tree in drawn]) for name in drawn[0]}


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_members_step_as_they_do_alone(name: str, dtype: torch.dtype, packs: bool) -> None:
    make, form = CHAINS[name], fo.pack if packs else dict
    alone = []
    for k, rate in enumerate(rates().unbind()):
        tx, params = make(rate), {name: x[k].clone() for name, x in stacks(0, dtype).items()}
        state = tx.init(params)
        for step in range(STEPS):
            grads = {name: x[k].clone() for name, x in stacks(1 + step, dtype).items()}
            params, state = fo.apply_gradients(tx, params, grads, state)
        alone.append(params)
    params = vmap(form)(stacks(0, dtype))
    state = vmap(lambda x, p: make(x).init(p))(rates(), params)
    with mock.patch.object(Programs, "evaluate_reference", side_effect=AssertionError("by operations of torch")):
        for step in range(STEPS):
            params, state = vmap(lambda x, p, g, s: fo.apply_gradients(make(x), p, g, s))(
                rates(), params, vmap(form)(stacks(1 + step, dtype)), state
            )
    found = vmap(fo.unpack)(params) if packs else params
    # reductions over other chunks are rounded otherwise; half precision doubles that where values are rounded
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 0.16}[dtype]
    for leaf in found:
        expected = torch.stack([p[leaf] for p in alone])
        torch.testing.assert_close(found[leaf], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["adamw", "clip, adamw"])
def test_steps_of_members_wait_for_nothing(name: str) -> None:
    make, own, params = CHAINS[name], rates(), stacks(0, torch.float32)
    state = vmap(lambda x, p: make(x).init(p))(own, params)
    step = vmap(lambda x, p, g, s: fo.apply_gradients(make(x), p, g, s))
    for k in range(5):
        grads = stacks(1 + k, torch.float32)
        torch.cuda.set_sync_debug_mode("error" if k >= 2 else "default")
        try:
            params, state = step(own, params, grads, state)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["adamw", "clip, adamw"])
def test_a_captured_step_of_members_replays(name: str) -> None:
    """Rates and gradients are read anew at each replay."""
    make, own = CHAINS[name], rates()
    params, grads = stacks(0, torch.float32), stacks(1, torch.float32)
    state = vmap(lambda x, p: make(x).init(p))(own, params)
    step = vmap(lambda x, p, g, s: fo.apply_gradients(make(x), p, g, s))
    with side_stream():
        for _ in range(3):
            step(own, params, grads, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = step(own, params, grads, state)
    for k in range(3):
        own.mul_(0.5)
        for leaf, x in stacks(10 + k, torch.float32).items():
            grads[leaf].copy_(x)
        graph.replay()
        torch.testing.assert_close(actual, step(own, params, grads, state), rtol=0, atol=0)


def test_rates_of_the_host() -> None:
    """They are read without waiting, and refused where a graph would keep them."""
    tx, params, own = CHAINS["adamw"], stacks(0, torch.float32), rates().cpu()
    state = vmap(lambda x, p: tx(x).init(p))(own, params)
    step = vmap(lambda x, p, s: fo.apply_gradients(tx(x), p, p, s))
    with side_stream():
        for _ in range(3):
            new, _ = step(own, params, state)
    expected, _ = step(own.cuda(), params, state)
    torch.testing.assert_close(new, expected, rtol=0, atol=0)
    refused = pytest.raises(RuntimeError, match="a hyper-parameter is a tensor on cpu")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        step(own, params, state)
