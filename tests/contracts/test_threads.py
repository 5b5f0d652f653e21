"""Threads that step with one transformation over trees of several shapes: each has the steps that it has alone."""

import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.compare import assert_same_bits
from _lib.marks import INTERPRETER


pytestmark = INTERPRETER
STEPS = 120
SHAPES = [((4, 4), (4, 4)), ((4, 4), (8, 3)), ((8, 3), (4, 4)), ((8, 3), (8, 3))]


@fo.leafwise(state={"total": fo.slot(shape=lambda p: p.shape)})
def added_up(u: Any, total: Any) -> Any:
    total = 0.5 * total + u
    return total, total


def doubled(updates: Any, state: Any, params: Any = None) -> Any:
    return {k: 2 * x for k, x in updates.items()}, state


TRANSFORMATIONS: dict[str, fo.GradientTransformation] = {
    "a program": fo.adamw(0.1),
    "programs with a norm": fo.chain(fo.clip_by_global_norm(0.1), fo.adamw(0.1), fo.params_ema(0.9)),
    "whole tensors": fo.chain(added_up(), fo.scale(-0.1)),
    "whole tensors alone": added_up(),
    "a mask": fo.masked(fo.sgd(0.1, 0.9), lambda path, p: path == "a" or p.shape[0] == 4),
    "a schedule in Python": fo.sgd(lambda count: [0.1, 0.2][int(count) % 2]),
    "a function": fo.chain(fo.GradientTransformation(lambda params: (), doubled), fo.adam(0.1)),
}


def make_tree(k: int, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in zip("ab", SHAPES[k], strict=True)}


def steps(tx: fo.GradientTransformation, k: int, pack: bool) -> Any:
    params, grads = make_tree(k, 0), make_tree(k, 1)
    if pack:
        params, grads = fo.pack(params), fo.pack(grads)
    state = tx.init(params)
    for _ in range(STEPS):
        after, state = fo.apply_gradients(tx, params, grads, state)
    return fo.unpack(after) if pack else after


@pytest.fixture
def _short_turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_short_turns")
@pytest.mark.parametrize("pack", [False, True], ids=["trees", "packed"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_threads_with_trees_of_other_shapes(name: str, pack: bool) -> None:
    tx = TRANSFORMATIONS[name]
    alone = [steps(tx, k, pack) for k in range(len(SHAPES))]
    found: dict[int, Any] = {}

    def work(k: int) -> None:
        found[k] = steps(tx, k, pack)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(SHAPES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert_same_bits([found[k] for k in range(len(SHAPES))], alone)
