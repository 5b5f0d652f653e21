"""The host side of launches on a device, against a stand-in: uploads, memory, streams, capture, refusals."""

import contextlib
import gc
import itertools
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import optree
import pytest
import torch
from torch import nn

import functional_optim as fo
from _lib.compare import Snapshot
from _lib.marks import INTERPRETER
from _lib.stand_in import StandIn, _Kernel, replay, stand_in
from functional_optim import _leafwise, adapters
from functional_optim._compiler.triton.tuning import LEAVES
from functional_optim._leafwise import LeafwiseStep, _Values
from functional_optim._packed import Packed
from functional_optim._regions import LeafwiseRegion
from functional_optim._runtime import numbers
from functional_optim._runtime.backend import BACKENDS
from functional_optim._runtime.cuda import capture, driver
from functional_optim._runtime.cuda.capture import CaptureError
from functional_optim._runtime.cuda.launch import STREAMS
from functional_optim._runtime.cuda.loaded import Loaded
from functional_optim._transform import Link


pytestmark = [INTERPRETER, pytest.mark.triton]
SIZES = (5, 33, 8)


@pytest.fixture
def device() -> Iterator[StandIn]:
    with stand_in() as device, fo.use_backend("triton"):
        yield device
    capture.PROCESS.clear()


def make(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(n, generator=generator)) for n in SIZES]


def grads(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(n, generator=generator) for n in SIZES]


def set_grads(params: list[nn.Parameter], new: list[torch.Tensor]) -> None:
    for p, g in zip(params, new, strict=True):
        p.grad = g


def chain() -> fo.GradientTransformation:
    return fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-2))


def warm(seed: int = 0, **options: Any) -> tuple[list[nn.Parameter], Any]:
    """Parameters and an optimizer that has taken two steps, the second and later ones alike."""
    params = make(seed)
    opt = adapters.AdamW(params, **{"lr": 0.1, **options})
    for step in range(2):
        set_grads(params, grads(step))
        opt.step()
    return params, opt


# -- uploads ----------------------------------------------------------------------------------------------------------


def test_tables_are_uploaded_where_something_has_changed(device: StandIn) -> None:
    params, opt = warm()
    n_words = max(device.copies)
    own, device.copies = [p.grad for p in params], []
    opt.step()
    assert device.copies == [], "nothing has moved"
    new = params[1].grad.clone()
    params[1].grad = new
    opt.step()
    (n_addresses,) = device.copies
    device.copies.clear()
    opt.param_groups[0]["lr"] = 0.05
    opt.step()
    (n_numbers,) = device.copies
    assert n_addresses > n_numbers > 0
    device.copies.clear()
    set_grads(params, [g.clone() for g in own])
    opt.param_groups[0]["lr"] = 0.01
    opt.step()
    assert device.copies == [n_addresses + n_numbers]
    assert n_addresses + n_numbers == n_words


def test_a_number_on_the_device_is_copied_there(device: StandIn) -> None:
    """It is read at each step, and its value is nothing that the host knows."""
    lr = torch.tensor(0.1)
    params, opt = warm(lr=lr)
    others, other = warm(lr=0.1)
    device.copies.clear()
    lr.fill_(0.5)
    other.param_groups[0]["lr"] = torch.tensor(0.5).item()
    for own, o in ((params, opt), (others, other)):
        set_grads(own, grads(7))
        o.step()
    assert device.copies[1] == 1  # after the addresses of the gradients
    torch.testing.assert_close(params, others, rtol=0, atol=0)


