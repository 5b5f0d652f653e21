"""Steps that are interrupted at any line, or by a signal: all of a step has been done, or nothing of it."""

import functools
import itertools
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import functional_optim as fo
from _lib.chains import is_matrix
from _lib.compare import Snapshot, assert_same_bits
from _lib.interrupts import PACKAGE, Line, Lines, apart, ends, interrupted, lines_of, once, watched
from _lib.optimizers import content, give, gradients, params_of
from _lib.trees import clone
from functional_optim import adapters
from functional_optim.adapters import TransformOptimizer


pytestmark = pytest.mark.slow
SHAPES = ((4, 3), (3,), ())


def make_params(*dtypes: torch.dtype) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for dtype in dtypes or (torch.float32,)
        for shape in SHAPES
    ]


def counting(params: Any) -> Any:
    return {"count": torch.zeros(()), "sum": {k: torch.zeros_like(p) for k, p in params.items()}}


def sum_up(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    total = {k: x if updates[k] is None else x + updates[k] for k, x in state["sum"].items()}
    return type(updates)(total), {"count": state["count"] + 1, "sum": total}


def chain(*parts: Any) -> Callable[[list[Any]], Any]:
    return lambda params: TransformOptimizer(params, fo.chain(*parts))


def in_groups(params: list[Any]) -> Any:
    return [{"params": params[:1], "lr": 0.3}, {"params": params[1:], "betas": (0.8, 0.99)}]


def scaled(opt: Any, step: int) -> None:
    opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(0.0)


def overflowed(opt: Any, step: int) -> None:
    opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(float(step % 2 == 0))


def without_a_state(opt: Any, step: int) -> None:
    opt.state.pop(params_of(opt)[1], None)


def without_a_slot(opt: Any, step: int) -> None:
    for p in params_of(opt)[1:]:
        if p in opt.state:
            opt.state[p]["exp_avg"] = None


def without_a_gradient(opt: Any, step: int) -> None:
    params_of(opt)[step % 3].grad = None


def nothing(opt: Any, step: int) -> None:
    pass


class Case(NamedTuple):
    """An optimizer, and what happens before each of its steps."""

    make: Callable[[list[Any]], Any]
    before: Callable[[Any, int], None] = nothing
    dtypes: tuple[torch.dtype, ...] = ()
    params: Callable[[list[Any]], list[Any]] = list
    period: int = 1  # after which steps repeat what happens before them


CLIP = (fo.clip_by_global_norm(0.1), fo.adamw(0.1, mask=is_matrix), fo.params_ema(0.9))
OPAQUE = fo.GradientTransformation(counting, sum_up)
CASES = {
    "AdamW": Case(lambda p: adapters.AdamW(p, lr=0.1)),
    "AdamW in groups": Case(lambda p: adapters.AdamW(in_groups(p), lr=0.1, amsgrad=True)),
    "momentum": Case(lambda p: adapters.SGD(p, lr=0.1, momentum=0.9, dampening=0.5)),
    "clip, AdamW and average": Case(chain(*CLIP)),
    "LAMB": Case(lambda p: adapters.LAMB(p, lr=0.1, weight_decay=0.1)),
    "LAMB in two dtypes": Case(lambda p: adapters.LAMB(p, lr=0.1), dtypes=(torch.float32, torch.bfloat16)),
    "AdamW in two dtypes": Case(lambda p: adapters.AdamW(p, lr=0.1), dtypes=(torch.float32, torch.float64)),
    "masked": Case(chain(fo.masked(fo.adam(0.1), is_matrix), fo.masked(fo.sgd(1.0, 0.9), r"params\[[12]\]"))),
    "partition": Case(chain(fo.partition({True: fo.adam(0.1), False: fo.lion(0.1)}, is_matrix))),
    "a schedule": Case(chain(fo.adam(fo.cosine_decay_schedule(0.1, 9)))),
    "a schedule in Python": Case(chain(fo.adam(lambda count: [0.1, 0.2][int(count) % 2]))),
    "an opaque transformation": Case(chain(fo.trace(0.9), OPAQUE, fo.adam(0.1))),
    "an opaque transformation at the end": Case(chain(fo.adam(0.1), OPAQUE)),
    "opaque ones only": Case(chain(OPAQUE, OPAQUE)),
    "a loss scale": Case(lambda p: adapters.AdamW(p, lr=0.1, fused=True), scaled),
    "a loss scale that overflows": Case(lambda p: adapters.AdamW(p, lr=0.1, fused=True), overflowed, period=2),
    "a chain that overflows": Case(lambda p: TransformOptimizer(p, fo.chain(*CLIP), fused=True), overflowed, period=2),
    "a state that was removed": Case(lambda p: adapters.AdamW(p, lr=0.1), without_a_state),
    "a slot that is reset": Case(lambda p: adapters.AdamW(p, lr=0.1), without_a_slot),
    "a state of a chain that was removed": Case(chain(fo.trace(0.9), OPAQUE, fo.adam(0.1)), without_a_state),
    "missing gradients": Case(lambda p: adapters.AdamW(p, lr=0.1), without_a_gradient, period=3),
}


class Run:
    """An optimizer of a case, and its steps so far."""

    def __init__(self, case: Case) -> None:
        self.case, self.steps = case, 0
        self.opt = case.make(case.params(make_params(*case.dtypes)))

    def prepare(self) -> None:
        """Everything of the next step but the step."""
        params = params_of(self.opt)
        give(params, gradients(params, self.steps))
        self.case.before(self.opt, self.steps)
        self.steps += 1

    def step(self) -> None:
        self.prepare()
        self.opt.step()

    def content(self) -> Any:
        return content(self.opt)


def same(a: Any, b: Any) -> bool:
    try:
        assert_same_bits(a, b)
    except AssertionError:
        return False
    return True


def lines_before(name: str, names: Iterable[str], lines: Callable[[str], Lines]) -> set[Line]:
    """The lines of all cases before one."""
    earlier = itertools.takewhile(lambda each: each != name, names)
    return {line for each in earlier for part in lines(each) for line in part}


def take(step: Callable[[], Any], at: int, compiler: bool = True) -> str:
    """Takes a step that is interrupted, and returns the line, as messages call it."""
    with interrupted(at, compiler) as lines:
        apart(step)
    assert sys.exception() is None, f"{lines[-1]}: an exception is still being handled"
    torch.set_grad_enabled(True)  # Python does not leave a `with` block that is interrupted in its last line
    return "{}:{}".format(*lines[-1])


@functools.cache
def later_lines(name: str) -> Lines:
    """The lines of a step after the third, the longest of those that differ."""
    case = CASES[name]
    run = Run(case)
    for _ in range(3):
        run.step()
    found = []
    for _ in range(2 * case.period):
        run.prepare()
        before = run.content()
        found.append(watched(run.opt.step, lambda before=before: not same(run.content(), before)))
    lines = [line for each in max(found, key=lambda each: len(each.before + each.after)) for line in each]
    writes = min(len(each.before) for each in found)
    return Lines(lines[:writes], lines[writes:])


@pytest.mark.parametrize("name", CASES)
def test_a_step_that_is_interrupted_at_any_line(name: str) -> None:
    """Each line of a step, where it is run first and last, one after another in one training run.

    Those that run before anything is written are interrupted in the first case that has them.
    """
    case = CASES[name]
    known = lines_before(name, CASES, later_lines)
    run, twin = Run(case), Run(case)
    for each in (run, twin):
        for _ in range(3):
            each.step()

    done = []
    for at in later_lines(name).positions(known, ends):
        for _ in range(case.period):
            run.prepare()
            twin.prepare()
            before = twin.content()
            where = take(run.opt.step, at)
            twin.opt.step()
            now, after = run.content(), twin.content()
            done.append(same(now, after))
            if not done[-1]:
                assert same(now, before), f"{where}: a part of the step was done"
                run.opt.step()
                assert same(run.content(), after), f"{where}: the step is another one afterwards"
    assert {True, False} == set(done)


FIRST = [  # the case that binds at the least cost comes first: it has most of the lines
    "momentum",
    "AdamW",
    "clip, AdamW and average",
    "LAMB in two dtypes",
    "masked",
    "an opaque transformation",
    "a loss scale that overflows",
    "a state of a chain that was removed",
]


WRITING = {
    str(path)
    for pattern in ("_opaque.py", "_params/*.py", "adapters/_bindings.py", "adapters/optimizer.py")
    for path in PACKAGE.glob(pattern)
}


def versions(opt: Any) -> Any:
    """Parameters and state, by identity and version."""
    return [
        (p._version, [(key, id(x), getattr(x, "_version", None)) for key, x in opt.state.get(p, {}).items()])
        for p in params_of(opt)
    ]


@functools.cache
def first_lines(name: str) -> Lines:
    """The lines of a first step but for those of the compiler, which touch neither parameters nor state."""
    case = CASES[name]
    Run(case).step()  # kernels are built, so that all runs have the same lines
    run = Run(case)
    run.prepare()
    before = versions(run.opt)
    return watched(run.opt.step, lambda: versions(run.opt) != before, compiler=False)


@pytest.mark.parametrize("name", FIRST)
def test_a_first_step_that_is_interrupted_at_any_line(name: str) -> None:
    """Lines that bind the step, make state and take it.

    Those that run before anything is written, and those that bind, are interrupted in the first case that has them.
    """
    case = CASES[name]
    known = lines_before(name, FIRST, first_lines)
    twin = Run(case)
    twin.prepare()
    before = twin.content()
    twin.opt.step()
    after = twin.content()
    twin.step()
    later = twin.content()

    done = []
    for at in first_lines(name).positions(known, once, WRITING):
        run = Run(case)
        run.prepare()
        where = take(run.opt.step, at, compiler=False)
        now = run.content()
        done.append(same(now, after))
        if not done[-1]:
            assert same(now, before), f"{where}: a part of the step was done"
            run.opt.step()
            assert same(run.content(), after), f"{where}: the step is another one afterwards"
        run.step()
        assert same(run.content(), later), f"{where}: later steps are others"
    assert False in done or same(before, after)  # a step that overflows changes nothing, all or not


# -- the pure API -----------------------------------------------------------------------------------------------------

TREES: dict[str, Any] = {
    "momentum": fo.sgd(0.1, momentum=0.9),
    "AdamW": fo.adamw(0.1),
    "clip, AdamW and average": fo.chain(*CLIP),
    "LAMB": fo.lamb(0.1),
    "masked": fo.chain(fo.masked(fo.adam(0.1), is_matrix), fo.masked(fo.sgd(1.0, 0.9), r"1|2")),
    "partition": fo.partition({True: fo.adam(0.1), False: fo.lion(0.1)}, is_matrix),
    "a schedule": fo.chain(fo.adam(1.0), fo.scale_by_schedule(fo.cosine_decay_schedule(0.1, 9))),
    "a schedule in Python": fo.sgd(lambda count: [0.1, 0.2][int(count) % 2]),
    "two counters": fo.chain(fo.adam(0.1), fo.scale_by_schedule(lambda count: 0.9**count), fo.ema(0.9)),
    "a counter that nothing reads": fo.chain(fo.adam(0.1), fo.scale_by_schedule(fo.constant_schedule(0.5))),
    "a number per tensor": fo.chain(fo.zero_nans(), fo.sgd(0.1)),
}


class Tree:
    """Parameters and state of a transformation, which steps write to."""

    def __init__(self, tx: Any, dtypes: tuple[torch.dtype, ...]) -> None:
        self.tx = tx
        self.params = {str(k): p.detach() for k, p in enumerate(make_params(*dtypes))}
        self.state = tx.init(self.params)

    def grads(self, step: int) -> Any:
        return dict(zip(self.params, gradients(list(self.params.values()), step), strict=True))

    def step(self, step: int, donate: bool = True) -> Any:
        return fo.apply_gradients(self.tx, self.params, self.grads(step), self.state, donate=donate)

    def content(self) -> Any:
        return clone((self.params, self.state))


DONATED = {
    f"{name}, {word}": (name, dtypes)
    for name in TREES
    for word, dtypes in {"one dtype": (torch.float32,), "two dtypes": (torch.float32, torch.float64)}.items()
}


@functools.cache
def donated_lines(case: str) -> Lines:
    """The lines of a donated step after the second."""
    name, dtypes = DONATED[case]
    tree = Tree(TREES[name], dtypes)
    tree.step(0)
    tree.step(0)
    before = tree.content()
    return watched(lambda: tree.step(0), lambda: not same(tree.content(), before))


@pytest.mark.parametrize("case", DONATED)
def test_a_donated_step_that_is_interrupted_at_any_line(case: str) -> None:
    """Parameters, state and counters are all those of before, or all those of after.

    Lines that run before anything is written are interrupted in the first case that has them.
    """
    name, dtypes = DONATED[case]
    known = lines_before(case, DONATED, donated_lines)
    run, twin = Tree(TREES[name], dtypes), Tree(TREES[name], dtypes)
    for tree in (run, twin):
        tree.step(0)
        tree.step(0)

    done = []
    for at in donated_lines(case).positions(known, ends):
        before = twin.content()
        where = take(lambda at=at: run.step(at), at)
        twin.step(at)
        now, after = run.content(), twin.content()
        done.append(same(now, after))
        if not done[-1]:
            assert same(now, before), f"{where}: a part of the step was done"
            run.step(at)
            assert same(run.content(), after), f"{where}: the step is another one afterwards"
    assert True in done
    assert known or False in done


@pytest.mark.parametrize("name", [*TREES, "an opaque transformation"])
def test_a_pure_step_that_is_interrupted_at_any_line_changes_nothing(name: str) -> None:
    tx = fo.chain(fo.trace(0.9), OPAQUE, fo.adam(0.1)) if name not in TREES else TREES[name]
    run = Tree(tx, (torch.float32,))
    for step in range(3):
        run.params, run.state = run.step(step, donate=False)
    expected = clone(run.step(3, donate=False))
    before = Snapshot(run.params, run.state)
    for at in ends(lines_of(lambda: run.step(3, donate=False))):
        take(lambda: run.step(3, donate=False), at)
        before.check()
    assert_same_bits(run.step(3, donate=False), expected)


# -- signals ----------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """The exception of a signal."""


def enlarged(params: list[Any]) -> list[Any]:
    """Parameters for which kernels take longer."""
    return [nn.Parameter(p.detach().repeat([40] * p.ndim)) for p in params]


def stop(signum: int, frame: Any) -> None:
    raise Stop


SIGNALLED = ["AdamW", "momentum", "clip, AdamW and average", "LAMB in two dtypes", "an opaque transformation"]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers that send signals")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a signal within a finalizer
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", SIGNALLED)
def test_a_step_that_a_signal_interrupts(name: str, steps: int) -> None:
    """Signals come at forty moments of a step, from its beginning to long after its end, also while kernels run."""
    case = CASES[name]._replace(params=enlarged)
    twin = Run(case)
    for _ in range(steps):
        twin.step()
    twin.prepare()
    before = twin.content()
    twin.opt.step()
    after = twin.content()
    twin.step()
    later = twin.content()

    done = []
    handler = signal.signal(signal.SIGALRM, stop)
    try:
        for k in range(40):
            run = Run(case)
            for _ in range(steps):
                run.step()
            run.prepare()
            try:
                signal.setitimer(signal.ITIMER_REAL, 2e-5 * 1.2**k)  # up to 25 ms
                run.opt.step()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Stop:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            torch.set_grad_enabled(True)
            done.append(same(run.content(), after))
            if not done[-1]:
                assert same(run.content(), before), f"signal {k}: a part of the step was done"
                run.opt.step()
            run.step()
            assert same(run.content(), later), f"signal {k}: later steps are others"
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert False in done
