"""Things around a step: hooks, zeroing of gradients, printing, profiling, and being freed."""

import gc
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import functional_optim as fo
from _lib.compare import assert_same_bits
from _lib.optimizers import OURS, content, make_params, params_of, train
from functional_optim.adapters import LAMB, AdamW, Lion, TransformOptimizer


SHAPES = ((4,), (2, 3))


def chain_optimizer(params: Any) -> TransformOptimizer:
    return TransformOptimizer(params, fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-2), fo.params_ema(0.9)))


def host_schedule(params: Any) -> TransformOptimizer:
    """A chain with a schedule that only Python can evaluate."""
    return TransformOptimizer(params, fo.sgd(lambda count: [0.1, 0.2][int(count) % 2], momentum=0.9))


MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    **OURS,
    "Lion": Lion,
    "LAMB": LAMB,
    "chain": chain_optimizer,
    "host schedule": host_schedule,
}


@pytest.fixture(params=MAKERS)
def opt(request: pytest.FixtureRequest) -> torch.optim.Optimizer:
    """An optimizer of each kind after one step."""
    made = MAKERS[request.param](make_params(shapes=SHAPES))
    train([made], range(1))
    return made


# --- hooks of steps


def test_hooks_of_steps_run_in_order_around_the_step(opt: torch.optim.Optimizer) -> None:
    """Global before local before the step, then local before global; each kind in the order of registration."""
    log: list[Any] = []
    before = content(opt)["params"]

    def note(name: str) -> Callable[..., None]:
        def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
            assert optimizer is opt
            assert args[0] is opt
            log.append((name, torch.equal(before[0], params_of(opt)[0])))

        return hook

    handles = [
        opt.register_step_pre_hook(note("pre 1")),
        register_optimizer_step_pre_hook(note("global pre")),
        opt.register_step_post_hook(note("post 1")),
        register_optimizer_step_post_hook(note("global post")),
        opt.register_step_pre_hook(note("pre 2")),
        opt.register_step_post_hook(note("post 2")),
    ]
    try:
        opt.step()
    finally:
        for handle in handles:
            handle.remove()
    opt.step()

    assert log == [
        ("global pre", True),
        ("pre 1", True),
        ("pre 2", True),
        ("post 1", False),
        ("post 2", False),
        ("global post", False),
    ]


def test_a_pre_hook_replaces_the_arguments(opt: torch.optim.Optimizer) -> None:
    calls = []

    def closure() -> float:
        calls.append("replaced")
        return 2.0

    opt.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, closure), {}))

    assert opt.step(lambda: 1.0) == 2.0
    assert calls == ["replaced"]


def test_a_pre_hook_that_returns_something_else_is_refused(opt: torch.optim.Optimizer) -> None:
    before = content(opt)
    opt.register_step_pre_hook(lambda *args: 1)  # type: ignore[arg-type,return-value]
    with pytest.raises(RuntimeError, match="must return"):
        opt.step()
    assert_same_bits(content(opt), before)


def test_a_pre_hook_changes_options_and_gradients_of_its_step(opt: torch.optim.Optimizer) -> None:
    """The step obeys options that a hook sets. The learning rates of ASGD and Rprop are in their states."""
    before = content(opt)["params"]

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            group.update({"lr": 0.0, **({"step_sizes": (0.0, 0.0)} if "step_sizes" in group else {})})
        for state in optimizer.state.values():
            if "eta" in state:
                state["eta"].zero_()

    handle = opt.register_step_pre_hook(hook)
    opt.step()
    assert_same_bits(content(opt)["params"], before)
    handle.remove()


def test_failed_step_calls_no_post_hook(opt: torch.optim.Optimizer) -> None:
    log: list[int] = []
    opt.register_step_post_hook(lambda *args: log.append(1))

    def closure() -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        opt.step(closure)
    assert log == []