def test_the_aligned_variant_is_for_steps_of_aligned_arrays_only(device: StandIn) -> None:
    """One address that is no multiple of 16 among all arrays, read or written, takes the other; counters do not count.

    The interpreter computes the same by either; on a device a wide access elsewhere ends the process.
    """
    params = make()
    opt = adapters.TransformOptimizer(params, fo.chain(fo.adam(0.1), fo.params_ema(0.9)))
    opt.param_groups[0]["lr"] = torch.tensor([0.1, 0.1])[1]
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        opt.step()
    _, bound = opt._bindings.steps[0].regions[0].bound[0]
    (memory,) = bound.workspaces[0].device[0].values()
    assert memory.aligned == (True,)

    def shifted(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)

    state = opt.state[params[1]]
    assert {"step", "mu", "nu"} < set(state)
    for key in state:
        before = state[key]
        state[key] = shifted(before)
        opt.step()
        assert memory.aligned == (key == "step",), key
        state[key] = before
        opt.step()
        assert memory.aligned == (True,)
    for name in ("data", "grad"):
        before = getattr(params[2], name)
        setattr(params[2], name, shifted(before))
        opt.step()
        assert memory.aligned == (False,)
        setattr(params[2], name, before)


READS = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__")


def test_steps_read_no_tensor_on_the_host(device: StandIn) -> None:
    """So that none waits for the device: a schedule, numbers in tensors, a reduction, a counter."""
    lr = torch.tensor(0.1)
    tx = fo.chain(fo.clip_by_global_norm(lr), fo.adamw(fo.cosine_decay_schedule(0.1, 9)), fo.params_ema(lr))
    tree = {str(k): p.detach() for k, p in enumerate(make())}
    state, params = tx.init(tree), make()
    opts = [adapters.AdamW(params, lr=lr), adapters.TransformOptimizer(params, tx)]
    updates = dict(zip(tree, grads(0), strict=True))
    set_grads(params, grads(1))

    def steps() -> None:
        for opt in opts:
            opt.step()
        for donate in (False, True):
            fo.apply_gradients(tx, tree, updates, state, donate=donate)

    def waits(x: torch.Tensor, *arguments: Any) -> Any:
        raise AssertionError("a tensor is read on the host")

    with mock.patch.object(_Kernel, "bind", return_value=lambda: None):  # the interpreter reads tensors
        steps()
        with contextlib.ExitStack() as stack:
            for name in READS:
                stack.enter_context(mock.patch.object(torch.Tensor, name, waits))
            steps()
            with device.capture():
                steps()


def ones(*shapes: tuple[int, ...], dtypes: Sequence[torch.dtype] = (torch.float32,)) -> dict[str, torch.Tensor]:
    return {str(k): torch.ones(shape, dtype=dtypes[k % len(dtypes)]) for k, shape in enumerate(shapes)}


