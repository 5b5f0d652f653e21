"""Pure transformations of torch's classes: torch's numbers, schedules, transforms of torch.func, refusals."""

import copy
from typing import Any

import pytest
import torch
from torch.func import vmap
from torch.testing._internal.common_optimizers import optim_db

import functional_optim as fo
from _lib.compare import assert_same_bits
from _lib.optimizers import give, gradients, params_of
from functional_optim import adapters
from functional_optim.adapters import from_torch_optimizer


NAMES = sorted({info.optim_cls.__name__ for info in optim_db} - {"LBFGS", "SparseAdam"})
FORMS = ("foreach", "fused", "capturable", "differentiable")
MORE: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
    ],
    "Adam": [{"lr": 0.1, "amsgrad": True, "weight_decay": 0.1}, {"lr": torch.tensor(0.1)}],
    "RAdam": [{"lr": 0.1, "eps": 1e-2}, {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}],
    "Rprop": [{"lr": 0.1, "step_sizes": (0.2, 0.3)}],
    "RMSprop": [{"lr": 0.1, "centered": True, "momentum": 0.9, "alpha": 0.9}],
    "Adafactor": [{"lr": 0.1, "eps": (1e-10, 1e-3), "weight_decay": 0.1}],
    "Muon": [{"lr": 0.1, "adjust_lr_fn": "match_rms_adamw", "nesterov": False}],
    "ASGD": [{"lr": 0.1, "t0": 3.0}],
}
OPTIONS = {
    info.optim_cls.__name__: [
        {k: x for k, x in given.kwargs.items() if k not in FORMS} for given in info.optim_inputs_func("cpu")
    ]
    for info in optim_db
    if info.optim_cls.__name__ in NAMES
}
CASES = {f"{name}, {given}": (name, given) for name in NAMES for given in (*OPTIONS[name], *MORE.get(name, []))}
# torch rounds a tensor in float32 elsewhere than a number; test_against_torch compares classes with such rates
NUMBERS = [case for case, (_, given) in CASES.items() if not isinstance(given.get("lr"), torch.Tensor)]


def start(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
    shapes: tuple[tuple[int, ...], ...] = ((4, 3), (3, 8)) if name == "Muon" else ((4, 3), (7,), (4, 3, 2), ())
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def trained(tx: fo.GradientTransformation, params: list[Any], steps: int = 20, seed: int = 0) -> list[Any]:
    state = tx.init(params)
    for step in range(steps):
        params, state = fo.apply_gradients(tx, params, gradients(params, step + seed), state)
    return params


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_the_class_to_the_bit(case: str) -> None:
    name, given = CASES[case]
    for dtype in (torch.float64, torch.float32):
        params = [torch.nn.Parameter(x.clone()) for x in start(name, dtype)]
        opt = getattr(adapters, name)(params, **copy.deepcopy(given))
        for step in range(20):
            give(params_of(opt), gradients(params_of(opt), step))
            opt.step()

        found = trained(from_torch_optimizer(name, **given), start(name, dtype))

        assert_same_bits(found, [p.detach() for p in params])


@pytest.mark.parametrize("case", NUMBERS)
def test_steps_are_those_of_torch(case: str) -> None:
    name, given = CASES[case]
    params = [torch.nn.Parameter(x.clone()) for x in start(name, torch.float64)]
    theirs = getattr(torch.optim, name)(params, **copy.deepcopy(given))
    for step in range(20):
        give(params, gradients(params, step))
        theirs.step()
    found = trained(from_torch_optimizer(name, **given), start(name, torch.float64))
    # 20 steps of some ten roundings each, of values of order one: 200 * 2**-53 is 2e-14. The steps of Muon are
    # computed in bfloat16 by both, and a value on the border of two of them goes to either: none does here.
    for ours, p in zip(found, params, strict=True):
        torch.testing.assert_close(ours, p.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"Rprop", "ASGD"}))
