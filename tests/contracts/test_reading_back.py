"""Hyper-parameters and slots that are read back by name."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.testing._internal.common_optimizers import optim_db

import functional_optim as fo
from _lib.compare import assert_same_bits
from _lib.training import train
from _lib.trees import clone, like, make_tree
from functional_optim import adapters
from functional_optim.adapters import TransformOptimizer


STEPS = 3
FALLING = fo.linear_schedule(1.0, 0.0, 10)
TENSOR = torch.tensor(0.25, dtype=torch.float64)
LABELS = {"weight": "a", "bias": "b", "scale": "b"}


class Injected(NamedTuple):
    hyperparams: dict[str, Any]


INJECT = fo.GradientTransformation(lambda p: Injected({"temperature": 2.0}), lambda u, s, p=None: (u, s))

# after three steps
NUMBERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "numbers": (fo.chain(fo.clip(2.0), fo.scale(-0.1)), {"max_delta": 2.0, "step_size": -0.1}),
    "a schedule": (fo.sgd(FALLING), {"learning_rate": 0.7}),
    "a function": (fo.scale_by_schedule(lambda count: 1 / (1 + count)), {"step_size_fn": 0.25}),
    "a tensor": (fo.scale(TENSOR), {"step_size": TENSOR}),
    "two of a name": (fo.chain(fo.scale(2.0), fo.scale(3.0)), {"scale_step_size": 2.0, "scale_step_size_2": 3.0}),
    "named_chain": (
        fo.named_chain(("one", fo.scale(2.0)), ("two", fo.scale(3.0))),
        {"one_step_size": 2.0, "two_step_size": 3.0},
    ),
    "partition": (
        fo.partition({"a": fo.sgd(FALLING), "b": fo.sgd(0.5)}, LABELS),
        {"a_learning_rate": 0.7, "b_learning_rate": 0.5},
    ),
    "masked": (
        fo.masked(fo.scale_by_learning_rate(FALLING), {"weight": True, "bias": False, "scale": False}),
        {"learning_rate": 0.7},
    ),
    "injected": (fo.chain(INJECT, fo.scale(-0.1)), {"temperature": 2.0, "step_size": -0.1}),
    "nothing": (fo.identity(), {}),
}


def after(tx: Any) -> Any:
    params = make_tree(0)
    return train(tx, clone(params), [like(params, seed) for seed in range(STEPS)])


@pytest.mark.parametrize("name", NUMBERS)
def test_hyper_parameters_of_the_next_step(name: str) -> None:
    tx, expected = NUMBERS[name]

    found = fo.hyperparams(tx, after(tx)[1])

    found = {k: v for k, v in found.items() if not k.endswith("flip_sign")}
    assert list(found) == list(expected)
    assert all(abs(float(found[k]) - float(v)) < 1e-15 for k, v in expected.items())
    if name == "a tensor":
        assert found["step_size"] is TENSOR


def test_the_value_is_the_one_that_the_step_has() -> None:
    tx = fo.sgd(fo.cosine_decay_schedule(0.5, 9))
    params, state = after(tx)
    rate = fo.hyperparams(tx, state)["learning_rate"]

    new, _ = fo.apply_gradients(tx, params, {k: torch.ones_like(p) for k, p in params.items()}, state)

    torch.testing.assert_close(new, {k: p - rate for k, p in params.items()}, rtol=1e-14, atol=1e-14)


SLOTS: dict[str, tuple[Any, dict[str, Callable[[Any], Any]]]] = {
    "adam": (fo.adam(0.1), {"mu": lambda s: s[0].mu, "nu": lambda s: s[0].nu}),
    "an average": (fo.chain(fo.sgd(0.1), fo.params_ema(0.9)), {"ema": lambda s: s[1].ema}),
    "two of a name": (
        fo.chain(fo.trace(0.9), fo.trace(0.5)),
        {"trace_trace": lambda s: s[0].trace, "trace_trace_2": lambda s: s[1].trace},
    ),
    "named_chain": (
        fo.named_chain(("fast", fo.trace(0.5)), ("slow", fo.trace(0.9))),
        {"fast_trace": lambda s: s["fast"].trace, "slow_trace": lambda s: s["slow"].trace},
    ),
    "partition": (
        fo.partition({"a": fo.trace(0.5), "b": fo.trace(0.9)}, LABELS),
        {
            "a_trace": lambda s: s.inner_states["a"].inner_state.trace,
            "b_trace": lambda s: s.inner_states["b"].inner_state.trace,
        },
    ),
}


@pytest.mark.parametrize("name", SLOTS)
def test_slots_by_name(name: str) -> None:
    tx, expected = SLOTS[name]
    state = after(tx)[1]

    found = fo.slots(tx, state)

    assert list(found) == list(expected)
    assert all(found[k] is where(state) for k, where in expected.items())


@pytest.mark.parametrize("name", SLOTS)
def test_slots_have_the_names_of_an_optimizer(name: str) -> None:
    tx = SLOTS[name][0]
    model = {k: torch.nn.Parameter(p) for k, p in make_tree(0).items()}
    opt = TransformOptimizer(list(model.items()), tx)
    for k, p in model.items():
        p.grad = like(make_tree(0), 1)[k]
    opt.step()
    _, state = fo.apply_gradients(tx, make_tree(0), like(make_tree(0), 1), tx.init(make_tree(0)))

    for slot, tree in fo.slots(tx, state).items():
        own = {k: opt.state[p][slot] for k, p in model.items() if slot in opt.state[p]}
        assert_same_bits(own, {k: x for k, x in tree.items() if isinstance(x, torch.Tensor)})


def test_another_state_is_refused() -> None:
    params = make_tree(0)
    trace = fo.trace(0.9)

    for read in (fo.slots, fo.hyperparams):
        with pytest.raises(
            TypeError, match=r"state\[0\] is TraceState, expected the ScaleByAdamState of scale_by_adam"
        ):
            read(fo.adam(0.1), fo.chain(trace, trace).init(params))
        with pytest.raises(TypeError, match=r"state is a tuple of 1 state, expected the tuple of 2 states of chain"):
            read(fo.chain(trace, trace), fo.chain(trace).init(params))
        with pytest.raises(TypeError, match=r"state is None, expected the ScaleByLBFGSState of scale_by_lbfgs\(\)"):
            read(fo.scale_by_lbfgs(), None)


def test_a_counter_on_meta_is_refused() -> None:
    tx = fo.sgd(FALLING)
    with pytest.raises(ValueError, match="the counter of scale_by_learning_rate is on meta and holds no number"):
        fo.hyperparams(tx, tx.init(torch.ones(2, device="meta")))


@pytest.mark.parametrize("state", [None, 3, torch.ones(2)], ids=["None", "a number", "a tensor"])
def test_no_state_is_refused_where_no_transformation_is_known(state: Any) -> None:
    params = make_tree(0)
    readers = [
        lambda: fo.eval_params(state, params),
        lambda: fo.value_and_grad_from_state(lambda p: p["bias"].sum())(params, state=state),
    ]
    for read in readers:
        with pytest.raises(
            TypeError, match=r"state is .*, expected the state of a transformation; `tx\.init\(params\)"
        ):
            read()


def test_hyper_parameters_of_an_optimizer() -> None:
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    tx = fo.chain(fo.clip(fo.linear_schedule(2.0, 1.0, 10)), fo.sgd(FALLING, momentum=0.9))
    opt = TransformOptimizer([{"params": [p]}, {"params": [q], "lr": 0.5, "decay": 0.5}], tx)
    before = opt.hyperparams()
    for t in range(STEPS):
        p.grad, q.grad = torch.ones(2), torch.ones(2) if t == 0 else None
        opt.step()

    first, second = opt.hyperparams()

    assert before[0]["learning_rate"] == 1.0
    assert (first["lr"], first["decay"], second["lr"], second["decay"]) == (1.0, 0.9, 0.5, 0.5)
    assert first["learning_rate"] == pytest.approx(0.7)
    assert second["learning_rate"] == pytest.approx(0.9)
    assert first["max_delta"] == pytest.approx(1.7)
    assert set(first) - {"learning_rate", "max_delta"} <= set(opt.param_groups[0])


def test_a_schedule_gives_way_to_an_option_of_its_name() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    tx = fo.chain(fo.scale(2.0), fo.scale(FALLING), fo.scale(-0.1))
    opt = TransformOptimizer([p], tx)

    assert opt.hyperparams() == [{"lr": 1.0, "scale_step_size": 2.0, "scale_step_size_2": -0.1, "step_size": 1.0}]


@pytest.mark.parametrize("name", [info.optim_cls.__name__ for info in optim_db if info.optim_cls.__name__ != "LBFGS"])
def test_hyper_parameters_of_torchs_classes(name: str) -> None:
    """They are the arguments of the class that are no flags, and a scheduler's rate is the next step's."""
    p, q = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    opt = getattr(adapters, name)([{"params": [p]}, {"params": [q], "lr": 0.5}], lr=0.25)
    flags = {"foreach", "fused", "capturable", "differentiable", "maximize", "amsgrad", "centered", "nesterov"}
    flags |= {"decoupled_weight_decay"}
    options = set(torch.optim.Optimizer.state_dict(opt)["param_groups"][0]) - flags - {"params"}

    torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.5)
    first, second = opt.hyperparams()

    assert first.keys() == second.keys() == options - {"initial_lr"}
    assert (first["lr"], second["lr"]) == (0.125, 0.25)
    assert {k: x for k, x in first.items() if k != "lr"} == {k: x for k, x in second.items() if k != "lr"}
