"""Steps that are captured in a CUDA graph, against a stand-in of a device."""

import contextlib
import contextvars
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import functional_optim as fo
from _lib.marks import INTERPRETER
from _lib.stand_in import StandIn, replay
from _lib.warm import SIZES, Running, chain, grads, make, set_grads, warm
from functional_optim import adapters
from functional_optim._runtime.cuda import capture


pytestmark = [INTERPRETER, pytest.mark.triton]


@pytest.mark.parametrize("moved", [False, True])
def test_a_captured_step_goes_on_at_each_replay(device: StandIn, moved: bool) -> None:
    """Counters and tensors move on; later steps, other graphs, and the end of the optimizer change nothing."""
    lr, other_lr = torch.tensor(0.1), torch.tensor(0.1)
    (params, opt), (expected, other) = warm(lr=lr), warm(lr=other_lr)
    own = grads(9) if moved else [p.grad for p in params]  # gradients within a graph are where they never were
    set_grads(params, own)
    before = [p.detach().clone() for p in params]
    with device.capture() as graph:
        opt.step()
    torch.testing.assert_close([p.detach() for p in params], before, rtol=0, atol=0)
    kept = {p: dict(opt.state[p]) for p in params}  # the memory that a graph writes is the caller's
    for step in range(4):
        if step == 1:
            for o, leaves in ((opt, params), (other, expected)):
                set_grads(leaves, grads(30))
                o.step()
            with device.capture():
                opt.step()
            for o in (opt, other):
                o.step()
        elif step == 2:
            del opt, o
            gc.collect()
        for g, new in zip(own, grads(20 + step), strict=True):
            g.copy_(new)
        for x in (lr, other_lr):
            x.fill_(0.1 / (step + 1))
        replay(graph)
        set_grads(expected, grads(20 + step))
        other.step()
        torch.testing.assert_close(params, expected, rtol=0, atol=0)
    assert {x["step"].item() for x in kept.values()} == {8.0}


@pytest.mark.parametrize("packs", [False, True])
def test_a_captured_step_of_a_tree_counts_at_each_replay(device: StandIn, packs: bool) -> None:
    """Counters that all leaves share are moved on where they are, by replays and by steps between them."""
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(fo.cosine_decay_schedule(0.1, 9)))
    trees = [{str(k): torch.ones(n) for k, n in enumerate(SIZES)} for _ in range(3)]
    params, expected, updates = map(fo.pack, trees) if packs else trees
    state, other = tx.init(params), tx.init(expected)

    def step(params: Any, state: Any) -> None:
        fo.apply_gradients(tx, params, updates, state, donate=True)

    for _ in range(2):
        step(params, state)
        step(expected, other)
    with device.capture() as graph:
        step(params, state)
    for turn in range(4):
        if turn == 1:
            step(params, state)
        else:
            replay(graph)
        step(expected, other)
        for own, wanted in ((params, expected), (state, other)):
            assert all(map(torch.equal, tree_leaves(own), tree_leaves(wanted)))
    assert {x.item() for x in tree_leaves(state) if x.dtype is torch.int64} == {6}


def test_a_captured_chain_replays_its_reduction(device: StandIn) -> None:
    params, expected = make(), make()
    opts = [adapters.TransformOptimizer(own, chain()) for own in (params, expected)]
    for own, opt in zip((params, expected), opts, strict=True):
        for step in range(2):
            set_grads(own, grads(step))
            opt.step()
    own = grads(2)
    set_grads(params, own)
    with device.capture() as graph:
        opts[0].step()
    for step in range(3):
        for g, new in zip(own, grads(step), strict=True):
            g.copy_(new)
        replay(graph)
        set_grads(expected, grads(step))
        opts[1].step()
        torch.testing.assert_close(params, expected, rtol=0, atol=0)


def test_memory_of_a_graph_belongs_to_its_owner(device: StandIn) -> None:
    """It is freed with the object that holds it, not before; other captures leave theirs to the process."""
    _, opt = warm()
    memory, freed = fo.CapturedMemory(), list[int]()
    for k in range(2):
        with memory, device.capture():
            opt.step()
        opt.step()  # sets other memory aside
        block = [x for x in memory.held if isinstance(x, torch.Tensor)][-1]
        weakref.finalize(block, freed.append, k)
    assert not capture.PROCESS.held
    del block
    opt.step()
    gc.collect()
    assert freed == []
    del memory
    gc.collect()
    assert sorted(freed) == [0, 1]
    with device.capture():
        opt.step()
    assert capture.PROCESS.held


@fo.elementwise(state={"size": fo.slot(per="tree")})
def sized(u: Any, size: Any) -> Any:
    """A rule with a number for the tree, of which a step in place has copies."""
    size = 0.5 * size + fo.tree_norm(u)
    return u / size, size


