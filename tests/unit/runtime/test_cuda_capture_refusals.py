"""Steps that a CUDA graph could not replay, against a stand-in of a device: each is refused."""

import contextlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import optree
import pytest
import torch
from torch import nn

import functional_optim as fo
from _lib.compare import Snapshot
from _lib.marks import INTERPRETER
from _lib.stand_in import StandIn
from _lib.warm import SIZES, Running, chain, grads, make, set_grads, warm
from functional_optim import _leafwise, adapters
from functional_optim._leafwise import LeafwiseStep, _Values
from functional_optim._regions import LeafwiseRegion
from functional_optim._runtime import numbers
from functional_optim._runtime.backend import BACKENDS
from functional_optim._runtime.cuda import capture
from functional_optim._runtime.cuda.capture import CaptureError
from functional_optim._transform import Link


pytestmark = [INTERPRETER, pytest.mark.triton]


@pytest.fixture
def meta_has_memory() -> Iterator[None]:
    """Has meta stand for another device: numbers on meta itself are refused everywhere."""
    with mock.patch.object(numbers, "check_memory"), mock.patch.object(_leafwise, "check_memory"):
        yield


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
    with (
        device.capture(),
        pytest.raises(CaptureError, match=r"the entry 'transformation_0:tree.steps' .* discard"),
    ):
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
    return LeafwiseStep(LeafwiseRegion(0, Link(tx, (), (True,), tx._bound), True), ["w"], [0])


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
            _Values.of(step.region, [{}], 0, count, False, {}, count.device)
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
