"""The host side of launches on a device, against a stand-in: uploads, memory, streams."""

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import optree
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import functional_optim as fo
from _lib.compilers import restart
from _lib.marks import INTERPRETER
from _lib.stand_in import StandIn, _Kernel
from _lib.warm import SIZES, chain, grads, make, set_grads, warm
from functional_optim import adapters
from functional_optim._compiler.cache import BuildError
from functional_optim._compiler.triton import emit
from functional_optim._runtime.cuda import launch, streams
from functional_optim._runtime.cuda.launch import STREAMS


pytestmark = [INTERPRETER, pytest.mark.triton]
LEAVES = 8


@pytest.fixture(autouse=True, scope="module")
def _few_leaves() -> Iterator[None]:
    """A program of a uniform kernel has few leaves, for the interpreter takes seconds for a hundred in a pass."""
    assert emit.LEAVES > LEAVES
    restart()
    with mock.patch.object(emit, "LEAVES", LEAVES):
        yield
    restart()


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


@pytest.mark.parametrize("decays", ["one chain", "two chains"])
def test_a_number_of_many_groups_is_copied_in_few_runs(device: StandIn, decays: str) -> None:
    """One for each place that it has in the tables of a chain, however many groups there are."""
    lr, n = torch.tensor(0.1), 20
    trained: list[list[nn.Parameter]] = []
    for rate in (lr, 0.1):
        params = [nn.Parameter(torch.ones(3)) for _ in range(n)]
        groups = [
            {"params": [p], "weight_decay": 0.0 if decays == "two chains" and k % 2 else 0.1 * k + 0.1}
            for k, p in enumerate(params)
        ]
        opt = adapters.AdamW(groups, lr=rate)
        for step in range(3):
            for k, p in enumerate(params):
                p.grad = torch.full((3,), 1.0 + k + step)
            if step == 2:
                device.copies.clear()
            opt.step()
        if rate is lr:
            assert 1 <= device.copies.count(1) <= 4
        trained.append(params)
    torch.testing.assert_close(*trained, rtol=0, atol=0)


