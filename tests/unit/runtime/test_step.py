"""Bound steps: what threads, nested steps, failures and forks share of them."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import functional_optim as fo
from _lib.backends import only
from _lib.compare import Snapshot
from _lib.marks import INTERPRETER
from _lib.programs import bind, run
from functional_optim._compiler.program import Program
from functional_optim._compiler.trace import Tracer
from functional_optim._runtime.backend import BACKENDS
from functional_optim._runtime.cpu import CpuLaunches
from functional_optim._runtime.groups import Columns
from functional_optim._runtime.overlap import SharedMemoryError
from functional_optim._runtime.pointers import Difference
from functional_optim._runtime.step import BoundStep, Reading


pytestmark = INTERPRETER


def momentum() -> Program:
    """Momentum, scaled by a norm over the tree: two passes, and two columns that are written."""
    t = Tracer()
    t.scope = "step"
    u, p, mu = (t.input("array", name) for name in ("updates", "params", "mu"))
    decay, rate = t.input("scalar", "decay"), t.input("scalar", "rate")
    mu = decay * mu + u
    return t.finish({"params": p - rate * mu / (1 + fo.tree_norm(u)), "mu": mu}, frozenset())


def columns(seed: int, sizes: Sequence[int] = (5, 33)) -> Columns:
    """Normal deviates in float64, in columns that share no memory."""
    generator = torch.Generator().manual_seed(seed)
    names = ("updates", "params", "mu")
    return {k: [torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes] for k in names}


def numbers(own: Columns, rate: float = 0.1) -> dict[str, list[float]]:
    n = len(own["updates"])
    return {"decay": [0.9] * n, "rate": [rate * (k + 1) for k in range(n)]}


def expected(own: Columns, rate: float = 0.1) -> dict[str, list[torch.Tensor]]:
    """The same step in plain torch."""
    norm = torch.linalg.vector_norm(torch.cat(list(own["updates"])))
    mu = [0.9 * m + u for m, u in zip(own["mu"], own["updates"], strict=True)]
    params = [p - rate * (k + 1) * m / (1 + norm) for k, (p, m) in enumerate(zip(own["params"], mu, strict=True))]
    return {"params": params, "mu": mu}


def check(actual: Columns, wanted: Columns) -> None:
    """Some five operations and a norm of a few numbers in double precision, in another order."""
    actual = {key: list(actual[key]) for key in wanted}
    torch.testing.assert_close(actual, wanted, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_step_after_step_on_other_tensors(backend: str, in_place: bool) -> None:
    with only(backend):
        step = bind(momentum(), columns(0), in_place)
    for seed in range(1, 21):
        own = columns(seed)
        wanted = expected(own, 0.01 * seed)
        results = run(step, own, numbers(own, 0.01 * seed))
        check(own if in_place else results, wanted)


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_counter_that_leaves_share_is_read_once(backend: str, in_place: bool) -> None:
    """Leaves of two dtypes are two groups, each of which reads the counter of this step."""
    t = Tracer()
    t.scope = "step"
    u, p, count = t.input("array", "updates"), t.input("array", "params"), t.input("leaf", "step")
    program = t.finish({"params": p - u * count}, frozenset())

    def make(count: torch.Tensor) -> Columns:
        dtypes = (torch.float64, torch.float32, torch.float64, torch.float32)
        own = {
            key: [torch.full((3,), x, dtype=dtype) for dtype in dtypes] for key, x in (("updates", 2), ("params", 1))
        }
        return {**own, "step": [count] * len(dtypes)}

    count = torch.tensor(3)
    with only(backend):
        step = bind(program, make(count), in_place, ["step"])
    assert len(step.specs) == 2 * 4 + 2
    for k in range(4):
        if k == 2:
            count = torch.tensor(7)
        own, before = make(count), int(count)
        results = run(step, own, {})
        for x in (own if in_place else results)["params"]:
            assert x.tolist() == [1 - 2 * before] * 3
        assert int(count) == before + in_place


def test_difference_of_a_step_names_its_column_and_leaf() -> None:
    step, own = bind(momentum(), columns(0)), columns(1)
    own["mu"] = [own["mu"][0], torch.zeros(4, dtype=torch.float64)]
    found = step.read(own)
    assert isinstance(found, Difference)
    assert step.name_of(found.position) == ("state mu", 1)
    own["mu"] = columns(1)["mu"]
    own["params"][1].untyped_storage().resize_(0)
    found = step.read(own)
    assert isinstance(found, Difference)
    assert found.outside
    assert step.name_of(found.position) == ("params", 1)


# -- what steps share -------------------------------------------------------------------------------------------------


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads that take turns as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in place"])
def test_threads_share_a_step(in_place: bool, eager_threads: None) -> None:
    step = bind(momentum(), columns(0), in_place)
    failures: list[BaseException] = []
    together = threading.Barrier(6)

    def work(k: int) -> None:
        try:
            together.wait(60)
            for turn in range(50):
                own = columns(100 * k + turn)
                wanted = expected(own)
                results = run(step, own, numbers(own))
                check(own if in_place else results, wanted)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in place"])
def test_a_step_between_reading_and_running_another(in_place: bool) -> None:
    """As where a number is an object whose conversion takes a step of its own."""
    step = bind(momentum(), columns(0), in_place)
    first, second = columns(1), columns(2)
    wanted = expected(first), expected(second)
    options = [{name: x[k] for name, x in numbers(first).items()} for k in range(2)]
    reading = step.read(first)
    assert isinstance(reading, Reading)

    inner = run(step, second, numbers(second))
    outer = step.run(reading, first, step.numbers(options, {}))

    check(first if in_place else outer, wanted[0])
    check(second if in_place else inner, wanted[1])


def test_memory_of_launches_is_used_again() -> None:
    """One launch for steps one after another, also after one that is given up or finds a difference."""
    step, own = bind(momentum(), columns(0)), columns(1)
    for _ in range(5):
        run(step, own, numbers(own))
        reading = step.read(own)
        assert isinstance(reading, Reading)
        step.release(reading)
        assert isinstance(step.read({**own, "mu": [None, None]}), Difference)
    assert len(step.workspaces) == 1


def test_launch_follows_the_number_of_threads() -> None:
    sizes = (1 << 17, 3)
    step = bind(momentum(), columns(0, sizes), True)
    before = torch.get_num_threads()
    try:
        for n in (1, 3, 2, 1):
            torch.set_num_threads(n)
            own = columns(n, sizes)
            wanted = expected(own)
            run(step, own, numbers(own))
            # a norm of 2**17 numbers in another order: 360 roundings of 2**-53 that do not cancel
            torch.testing.assert_close({k: list(own[k]) for k in wanted}, wanted, rtol=1e-13, atol=1e-13)
            assert step.workspaces[-1].n_threads == n
    finally:
        torch.set_num_threads(before)


# -- what is written, and when ----------------------------------------------------------------------------------------


class Stopped(BaseException):
    """An interrupt."""


def versions(own: Columns) -> dict[Any, list[int]]:
    return {key: [x._version for x in column] for key, column in own.items()}


def later(before: dict[Any, list[int]]) -> dict[Any, list[int]]:
    """The versions after what is written in place has been written once."""
    return {key: [v + (key in ("params", "mu")) for v in column] for key, column in before.items()}


def test_versions_are_counted_before_anything_is_written() -> None:
    """An interrupt between the two leaves a version too many, which autograd forgives, and none too few."""
    with only("c"):
        step, own = bind(momentum(), columns(0), True), columns(1)
    before, content = versions(own), Snapshot({k: [x.clone() for x in c] for k, c in own.items()})
    reading = step.read(own)
    assert isinstance(reading, Reading)
    options = [{name: x[k] for name, x in numbers(own).items()} for k in range(2)]

    with mock.patch.object(CpuLaunches, "__call__", side_effect=Stopped), pytest.raises(Stopped):
        step.run(reading, own, step.numbers(options, {}))

    assert versions(own) == later(before)
    assert not reading.workspace.completed
    torch.testing.assert_close({k: list(c) for k, c in own.items()}, content.trees[0], rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_in_place_counts_versions_of_what_it_writes(backend: str) -> None:
    with only(backend):
        step = bind(momentum(), columns(0), True)
    own = columns(1)
    before = versions(own)
    run(step, own, numbers(own))
    after = versions(own)
    assert after["updates"] == before["updates"]
    for key in ("params", "mu"):
        assert all(b > a for a, b in zip(before[key], after[key], strict=True)), key


def test_completion_is_known() -> None:
    with only("c"):
        step, own = bind(momentum(), columns(0), True), columns(1)
    reading = step.read(own)
    assert isinstance(reading, Reading)
    options = [{name: x[k] for name, x in numbers(own).items()} for k in range(2)]
    assert not reading.workspace.completed
    step.run(reading, own, step.numbers(options, {}))
    assert reading.workspace.completed
    again = step.read(own)
    assert isinstance(again, Reading)
    assert not again.workspace.completed


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_memory_is_refused_before_anything_is_written(backend: str) -> None:
    with only(backend):
        step = bind(momentum(), columns(0, (4, 4)), True)
    own = columns(1, (4, 4))
    run(step, own, numbers(own))
    own["mu"] = [own["mu"][0], own["mu"][0]]
    snapshot = Snapshot(own)
    for _ in range(2):  # not even where the same pointers come again
        with pytest.raises(SharedMemoryError, match=r"state mu at 'p0' and state mu at 'p1' share memory"):
            run(step, own, numbers(own))
        snapshot.check()


# -- forks ------------------------------------------------------------------------------------------------------------


def fork() -> None:
    """Takes steps on two threads, and then in a forked child, where there are no threads to wake."""
    torch.set_num_threads(2)
    sizes = (1 << 18, 1 << 17)
    step = bind(momentum(), columns(0, sizes), True)
    turns = [columns(seed, sizes) for seed in range(4)]
    wanted = [expected(own) for own in turns]

    def take(step: BoundStep, turn: int) -> None:
        run(step, turns[turn], numbers(turns[turn]))

    def compare(turn: int) -> None:
        actual = {key: list(turns[turn][key]) for key in wanted[turn]}
        torch.testing.assert_close(actual, wanted[turn], rtol=1e-13, atol=1e-13)

    take(step, 0)
    compare(0)
    child = os.fork()
    if not child:
        signal.alarm(60)  # ends a child that waits for threads of its parent
        try:
            take(step, 1)
            take(bind(momentum(), turns[2], True), 2)
            torch.set_num_threads(1)  # torch's own operations would wait
            compare(1)
            compare(2)
        except BaseException as error:
            print("child", repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    take(step, 3)
    compare(3)
    print("child", status, flush=True)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
def test_a_forked_child_takes_steps() -> None:
    root = Path(fo.__file__).parents[1]
    path = os.pathsep.join([str(root), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "child 0\n", done.stdout + done.stderr[-2000:]


if __name__ == "__main__":
    fork()