TREES: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "one group": lambda: ones((5,), (33,), (8,)),
    "two groups": lambda: ones((5,), (33,), (8,), dtypes=(torch.float32, torch.float64)),
    "several programs of a uniform kernel": lambda: ones(*[(1,)] * (LEAVES + 3)),
    "packed": lambda: ones((5,), (33,)),
    "no elements": lambda: ones((0,), (0, 2)),
}
COUNTING: dict[str, Callable[[], fo.GradientTransformation]] = {
    "one counter": lambda: fo.adamw(0.1),
    "two counters": lambda: fo.adamw(fo.cosine_decay_schedule(0.1, 9)),
    "several stages": lambda: fo.chain(fo.scale_by_adam(), fo.clip_by_global_norm(1.0), fo.sgd(lambda t: 1 / (1 + t))),
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", COUNTING)
def test_the_last_pass_moves_counters_on(device: StandIn, name: str, tree: str) -> None:
    """Behind all kernels that read them; where there are no elements, an operation of torch does it."""
    tx, expected, gradients = COUNTING[name](), TREES[tree](), TREES[tree]()
    params, grads = map(fo.pack, (expected, gradients)) if tree == "packed" else (TREES[tree](), gradients)
    state, other, added, add = tx.init(params), tx.init(expected), list[torch.Tensor](), torch.Tensor.add_
    with mock.patch.object(torch.Tensor, "add_", lambda x, y: added.append(x) or add(x, y)):
        for _ in range(3):
            fo.apply_gradients(tx, params, grads, state, donate=True)
    with fo.use_backend("reference"):
        for _ in range(3):
            expected, other = fo.apply_gradients(tx, expected, gradients, other)
    torch.testing.assert_close(fo.unpack(params) if tree == "packed" else params, expected)
    counters = [x for x in leaves(state) if x.dtype is torch.int64]
    assert [x.item() for x in counters] == [3] * (1 + (name != "one counter"))
    assert len(added) == 3 * len(counters) * (tree == "no elements")


def leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors of a tree, in place of packed ones their buffers."""
    found = [x.buffers if isinstance(x, Packed) else (x,) for x in optree.tree_leaves(tree)]
    return list(itertools.chain.from_iterable(found))


def steady(way: str) -> Callable[[], Any]:
    """A step like those before, of AdamW on gradients where they have been."""
    if way == "optimizer":
        return warm()[1].step  # type: ignore[no-any-return]
    tx, tree = fo.adamw(0.1), dict(enumerate(map(torch.ones, SIZES)))
    updates, held = optree.tree_map(torch.ones_like, tree), [(tree, tx.init(tree))]

    def step() -> None:
        held[0] = fo.apply_gradients(tx, held[0][0], updates, held[0][1], donate=way == "donated")

    step()
    step()
    return step


@pytest.mark.parametrize(
    ("way", "operations"), [("donated", []), ("optimizer", []), ("pure", ["empty", "copy_", "add"])]
)
def test_a_steady_step_is_its_launches(device: StandIn, way: str, operations: list[str]) -> None:
    """Operations of torch cost as much as a launch; a pure step uploads addresses, and makes a new counter."""
    launched: list[int] = []
    with mock.patch.object(_Kernel, "bind", return_value=lambda: launched.append(1)):
        step = steady(way)
        launched.clear()
        with torch.autograd.profiler.profile() as profile:
            step()
    assert len(launched) == 2
    names = [event.name.removeprefix("aten::") for event in profile.function_events if event.name.startswith("aten::")]
    assert names == operations


def test_each_stream_has_memory_of_its_own(device: StandIn) -> None:
    tx, params = chain(), {str(k): p.detach() for k, p in enumerate(make())}
    state = tx.init(params)
    for stream in (0, 1, 0, 1, 2, 3, 4, 5):
        device.current = stream
        updates = dict(zip(params, grads(0), strict=True))
        params, state = fo.apply_gradients(tx, params, updates, state, donate=True)
    (step,) = tx._bound_steps
    workspaces = [w for _, found in step.segments[0].bound for w in found.workspaces]
    (memories,) = [memories for w in workspaces for memories in w.device.values()]
    assert list(memories) == [2, 3, 4, 5]
    assert len({memory.words.data_ptr() for memory in memories.values()}) == STREAMS
    assert device.followed == 6, "a stream waits for the tables of a binding once"


def test_a_number_in_host_memory_is_read_without_a_copy(device: StandIn) -> None:
    """Reading it waits for nothing; a copy of it to a device would be one more at each step."""
    _, opt = warm()
    opt.step()
    _, bound = opt._bindings.steps[0].regions[0].bound[0]
    (memory,) = bound.workspaces[0].device[0].values()
    tables = memory.tables
    numbers = [[torch.tensor(0.25), *[0.5] * (tables.packer.size // 8 - 1)]]
    assert [k for k, _ in tables.numbers(numbers)[1]] == [0]
    tables.device = torch.device("cuda", 0)
    content, live = tables.numbers(numbers)
    assert (tables.packer.unpack(content)[0], live) == (0.25, [])


def test_memory_that_stays_is_allocated_in_another_thread() -> None:
    """So it is of no pool that the caller's thread allocates from, but of its stream."""
    stream, streams = object(), list[Any]()

    @contextlib.contextmanager
    def enter(x: Any) -> Iterator[None]:
        streams.append((threading.get_ident(), x))
        yield

    def fails() -> None:
        raise torch.OutOfMemoryError("none is left")

    with mock.patch("torch.cuda.current_stream", return_value=stream), mock.patch("torch.cuda.stream", enter):
        own = driver.CUDA.allocate(threading.get_ident, torch.device("cuda", 0))
        with pytest.raises(torch.OutOfMemoryError, match="none is left"):
            driver.CUDA.allocate(fails, torch.device("cuda", 0))
    assert own != threading.get_ident()
    assert streams[0] == (own, stream)


def test_memory_that_stays_is_told_from_that_of_a_graph(device: StandIn) -> None:
    """Tables, and the memory of a stream; a graph has memory in its own pool."""
    with mock.patch.object(device, "allocate", wraps=device.allocate) as allocate:
        _, opt = warm()
        assert allocate.call_count == 2
        with device.capture():
            opt.step()
        opt.step()
        assert allocate.call_count == 2


# -- capture ----------------------------------------------------------------------------------------------------------


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
            assert all(map(torch.equal, leaves(own), leaves(wanted)))
    assert {x.item() for x in leaves(state) if x.dtype is torch.int64} == {6}


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


def test_a_captured_step_keeps_its_kernels(device: StandIn) -> None:
    """Triton unloads kernels without references, and a graph holds none."""
    _, opt = warm()
    with device.capture():
        opt.step()
    held = capture.PROCESS.held
    assert any(isinstance(stage, Loaded) for x in held if isinstance(x, tuple) for stage in x)


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


class Running:
    """A transformation in Python, with a running mean of the updates and the number of steps.

    Args:
      counts: the number, from the one before.
    """

    def __init__(self, counts: Callable[[Any], Any]) -> None:
        self.counts = counts

    def init(self, params: Any) -> Any:
        return {"mean": {k: torch.zeros_like(p) for k, p in params.items()}, "steps": 0}

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        mean = {k: 0.5 * state["mean"][k] + u for k, u in updates.items()}
        return mean, {"mean": mean, "steps": self.counts(state["steps"])}


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


@pytest.fixture
def meta_has_memory() -> Iterator[None]:
    """Has meta stand for another device: numbers on meta itself are refused everywhere."""
    with mock.patch.object(numbers, "check_memory"), mock.patch.object(_leafwise, "check_memory"):
        yield


# -- refusals ---------------------------------------------------------------------------------------------------------


def refused(device: StandIn, opt: Any, params: list[nn.Parameter], message: str) -> None:
    """A step is refused while it is captured, and leaves everything as it was."""
    before = Snapshot(params, [dict(opt.state[p]) for p in params if p in opt.state])
    with device.capture() as graph, pytest.raises(CaptureError, match=message):
        opt.step()
    assert not graph
    before.check()


def test_a_first_step_is_refused(device: StandIn) -> None:
    params = make()
    set_grads(params, grads(0))
    refused(device, adapters.AdamW(params), params, "it is the first one of a parameter.* take two such steps")


def test_a_first_step_of_a_transformation_is_refused(device: StandIn) -> None:
    tx, params, updates = chain(), {"w": torch.ones(3)}, {"w": torch.ones(3)}
    state = tx.init(params)
    with device.capture() as graph, pytest.raises(CaptureError, match=r"over these tensors .* take two such steps"):
        fo.apply_gradients(tx, params, updates, state, donate=True)
    assert not graph


def test_a_state_that_was_cleared_is_refused(device: StandIn) -> None:
    """Each replay would make it anew, and none would go on from the one before."""
    params, opt = warm()
    opt.step()
    opt.state.clear()
    refused(device, opt, params, "whose state each replay would start anew; take two such steps")


def test_a_gradient_that_is_gone_is_refused(device: StandIn) -> None:
    params, opt = warm()
    params[1].grad = None
    refused(device, opt, params, "which gradients are there.*gradients for the same parameters")


def test_state_that_changes_in_python_is_refused(device: StandIn) -> None:
    params = make()
    opt = adapters.TransformOptimizer(params, fo.chain(Running(lambda n: n + 1), fo.sgd(0.1)))
    for step in range(2):
        set_grads(params, grads(step))
        opt.step()
    with device.capture(), pytest.raises(CaptureError, match=r"the entry 'transformation_0:tree.steps' .* Python"):
        opt.step()


def late_number(opt: Any, params: list[nn.Parameter]) -> None:
    opt.param_groups[0]["lr"] = 0.05


def late_device(opt: Any, params: list[nn.Parameter]) -> None:
    opt.param_groups[0]["lr"] = torch.empty((), device="meta")


def late_state(opt: Any, params: list[nn.Parameter]) -> None:
    for p in params:
        opt.state[p]["trace"] = opt.state[p]["trace"].double()


LATE: dict[str, tuple[Callable[[Any, list[nn.Parameter]], None], Any, str]] = {
    "a number": (late_number, 0.1, "Python number has another value"),
    "a number elsewhere": (late_device, torch.tensor(0.1), "a tensor on meta"),
    "a schedule": (lambda opt, params: None, lambda count: RATES[int(count)], "is evaluated in Python"),
}


@pytest.mark.parametrize("last", ["kernels", "torch operations"])
@pytest.mark.parametrize("name", LATE)
def test_a_refusal_of_a_later_part_leaves_nothing_behind(device: StandIn, name: str, last: str) -> None:
    """It comes before the first part of the chain is captured, which nothing takes back."""
    change, rate, message = LATE[name]
    params = make()
    tail = fo.scale_by_learning_rate(rate) if last == "kernels" else scaled(lr=rate)
    opt = adapters.TransformOptimizer(params, fo.chain(fo.scale_by_adam(), Running(lambda n: n), tail))
    for step in range(2):
        set_grads(params, grads(step))
        opt.step()
    change(opt, params)
    memory = fo.CapturedMemory()
    with memory:
        refused(device, opt, params, message)
    assert not memory.held


def test_a_refusal_behind_a_part_says_to_discard_the_graph(device: StandIn) -> None:
    params = make()
    opt = adapters.TransformOptimizer(params, fo.chain(fo.scale_by_adam(), Running(lambda n: n), fo.sgd(0.1, 0.9)))
    for step in range(2):
        set_grads(params, grads(step))
        opt.step()
    late_state(opt, params)
    with device.capture(), pytest.raises(CaptureError, match=r"over these tensors .* captured: discard the graph\.$"):
        opt.step()
    params[0].grad = None
    with device.capture(), pytest.raises(CaptureError, match=r"for the same parameters\.$"):
        opt.step()


def test_a_donated_step_with_state_in_new_tensors_is_refused(device: StandIn) -> None:
    tx, params = fo.adafactor(0.1), {"w": torch.ones(3)}
    state = tx.init(params)
    for _ in range(2):
        params, state = fo.apply_gradients(tx, params, params, state, donate=True)
    with device.capture(), pytest.raises(CaptureError, match=r"it is donated, but .*not donated"):
        fo.apply_gradients(tx, params, params, state, donate=True)


def test_a_python_number_that_has_changed_is_refused(device: StandIn) -> None:
    params, opt = warm()
    opt.param_groups[0]["lr"] = 0.05
    refused(device, opt, params, "Python number has another value.*pass it as a tensor on the device")


@pytest.mark.usefixtures("meta_has_memory")
def test_a_number_on_another_device_is_refused(device: StandIn) -> None:
    params, opt = warm(lr=torch.tensor(0.1))
    opt.param_groups[0]["lr"] = torch.empty((), device="meta")
    refused(device, opt, params, "a tensor on meta.*move it to cpu")


@fo.leafwise()
def scaled(u: Any, *, lr: Any) -> Any:
    """A rule for whole tensors with a number, which it is the only part of a chain with."""
    return -lr * u


@fo.leafwise()
def by_step(u: Any, *, step: Any) -> Any:
    """A rule for whole tensors with the number of the step."""
    return u / step


def whole(tx: fo.GradientTransformation) -> LeafwiseStep:
    """A rule for whole tensors over one leaf."""
    return LeafwiseStep(LeafwiseRegion(0, Link(tx, (), (True,), tx.bound), True), ["w"], [0])


@pytest.mark.usefixtures("meta_has_memory")
@pytest.mark.parametrize("name", ["foreach", "reference", "a rule for whole tensors"])
def test_numbers_are_refused_in_steps_of_torch_operations(device: StandIn, name: str) -> None:
    """They are constants of a graph there, too."""
    leaves = [nn.Parameter(torch.ones(n, 1)) for n in SIZES]
    make = adapters.AdamW if name in BACKENDS else lambda p, lr: adapters.TransformOptimizer(p, scaled(lr=lr))
    with fo.use_backend(name) if name in BACKENDS else contextlib.nullcontext():
        opt = make(leaves, lr=0.1)
        for _ in range(2):
            set_grads(leaves, [torch.ones(n, 1) for n in SIZES])
            opt.step()
        with device.capture():
            opt.step()
        opt.param_groups[0]["lr"] = 0.05
        refused(device, opt, leaves, "Python number has another value.*pass it as a tensor on the device")
        opt.param_groups[0]["lr"] = torch.empty((), device="meta")
        refused(device, opt, leaves, "a tensor on meta.*move it to cpu")
        opt.param_groups[0]["lr"] = torch.tensor(0.05)
        opt.step()
        with device.capture():
            opt.step()


RATES = [0.1] * 9
FACTORS: dict[str, Callable[[Any], fo.GradientTransformation]] = {
    "a rule for elements": fo.scale_by_learning_rate,
    "a rule for whole tensors": lambda rate: scaled(lr=rate),
}


@pytest.mark.parametrize("rule", FACTORS)
def test_a_schedule_that_python_evaluates_is_refused(device: StandIn, rule: str) -> None:
    """Also one whose value has not changed so far."""
    params = make()
    opt = adapters.TransformOptimizer(params, FACTORS[rule](lambda count: RATES[int(count)]))
    for step in range(2):
        set_grads(params, grads(step))
        opt.step()
    refused(device, opt, params, "schedule of .* is evaluated in Python.*so that it can be traced")


@pytest.mark.parametrize("rate", [lambda t: RATES[t], fo.join_schedules([lambda t: 0.1, lambda t: RATES[t]], [1])])
def test_python_evaluates_a_schedule_of_whole_tensors_with_a_number(rate: Any) -> None:
    """Wherever the counter is. Schedules of torch operations are given the counter itself, which nothing waits for."""
    assert not whole(scaled(lr=fo.cosine_decay_schedule(0.1, 9))).region.python_hypers
    step, count, seen = whole(scaled(lr=rate)), torch.tensor(2.0), list[Any]()
    assert step.region.python_hypers == {"lr"}
    with mock.patch.dict(step.bound.values, lr=lambda t: seen.append(t) or 0.1):
        for hypers in ({"lr"}, set[str]()):
            step.region.python_hypers = hypers
            _Values.of(step.region, {}, count, False, {}, count.device)
    assert (type(seen[0]), seen[0]) == (int, 2)
    assert seen[1] is count


def test_a_counter_of_a_tree_elsewhere_is_refused(device: StandIn) -> None:
    tx, params = chain(), {"w": torch.ones(3)}
    state = tx.init(params)
    for _ in range(2):
        fo.apply_gradients(tx, params, params, state)
    elsewhere = optree.tree_map(lambda x: x if x.ndim else x.to("meta"), state)
    with device.capture() as graph, pytest.raises(CaptureError, match=r"adam.count is on meta, .*; move it to cpu"):
        fo.apply_gradients(tx, params, params, elsewhere)
    assert not graph


@pytest.mark.parametrize("count", [torch.empty((), device="meta"), 2])
def test_a_counter_elsewhere_is_refused(device: StandIn, count: Any) -> None:
    """A rule for whole tensors may read it in host memory; a graph would keep it."""
    step, columns = whole(by_step()), {"updates": [torch.ones(3)], "step": [torch.zeros(())]}
    with device.capture():
        step.compute(columns, {})
        with pytest.raises(CaptureError, match=r"counter of by_step at 'w' is .* keep its value; move it to cpu"):
            step.compute({**columns, "step": [count]}, {})


def objective(p: torch.Tensor) -> torch.Tensor:
    return p.square().sum()


def rows(make: Any) -> Callable[[nn.Parameter], Callable[[], Any]]:
    """Steps of an optimizer on sparse gradients."""

    def steps(p: nn.Parameter) -> Callable[[], Any]:
        opt, grad = make([p], lr=0.1), torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.ones(2), p.shape)

        def step() -> None:
            p.grad = grad
            opt.step()

        return step

    return steps