class Wrapped(torch.Tensor):
    """A tensor without an address."""

    @staticmethod
    def __new__(cls, x: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    @classmethod
    def __torch_dispatch__(cls, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = f(*[x.x if isinstance(x, Wrapped) else x for x in args], **(kwargs or {}))
        return cls(result) if isinstance(result, torch.Tensor) and f is not torch.ops.aten.copy_.default else result


COMPLEX = torch.tensor(0.5 + 0.25j)
PAIRS = {
    "the same": (lambda: (x := torch.tensor(0.25), x), 0.25, 0.25),
    "views of one": (lambda: ((x := torch.tensor([0.25, 0.5]))[0], x[0]), 0.25, 0.25),
    "neighbours": (lambda: ((x := torch.tensor([0.25, 0.5]))[0], x[1]), 0.25, 0.5),
    "a negative view": (lambda: (COMPLEX.imag, torch.conj(COMPLEX).imag), 0.25, -0.25),
    "without addresses": (lambda: (Wrapped(torch.tensor(0.5)), Wrapped(torch.tensor(0.25))), 0.5, 0.25),
    "of other dtypes": (lambda: (torch.tensor(0.5), torch.tensor(0.25, dtype=torch.float64)), 0.5, 0.25),
}


@pytest.mark.parametrize("name", PAIRS)
def test_numbers_of_one_memory_are_one_only_if_they_are_the_same(device: StandIn, name: str) -> None:
    make_pair, rate, decay = PAIRS[name]
    lr, wd = make_pair()
    params, grads = {"a": torch.ones(3)}, {"a": torch.full((3,), 2.0)}
    found = []
    for own, other in ((lr, wd), (rate, decay)):
        tx = fo.chain(fo.add_decayed_weights(other), fo.sgd(own))
        with fo.use_backend("triton"):
            found.append(fo.apply_gradients(tx, params, grads, tx.init(params))[0])
    torch.testing.assert_close(*found, rtol=0, atol=0)


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
    _, bound = opt._bindings.steps[0].regions[0].bound_steps[0]
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
    "one program": lambda: ones((5,)),
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
    """Behind all kernels that read them, a program each; where there are fewer, an operation of torch does it."""
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
    counters = [x for x in tree_leaves(state) if x.dtype is torch.int64]
    assert [x.item() for x in counters] == [3] * (1 + (name != "one counter"))
    programs = {"one program": 1, "no elements": 0}.get(tree, len(counters))
    assert len(added) == (0 if programs == len(counters) else 3 * len(counters))


@pytest.mark.usefixtures("all_enabled")
def test_a_backend_that_another_thread_gives_up_moves_no_counter_twice(device: StandIn) -> None:
    """The kernels of a step have moved its counter, also if torch operations compute the steps behind it."""
    tx, gradients = fo.adamw(0.1), ones((5,), (33,))
    aligned, memory = ones((5,), (33,)), torch.ones(40)
    shifted = {"0": memory[1:6], "1": memory[7:40]}  # addresses that are no multiples of 16
    states = [tx.init(aligned), tx.init(shifted)]
    fo.apply_gradients(tx, aligned, gradients, states[0], donate=True)  # binds both, which have the same specs
    run, errors = launch.TritonLaunch.launch, list[BaseException]()

    def step_of_another_thread() -> None:
        try:
            fo.apply_gradients(tx, shifted, gradients, states[1], donate=True)
        except BaseException as error:
            errors.append(error)

    def run_and_be_overtaken(self: launch.TritonLaunch, memory: launch.DeviceMemory) -> None:
        run(self, memory)
        other = threading.Thread(target=contextvars.copy_context().run, args=(step_of_another_thread,))
        with mock.patch.object(launch, "load_kernels", side_effect=BuildError("no compiler")):
            other.start()
            other.join()

    with (
        mock.patch.object(launch.TritonLaunch, "launch", run_and_be_overtaken),
        pytest.warns(UserWarning, match="no compiler"),
    ):
        fo.apply_gradients(tx, aligned, gradients, states[0], donate=True)

    assert not errors
    assert [int(state[0].count) for state in states] == [2, 1]
    with fo.use_backend("reference"):
        for n, found in ((2, aligned), (1, shifted)):
            expected = ones((5,), (33,))
            state = tx.init(expected)
            for _ in range(n):
                expected, state = fo.apply_gradients(tx, expected, gradients, state)
            torch.testing.assert_close(found, expected)


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
    (step,) = tx._tree_steps
    workspaces = [w for _, found in step.segments[0].bound_steps for w in found.workspaces]
    (memories,) = [memories for w in workspaces for memories in w.device.values()]
    assert list(memories) == [2, 3, 4, 5]
    assert len({memory.words.data_ptr() for memory in memories.values()}) == STREAMS
    assert device.followed == 6, "a stream waits for the tables of a binding once"


def test_a_number_in_host_memory_is_read_without_a_copy(device: StandIn) -> None:
    """Reading it waits for nothing; a copy of it to a device would be one more at each step."""
    _, opt = warm()
    opt.step()
    _, bound = opt._bindings.steps[0].regions[0].bound_steps[0]
    (memory,) = bound.workspaces[0].device[0].values()
    tables = memory.tables
    numbers = [[torch.tensor(0.25), *[0.5] * (tables.packer.size // 8 - 1)]]
    assert [places.first for places, _ in tables.content(numbers)[1]] == [0]
    tables.device = torch.device("cuda", 0)
    content, live = tables.content(numbers)
    assert (tables.packer.unpack(content)[0], live) == (0.25, [])


def test_memory_that_stays_is_allocated_in_another_thread() -> None:
    """So it is of no pool that the caller's thread allocates from, but of its stream."""
    stream, entered = object(), list[Any]()

    @contextlib.contextmanager
    def enter(x: Any) -> Iterator[None]:
        entered.append((threading.get_ident(), x))
        yield

    def fails() -> None:
        raise torch.OutOfMemoryError("none is left")

    with mock.patch("torch.cuda.current_stream", return_value=stream), mock.patch("torch.cuda.stream", enter):
        own = streams.CUDA.allocate(threading.get_ident, torch.device("cuda", 0))
        with pytest.raises(torch.OutOfMemoryError, match="none is left"):
            streams.CUDA.allocate(fails, torch.device("cuda", 0))
    assert own != threading.get_ident()
    assert entered[0] == (own, stream)


def test_memory_that_stays_is_told_from_that_of_a_graph(device: StandIn) -> None:
    """Tables, and the memory of a stream; a graph has memory in its own pool."""
    with mock.patch.object(device, "allocate", wraps=device.allocate) as allocate:
        _, opt = warm()
        assert allocate.call_count == 2
        with device.capture():
            opt.step()
        opt.step()
        assert allocate.call_count == 2