def test_the_learning_rate_may_be_a_schedule(name: str) -> None:
    """The rate of torch's class under a scheduler, which is given as many steps."""
    lr = 0.05
    params = [torch.nn.Parameter(x.clone()) for x in start(name, torch.float64)]
    theirs = getattr(torch.optim, name)(params, lr=lr)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(theirs, 0.9)
    for step in range(20):
        give(params, gradients(params, step))
        theirs.step()
        scheduler.step()

    rate = fo.from_torch_scheduler("ExponentialLR", lr=lr, gamma=0.9)
    found = trained(from_torch_optimizer(name, lr=rate), start(name, torch.float64))

    for ours, p in zip(found, params, strict=True):
        torch.testing.assert_close(ours, p.detach(), rtol=0, atol=1e-13)  # as above


def test_sparse_adam_is_that_of_gradients_that_touch_every_row() -> None:
    table = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3))
    found = trained(from_torch_optimizer("SparseAdam", lr=0.1), [table.detach().clone()])
    theirs = torch.optim.SparseAdam([table], lr=0.1)
    for step in range(20):
        table.grad = gradients([table], step)[0].to_sparse(1)
        theirs.step()

    torch.testing.assert_close(found[0], table.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"Muon"}))  # products in bfloat16 round otherwise in stacks
def test_members_of_vmap_step_as_each_alone(name: str) -> None:
    tx = from_torch_optimizer(name, lr=0.1)
    members = [[x + k for x in start(name, torch.float64)] for k in range(3)]
    alone = [trained(tx, params, 5) for params in members]

    stacked = [torch.stack(xs) for xs in zip(*members, strict=True)]
    state = vmap(tx.init)(stacked)
    for step in range(5):
        grads = [g.expand(3, *g.shape) for g in gradients(members[0], step)]
        stacked, state = vmap(lambda p, g, s: fo.apply_gradients(tx, p, g, s))(stacked, grads, state)

    for k, params in enumerate(alone):
        for x, p in zip(stacked, params, strict=True):
            torch.testing.assert_close(x[k], p, rtol=0, atol=1e-13)


REFUSED: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "another name": ("Adagrat", {}, ValueError, "`name` of from_torch_optimizer is 'Adagrat', expected one of"),
    "no name": (torch.optim.Adam, {}, ValueError, "expected one of Adadelta, "),  # type: ignore[dict-item]
    "a closure": ("LBFGS", {"lr": 1.0}, ValueError, "evaluates a closure; use functional_optim.lbfgs"),
    "parameters": ("SGD", {"params": []}, TypeError, "'params' is an argument of an optimizer"),
    "an implementation": ("SGD", {"fused": True}, TypeError, "'fused' is an argument of an optimizer, .*leave it out"),
    "another keyword": ("Adam", {"momentum": 0.9}, TypeError, "'momentum'"),
    "a rate below 0": ("Adam", {"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    "a schedule for a decay": ("Adam", {"betas": (lambda count: 0.9, 0.99)}, TypeError, "betas"),
    "a schedule for a first step size": (
        "Rprop",
        {"lr": lambda count: 0.1},
        TypeError,
        "signs of gradients from there",
    ),
    "a schedule for a first rate": ("ASGD", {"lr": lambda count: 0.1}, TypeError, "use `functional_optim.asgd`"),
    "a list of names": (["SGD"], {}, ValueError, "expected one of Adadelta, "),  # type: ignore[dict-item]
    "a bool for a rate": ("SGD", {"lr": True}, TypeError, "`lr` is bool True, expected a number"),
    "a bool for a decay of moments": ("Adam", {"betas": (True, 0.9)}, TypeError, "`betas` is bool True"),
    "a third decay": ("Adam", {"betas": (0.9, 0.99, 0.5)}, ValueError, "'betas' .* expected two numbers"),
    "a schedule of two arguments": ("SGD", {"lr": lambda count, total: 0.1}, TypeError, "expected a schedule"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_make_no_transformation(case: str) -> None:
    name, given, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        from_torch_optimizer(name, **given)
