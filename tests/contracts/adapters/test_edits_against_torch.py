"""Options, parameters and groups that change between steps: beside torch, to the bit or within units."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from _lib.forms_of_torch import FUSED, ROUNDED, split
from _lib.optimizers import (
    OURS,
    UNITS,
    assert_same,
    fitting,
    follow,
    give,
    gradients,
    make_params,
    pair,
    params_of,
    train,
    twins,
)


def _set(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda group: group.update(values)


EDITS: dict[str, tuple[str, dict[str, Any], list[Callable[[dict[str, Any]], Any]]]] = {
    "sgd lr": ("SGD", {"lr": 0.1, "momentum": 0.9}, [_set(lr=0.2), _set(lr=0), _set(lr=torch.tensor(0.3))]),
    "sgd lr in place": ("SGD", {"lr": torch.tensor(0.1)}, [lambda group: group["lr"].fill_(0.3)]),
    "sgd momentum": ("SGD", {"momentum": 0.9}, [_set(momentum=0.5), _set(momentum=0), _set(momentum=0.7)]),
    "sgd momentum from none": ("SGD", {"lr": 0.1}, [_set(momentum=0.9), _set(dampening=0.5)]),
    "sgd decay": ("SGD", {"lr": 0.1}, [_set(weight_decay=0.1), _set(weight_decay=0.2), _set(weight_decay=0)]),
    "sgd decay in place": (
        "SGD",
        {"momentum": 0.9, "weight_decay": torch.zeros(())},
        [lambda group: None, lambda group: group["weight_decay"].fill_(0.5)],
    ),
    "sgd switches": ("SGD", {"momentum": 0.9}, [_set(maximize=True), _set(nesterov=True), _set(maximize=False)]),
    "adam numbers": (
        "Adam",
        {},
        [_set(lr=0.1), _set(betas=(0.5, 0.6)), _set(eps=0.1), _set(weight_decay=0.1), _set(betas=[0.5, 0.8])],
    ),
    "adam betas in place": ("Adam", {}, [_set(betas=[0.5, 0.8]), lambda group: group["betas"].__setitem__(0, 0.1)]),
    "adam betas as tensors": ("Adam", {}, [_set(betas=(torch.tensor(0.5), torch.tensor([0.6])))]),
    "adam switches": (
        "Adam",
        {"weight_decay": 0.1, "amsgrad": True},
        [_set(maximize=True), _set(decoupled_weight_decay=True), _set(amsgrad=False)],
    ),
    "adagrad numbers": ("Adagrad", {}, [_set(lr=0.1, eps=0.1), _set(lr_decay=0.5), _set(weight_decay=0.1)]),
    "adamax numbers": ("Adamax", {}, [_set(lr=0.1), _set(betas=(0.5, 0.6)), _set(maximize=True, weight_decay=0.1)]),
    "asgd numbers": ("ASGD", {}, [_set(lr=0.1), _set(lambd=0.1, alpha=0.5), _set(t0=2), _set(weight_decay=0.1)]),
    "rprop numbers": ("Rprop", {}, [_set(lr=1.0), _set(etas=(0.3, 1.7)), _set(step_sizes=(0.1, 0.2), maximize=True)]),
    "adamw numbers": ("AdamW", {}, [_set(lr=0.1, weight_decay=0.5), _set(lr=0.0), _set(weight_decay=0, eps=1e-2)]),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_change_of_an_option_shows_in_the_next_step(case: str) -> None:
    name, kwargs, edits = EDITS[case]
    halves: Callable[[list[Any]], Any] = lambda params: [{"params": params[::2]}, {"params": params[1::2]}]  # noqa: E731
    ours, theirs = pair(name, groups=halves, theirs=ROUNDED[name], **kwargs)
    for k, edit in enumerate([lambda group: None, *edits]):
        for opt in (ours, theirs):
            edit(opt.param_groups[0])
        train([ours, theirs], range(3 * k, 3 * k + 3))

        assert_same(ours, theirs)


@pytest.mark.parametrize("name", OURS)
def test_each_edit_of_rmsprop_and_others_is_within_units_of_the_for_loop(name: str) -> None:
    ours, theirs = pair(name, **fitting(name, lr=0.01, weight_decay=0.1))
    edits = iter([{"lr": 0.1}, {"weight_decay": 0.0}, {"maximize": True}, {"lr": 0.001, "weight_decay": 0.2}] * 3)

    def edit() -> None:
        values = next(edits)
        for opt in (ours, theirs):
            opt.param_groups[0].update(values)

    far = follow(ours, theirs, range(12), edit)

    assert max(far.values()) <= UNITS[name], far


@pytest.mark.parametrize("name", OURS)
def test_maximize_ascends_and_still_decays(name: str) -> None:
    """Ascending with the gradient is descending with its negative; a decay shrinks either way."""
    up, _ = pair(name, **fitting(name, lr=0.01, weight_decay=0.1), maximize=True)
    down, _ = pair(name, **fitting(name, lr=0.01, weight_decay=0.1))
    for step in range(5):
        grads = gradients(params_of(up), step)
        give(params_of(up), grads)
        give(params_of(down), [g if g is None else -g for g in grads])
        up.step()
        down.step()

    assert_same(up, down)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_parameters_that_are_frozen_and_unfrozen_have_the_same_bits(name: str) -> None:
    """Frozen: they have no gradient, for the loss does not ask for one. Late ones start with fresh state."""
    ours, theirs = pair(name, lr=0.01, theirs=FUSED)
    for step in range(20):
        for opt in (ours, theirs):
            params = params_of(opt)
            for k, p in enumerate(params):
                p.requires_grad_(not (k == 1 and step < 5) and not (k == 2 and 8 <= step < 14))
            opt.zero_grad()
            grads = gradients(params, step)
            sum((p * g).sum() for p, g in zip(params, grads, strict=True) if p.requires_grad).backward()
            opt.step()

        assert_same(ours, theirs)
    assert [ours.state[p]["step"].item() for p in params_of(ours)][:4] == [20, 15, 14, 20]


def test_late_gradients_of_sgd_start_their_own_momentum() -> None:
    """A parameter's first gradient is its first buffer, whole, whenever it comes; torch's for-loop does the same."""
    ours, theirs = pair("SGD", lr=0.01, momentum=0.9, dampening=0.5)
    for step in range(10):
        for opt in (ours, theirs):
            grads = gradients(params_of(opt), step)
            give(params_of(opt), [None if k == step % 2 and step < 4 else g for k, g in enumerate(grads)])
            opt.step()
    # the for-loop of SGD multiplies and adds as the kernel does, so nothing differs
    assert_same(ours, theirs)


ADAGRAD = pytest.param(
    "Adagrad",
    marks=pytest.mark.skipif(
        torch.__version__ < (2, 12), reason="torch.optim.Adagrad of this version has no state for parameters that join"
    ),
)


JOINED = [ADAGRAD if name == "Adagrad" else name for name in ROUNDED]


@pytest.mark.parametrize("name", JOINED)
def test_replaced_parameters_start_anew(name: str) -> None:
    ours, theirs = pair(name, lr=0.01, theirs=ROUNDED[name])
    train([ours, theirs], range(5))
    new = make_params(seed=1)
    for opt in (ours, theirs):
        group = opt.param_groups[0]
        group["params"] = [*twins(new)[:3], *group["params"][3:]]
        train([opt], range(5, 10))
        group["params"][4] = twins(new)[4]
        train([opt], range(10, 15))

    assert_same(ours, theirs)


@pytest.mark.parametrize("name", JOINED)
def test_added_groups_start_anew_and_others_go_on(name: str) -> None:
    ours, theirs = pair(name, lr=0.01, theirs=ROUNDED[name])
    train([ours, theirs], range(5))
    for opt in (ours, theirs):
        opt.add_param_group({"params": make_params(seed=1)[:2], "lr": 0.1, "weight_decay": 0.2})

    train([ours, theirs], range(5, 15))

    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ROUNDED)
def test_a_part_of_the_groups_can_be_stepped(name: str) -> None:
    """Some libraries assign a sub-list to `param_groups`, step, and put the groups back."""
    ours, theirs = pair(name, groups=split([{}, {"lr": 0.1}]), lr=0.01, theirs=ROUNDED[name])
    train([ours, theirs], range(3))
    for opt in (ours, theirs):
        groups = opt.param_groups
        for k in range(4):
            opt.param_groups = [groups[k % 2]]
            train([opt], [3 + k])
        opt.param_groups = groups
    train([ours, theirs], range(7, 10))

    assert_same(ours, theirs)