def test_a_captured_step_has_copies_of_shared_numbers_of_its_own(device: StandIn) -> None:
    params = make()
    opt = adapters.TransformOptimizer(params, sized())
    for step in range(2):
        set_grads(params, grads(step))
        opt.step()
    (bound,) = opt._bindings.steps
    (copies,) = bound.state.copies.values()
    own = {memory.data_ptr() for memory, _ in copies.known.values()}
    made: list[torch.Tensor] = []
    clone = torch.Tensor.clone
    with device.capture(), mock.patch.object(torch.Tensor, "clone", lambda x: made.append(clone(x)) or made[-1]):
        opt.step()
    assert made
    assert own == {memory.data_ptr() for memory, _ in copies.known.values()}
    assert not own & {x.data_ptr() for x in made}


IN_PYTHON: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "rules for whole tensors": adapters.Adafactor,
    "between rules": lambda p: adapters.TransformOptimizer(p, fo.chain(fo.adam(0.1), fo.adafactor(0.1), fo.adam(0.1))),
    "Python": lambda p: adapters.TransformOptimizer(p, fo.chain(fo.adam(0.1), Running(lambda n: n))),
}


@pytest.mark.parametrize("name", IN_PYTHON)
def test_state_stays_where_it_is_in_a_captured_step(device: StandIn, name: str) -> None:
    """A replay reads the results of the last one. Elsewhere some of it is in new tensors after each step."""
    params = make()
    opt = IN_PYTHON[name](params)
    for step in range(2):
        set_grads(params, grads(step))
        opt.step()

    def tensors() -> dict[Any, torch.Tensor]:
        return {(p, k): x for p in params for k, x in opt.state[p].items() if isinstance(x, torch.Tensor)}

    before = tensors()
    with device.capture():  # operations of torch run at once in this stand-in
        opt.step()
    assert all(x is before[key] for key, x in tensors().items())
    opt.step()
    assert any(x is not before[key] for key, x in tensors().items())


def test_leaves_where_nothing_is_captured_are_refused(device: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays would leave them out. Meta stands for a device whose stream is not capturing."""
    place: list[torch.device] = []

    @contextlib.contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        place.append(device)
        yield
        place.pop()

    monkeypatch.setattr(device, "guard", guard)
    monkeypatch.setattr(device, "is_capturing", lambda: device.graph is not None and place[-1].type != "meta")
    tx, params = fo.sgd(0.1, momentum=0.9), {"a": torch.ones(3), "b": torch.ones(3, device="meta")}
    state = tx.init(params)

    def step() -> None:
        fo.apply_gradients(tx, params, {k: torch.ones_like(p) for k, p in params.items()}, state, donate=True)

    for _ in range(2):
        step()
    before = params["a"].clone()
    mapped: Any = lambda: torch.vmap(lambda p: fo.apply_gradients(tx, p, p, tx.init(p))[0])(params)  # noqa: E731
    loss: Any = lambda p: fo.apply_gradients(tx, p, params, tx.init(params))[0]["a"].sum()  # noqa: E731
    for captured in (step, mapped, lambda: torch.func.grad(loss)(params)):
        asked = "triton" if captured is step else "reference"
        refused = pytest.raises(capture.CaptureError, match="some of its leaves are on meta")
        with device.capture() as graph, fo.use_backend(asked), refused:
            captured()
        assert not graph
        assert torch.equal(params["a"], before)


def test_blocks_of_one_owner_of_memory_end_in_any_order() -> None:
    """Of two threads the one that has begun first ends first, and a block in a generator ends behind a later one."""
    memory, other, failures = fo.CapturedMemory(), fo.CapturedMemory(), list[BaseException]()
    entered = threading.Event(), threading.Event()
    left = threading.Event()

    def work(k: int) -> None:
        try:
            with memory:
                entered[k].set()
                entered[1].wait(60)
                capture.hold(block := torch.zeros(1))
                if k == 1:
                    left.wait(60)
            assert any(x is block for x in memory.held)
            left.set()
        except BaseException as error:
            failures.append(error)

    first, second = (threading.Thread(target=work, args=(k,)) for k in range(2))
    first.start()
    entered[0].wait(60)
    second.start()
    for thread in (first, second):
        thread.join(120)
    assert not failures

    def inside() -> Iterator[None]:
        with memory:
            yield

    block = inside()
    next(block)
    with other:
        next(block, None)
        capture.hold(found := torch.zeros(1))
    assert other.held == [found]
    elsewhere = inside()
    contextvars.copy_context().run(next, elsewhere)
    next(elsewhere, None)
    capture.hold(kept := torch.zeros(1))
    assert any(x is kept for x in capture.PROCESS.held)