def closures(p: nn.Parameter) -> Callable[[], Any]:
    """Steps of an optimizer that evaluates the loss."""
    opt = adapters.LBFGS([p], max_iter=2)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = objective(p)
        loss.backward()
        return loss

    return lambda: opt.step(closure)


def from_one_state(tx: fo.GradientTransformation) -> Callable[[nn.Parameter], Callable[[], Any]]:
    """Steps of a transformation."""

    def steps(p: nn.Parameter) -> Callable[[], Any]:
        x = p.detach()
        state, extra = tx.init(x), {"value": objective(x), "grad": 2 * x, "value_fn": objective}
        return lambda: fo.apply_gradients(tx, x, 2 * x, state, **extra)

    return steps


BY_THE_HOST: dict[str, tuple[Callable[[nn.Parameter], Callable[[], Any]], str]] = {
    "SparseAdam": (rows(adapters.SparseAdam), "the rows of sparse gradients are found"),
    "rows": (rows(adapters.SGD), "the rows of sparse gradients are found"),
    "LBFGS": (closures, "LBFGS compares values of the loss"),
    "scale_by_lbfgs": (from_one_state(fo.scale_by_lbfgs()), "scale_by_lbfgs chooses pairs"),
    "a line search": (from_one_state(fo.scale_by_backtracking_linesearch(3)), "linesearch compares values"),
}


