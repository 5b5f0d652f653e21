"""Every scheduler of torch beside our optimizers."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

import functional_optim as fo
from _lib.compare import EXACT
from _lib.optimizers import SMALL, make_grads, make_params, params_of, take_step
from _lib.training import values
from functional_optim import adapters


STEPS = 12
Make = Callable[[torch.optim.Optimizer], Any]
L = lr_scheduler
SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda o: L.LambdaLR(o, lambda k: 0.9**k),
    "MultiplicativeLR": lambda o: L.MultiplicativeLR(o, lambda k: 0.8),
    "StepLR": lambda o: L.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: L.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: L.ConstantLR(o, 0.25, 4),
    "LinearLR": lambda o: L.LinearLR(o, 0.25, 1.0, 6),
    "ExponentialLR": lambda o: L.ExponentialLR(o, 0.75),
    "PolynomialLR": lambda o: L.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: L.CosineAnnealingLR(o, 5, 1e-3),
    "CosineAnnealingWarmRestarts": lambda o: L.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: L.CyclicLR(o, 0.01, 0.1, 2, 3, "exp_range", 0.9, base_momentum=0.7, max_momentum=0.95),
    "OneCycleLR": lambda o: L.OneCycleLR(o, 0.2, total_steps=STEPS + 1, base_momentum=0.7, max_momentum=0.95),
    "ReduceLROnPlateau": lambda o: L.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SequentialLR": lambda o: L.SequentialLR(o, [L.ConstantLR(o, 0.1, 2), L.ExponentialLR(o, 0.8)], [4]),
    "ChainedScheduler": lambda o: L.ChainedScheduler([L.ConstantLR(o, 0.1, 2), L.ExponentialLR(o, 0.8)]),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.01, 4),
}
CLASSES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "SGD": (adapters.SGD, torch.optim.SGD, {"momentum": 0.9}),
    "AdamW": (adapters.AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
}


def advance(scheduler: Any) -> None:
    """One step of a scheduler; to one that watches a loss, a loss that does not fall."""
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def run(optimizer: Any, make: Make) -> tuple[list[Any], list[Any]]:
    """Trains with a scheduler.

    Returns:
      What it made of each group before each step, and the parameters.
    """
    scheduler = make(optimizer)
    seen = []
    for grads in make_grads(params_of(optimizer), STEPS):
        seen.append([values({k: g[k] for k in ("lr", "momentum", "betas") if k in g}) for g in optimizer.param_groups])
        take_step(optimizer, grads)
        advance(scheduler)
    return seen, values(params_of(optimizer))


def test_no_scheduler_is_missing() -> None:
    classes = {
        name
        for name, x in [*vars(lr_scheduler).items(), *vars(swa_utils).items()]
        if inspect.isclass(x) and issubclass(x, lr_scheduler.LRScheduler) and x is not lr_scheduler.LRScheduler
    }
    assert {name for name in classes if not name.startswith("_")} == set(SCHEDULERS)


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_same_as_torch(name: str, cls: str, tensor_lr: bool) -> None:
    ours, torchs, options = CLASSES[cls]

    def groups() -> tuple[list[dict[str, Any]], Any]:
        a, b = make_params(shapes=SMALL)
        lrs = [torch.tensor(x, dtype=torch.float64) if tensor_lr else x for x in (0.05, 0.02)]
        return [{"params": [a]}, {"params": [b], "lr": lrs[1]}], lrs[0]

    params, lr = groups()
    actual = run(ours(params, lr=lr, **options), SCHEDULERS[name])
    params, lr = groups()
    expected = run(torchs(params, lr=lr, fused=True, **options), SCHEDULERS[name])
    torch.testing.assert_close(actual, expected, **EXACT)
    # the scheduler did something, so that equal parameters mean that it was obeyed
    assert any(row != expected[0][0] for row in expected[0])


@pytest.mark.parametrize("name", ["StepLR", "OneCycleLR", "ReduceLROnPlateau", "SWALR"])
def test_tensor_lr_stays_the_same_tensor(name: str) -> None:
    lr = torch.tensor(0.05, dtype=torch.float64)
    optimizer = adapters.AdamW(make_params(shapes=SMALL), lr=lr)
    run(optimizer, SCHEDULERS[name])
    assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
def test_momentum_of_a_chain_is_not_cycled(name: str) -> None:
    """A chain calls its decays by their own names, and torch's scheduler says what it looks for."""
    optimizer = adapters.TransformOptimizer(make_params(shapes=SMALL), fo.sgd(0.1, momentum=0.9))
    with pytest.raises(ValueError, match="optimizer must support momentum or beta1"):
        SCHEDULERS[name](optimizer)


def without_cycling(name: str) -> Make:
    """The scheduler, leaving momentum alone."""
    if name == "CyclicLR":
        return lambda o: L.CyclicLR(o, 0.01, 0.1, 2, 3, cycle_momentum=False)
    if name == "OneCycleLR":
        return lambda o: L.OneCycleLR(o, 0.2, total_steps=STEPS + 1, cycle_momentum=False)
    return SCHEDULERS[name]


def pure(chain_at: Callable[[float], fo.GradientTransformation], lrs: list[float]) -> list[Any]:
    """The parameters after steps of a chain that is made anew for each with its learning rate."""
    params: Any = values(make_params(shapes=SMALL))
    state = chain_at(lrs[0]).init(params)
    for lr, grads in zip(lrs, make_grads(params, STEPS), strict=True):
        params, state = fo.apply_gradients(chain_at(lr), params, grads, state)
    return params  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_chain_obeys(name: str) -> None:
    def chain_at(lr: float) -> fo.GradientTransformation:
        return fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(lr))

    optimizer = adapters.TransformOptimizer(make_params(shapes=SMALL), chain_at(0.05))
    seen, actual = run(optimizer, without_cycling(name))
    torch.testing.assert_close(actual, pure(chain_at, [row[0]["lr"] for row in seen]), **EXACT)


@pytest.mark.parametrize("name", ["StepLR", "OneCycleLR", "ReduceLROnPlateau", "SequentialLR"])
def test_schedule_in_the_chain_times_the_scheduler_outside(name: str) -> None:
    inner = fo.adamw(fo.linear_schedule(0.1, 0.01, STEPS))
    optimizer = adapters.TransformOptimizer(make_params(shapes=SMALL), inner)
    assert optimizer.param_groups[0]["lr"] == 1.0
    seen, actual = run(optimizer, without_cycling(name))
    factors = [row[0]["lr"] for row in seen]
    torch.testing.assert_close(actual, pure(lambda f: fo.chain(inner, fo.scale(f)), factors), **EXACT)


@pytest.mark.parametrize("name", ["CosineAnnealingLR", "OneCycleLR"])
def test_resumes_in_the_middle(name: str) -> None:
    """Entries of a scheduler in the groups come back with the optimizer's state."""
    make = SCHEDULERS[name]
    _, expected = run(adapters.AdamW(make_params(shapes=SMALL), lr=0.05), make)

    first = adapters.AdamW(make_params(shapes=SMALL), lr=0.05)
    scheduler = make(first)
    grads = make_grads(params_of(first), STEPS)
    for each in grads[:5]:
        take_step(first, each)
        advance(scheduler)
    second = adapters.AdamW([torch.nn.Parameter(p.detach().clone()) for p in params_of(first)], lr=1.0)
    resumed = make(second)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for each in grads[5:]:
        take_step(second, each)
        advance(resumed)
    torch.testing.assert_close(values(params_of(second)), expected, **EXACT)