@pytest.mark.parametrize("first", ["parent", "child"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_subclass_that_only_inherits_fires_each_hook_once(name: str, first: str) -> None:
    """Whichever of the two classes made an instance first: torch wraps `step` class by class, on construction."""
    source = type(MAKERS[name](make_params(shapes=SHAPES)))
    parent = type(f"{source.__name__}Parent", (source,), {})
    child = type(f"{source.__name__}Child", (parent,), {})
    tx = () if source is not TransformOptimizer else (fo.sgd(0.1),)
    order = [parent, child] if first == "parent" else [child, parent]
    for cls in order:
        log: list[str] = []
        made = cls(make_params(shapes=SHAPES), *tx)
        made.register_step_pre_hook(lambda *args, log=log: log.append("pre"))
        made.register_step_post_hook(lambda *args, log=log: log.append("post"))
        train([made], range(2))
        assert log == ["pre", "post"] * 2


def test_keys_that_hooks_write_to_the_state_stay(opt: torch.optim.Optimizer) -> None:
    """torch's own tests of hooks keep counters there."""

    def count(optimizer: torch.optim.Optimizer, *args: Any) -> None:
        optimizer.state["test"] = optimizer.state.get("test", 0) + 1  # type: ignore[call-overload,index]

    opt.register_step_pre_hook(count)
    opt.register_step_post_hook(count)
    opt.register_state_dict_pre_hook(count)
    opt.step()
    saved = opt.state_dict()

    assert saved["state"]["test"] == 3
    opt.load_state_dict(saved)
    assert opt.state["test"] == 3  # type: ignore[index]
    opt.step()
    assert opt.state["test"] == 5  # type: ignore[index]


# --- hooks of state dicts


def test_hooks_of_saving_run_in_order_and_may_replace_the_result(opt: torch.optim.Optimizer) -> None:
    log: list[str] = []
    opt.register_state_dict_pre_hook(lambda o: log.append("pre 2"))
    opt.register_state_dict_pre_hook(lambda o: log.append("pre 1"), prepend=True)
    opt.register_state_dict_post_hook(lambda o, d: log.append("post 2"))
    opt.register_state_dict_post_hook(lambda o, d: log.append("post 1"), prepend=True)
    last = opt.register_state_dict_post_hook(lambda o, d: {**d, "more": 1})

    assert opt.state_dict()["more"] == 1
    assert log == ["pre 1", "pre 2", "post 1", "post 2"]
    last.remove()
    assert "more" not in opt.state_dict()


def test_hooks_of_loading_run_in_order_and_may_replace_what_is_loaded(opt: torch.optim.Optimizer) -> None:
    log: list[str] = []
    saved = opt.state_dict()
    other = {**saved, "param_groups": [{**g, "lr": 0.25} for g in saved["param_groups"]]}
    opt.register_load_state_dict_pre_hook(lambda o, d: log.append("pre 2"))
    first = opt.register_load_state_dict_pre_hook(lambda o, d: other, prepend=True)
    opt.register_load_state_dict_pre_hook(lambda o, d: log.append(f"pre 1: {d['param_groups'][0]['lr']}"))
    opt.register_load_state_dict_post_hook(lambda o: log.append(f"post 2: {o.param_groups[0]['lr']}"))
    opt.register_load_state_dict_post_hook(lambda o: log.append("post 1"), prepend=True)

    opt.load_state_dict(saved)

    assert log == ["pre 2", "pre 1: 0.25", "post 1", "post 2: 0.25"]
    first.remove()
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == saved["param_groups"][0]["lr"]


def test_a_pre_hook_of_loading_does_not_change_what_the_caller_gave(opt: torch.optim.Optimizer) -> None:
    saved = opt.state_dict()

    def hook(optimizer: Any, state_dict: dict[str, Any]) -> None:
        state_dict["more"] = 1

    opt.register_load_state_dict_pre_hook(hook)
    opt.load_state_dict(saved)
    assert saved.keys() == {"state", "param_groups"}


# --- the rest of the surface


def test_gradients_are_removed_or_zeroed(opt: torch.optim.Optimizer) -> None:
    assert inspect.signature(opt.zero_grad).parameters["set_to_none"].default is True
    held = [p.grad for p in params_of(opt)]

    opt.zero_grad(set_to_none=False)
    assert all(p.grad is g and not g.any() for p, g in zip(params_of(opt), held, strict=True) if g is not None)
    opt.zero_grad()
    assert all(p.grad is None for p in params_of(opt))


def test_repr_has_options_and_no_addresses(opt: torch.optim.Optimizer) -> None:
    text = repr(opt)
    assert text.startswith(type(opt).__name__)
    assert "Parameter Group 0" in text
    assert all(f"    {key}: " in text for key in opt.param_groups[0] if key != "params")
    assert "0x" not in text
    assert max(map(len, text.splitlines())) < 200


def test_a_profile_has_steps_and_zeroing_by_name(opt: torch.optim.Optimizer) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
        opt.zero_grad()

    names = {event.key for event in profile.key_averages()}
    assert f"Optimizer.step#{type(opt).__name__}.step" in names
    assert f"Optimizer.zero_grad#{type(opt).__name__}.zero_grad" in names


def test_schedulers_replace_the_step_of_an_instance(opt: torch.optim.Optimizer) -> None:
    """They take the function of a bound method, and count calls."""
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    lr = opt.param_groups[0]["lr"]
    opt.step()
    scheduler.step()

    assert opt.param_groups[0]["lr"] == lr / 2
    assert opt._opt_called  # type: ignore[attr-defined]


SCHEDULERS: dict[str, Any] = {
    "no scheduler": lambda opt: None,
    "LambdaLR": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.5),
    "CyclicLR": lambda opt: torch.optim.lr_scheduler.CyclicLR(opt, 0.1, 0.2, cycle_momentum=False),
}


@pytest.fixture(scope="module")
def _torch_has_imported_its_compiler() -> None:
    """The first optimizer of a process makes torch do so, and frames of that import refer to it, as garbage."""
    torch.optim.SGD(make_params(shapes=SHAPES))


@pytest.mark.usefixtures("_torch_has_imported_its_compiler")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", MAKERS)
def test_an_optimizer_is_freed_without_the_garbage_collector(name: str, scheduler: str) -> None:
    """Nothing it holds refers back to it: not what a step remembers, nor what loading makes."""
    params = make_params(shapes=SHAPES)
    gc.disable()
    try:
        made = MAKERS[name](params)
        attached = SCHEDULERS[scheduler](made)
        train([made], range(2))
        made.load_state_dict(made.state_dict())
        train([made], range(2, 3))
        gone, state = weakref.ref(made), weakref.ref(made.state[params[0]]["step"]) if name == "AdamW" else None
        del attached, made
        assert gone() is None
        assert state is None or state() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("_torch_has_imported_its_compiler")
def test_an_optimizer_that_failed_is_freed_as_well() -> None:
    params = make_params(shapes=SHAPES)
    gc.disable()
    try:
        made = AdamW(params)
        train([made], range(1))
        made.state[params[0]]["exp_avg"] = torch.zeros(99)
        with pytest.raises(ValueError, match="exp_avg"):
            made.step()
        gone = weakref.ref(made)
        del made
    finally:
        gc.enable()
    gc.collect()  # the traceback that pytest keeps refers to frames of the step
    assert gone() is None