@pytest.mark.parametrize("name", BY_THE_HOST)
def test_steps_that_the_host_decides_on_are_refused(device: StandIn, name: str) -> None:
    p = make()[0]
    steps, message = BY_THE_HOST[name]
    step = steps(p)
    for _ in range(2):
        step()
    before = p.detach().clone()
    with (
        device.capture() as graph,
        pytest.raises(CaptureError, match=f"{message}.* on the host.*take the step outside"),
    ):
        step()
    assert not graph
    torch.testing.assert_close(p.detach(), before, rtol=0, atol=0)


def test_other_alignment_than_before_is_refused(device: StandIn) -> None:
    params, opt = warm()
    opt.step()
    params[0].grad = torch.empty(6)[1:].copy_(params[0].grad)
    refused(device, opt, params, "multiple of 16 bytes.*take a step over tensors of that kind")
    assert not capture.PROCESS.held, "a refused capture keeps nothing, for nothing was captured that reads it"


def test_more_captures_than_there_is_memory_for_are_refused(device: StandIn) -> None:
    _, opt = warm()
    steps = (opt.step() for _ in range(10_000))
    with device.capture(), pytest.raises(CaptureError, match="take a step outside of a graph before the next"):
        list(steps)
    opt.step()
    with device.capture() as graph:
        opt.step()
    assert graph


def test_a_refusal_is_pickled_with_its_message() -> None:
    for error in (CaptureError("it is the first one", "take two before"), CaptureError("late", "again", partly=True)):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
