"""Costs of a step, counted in calls that Python makes, and not in time."""

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import functional_optim as fo
from _lib.trees import clone
from functional_optim.adapters import AdamW, TransformOptimizer


# adapters are beside the package in a checkout, and within it where it is installed
PACKAGE = tuple(os.path.dirname(os.path.realpath(x.__file__)) + os.sep for x in (fo, fo.adapters))


def calls(step: Callable[[], Any]) -> list[str]:
    """The functions that a step calls, those written in C included: the file of each, empty for C."""
    found: list[str] = []

    def profile(frame: Any, event: str, arg: Any) -> None:
        if event in ("call", "c_call"):
            found.append(frame.f_code.co_filename if event == "call" else "")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(before)
    return found


def identity(updates: Any, params: Any) -> Any:
    return updates


def count(updates: Any, state: Any, params: Any = None) -> Any:
    return updates, state + 1


OPAQUE = {
    "stateless": lambda: fo.stateless(identity),
    "a counter": lambda: fo.GradientTransformation(lambda params: 0, count),
}


def optimizer(tx: Any) -> Callable[[int], Callable[[], Any]]:
    def make(n: int) -> Callable[[], Any]:
        params = [nn.Parameter(torch.ones(2)) for _ in range(n)]
        opt = AdamW(params) if tx is None else TransformOptimizer(params, tx)
        for p in params:
            p.grad = torch.ones(2)
        return opt.step

    return make


def pure_step(tx: Any, params: Any, donate: bool) -> Callable[[], Any]:
    """A step of a transformation on parameters of ones, from the last step's."""
    grads = clone(params)
    held = [(params, tx.init(params))]

    def step() -> None:
        held[0] = fo.apply_gradients(tx, held[0][0], grads, held[0][1], donate=donate)

    return step


def pure(tx: Any, donate: bool) -> Callable[[int], Callable[[], Any]]:
    return lambda n: pure_step(tx, {str(k): torch.ones(2) for k in range(n)}, donate)


def per_tensor(make: Callable[[int], Callable[[], Any]]) -> float:
    """Calls of a step for each tensor more."""
    found = []
    for n in (50, 150):
        step = make(n)
        for _ in range(3):
            step()
        found.append(len(calls(step)))
    return (found[1] - found[0]) / 100


def test_a_step_can_be_followed() -> None:
    """The numbers of functions and files that docs/kernels.md tells."""
    for step, files in ((pure(fo.adamw(1e-3), True)(3), 12), (optimizer(None)(3), 11)):
        for _ in range(5):
            step()
        own = [file for file in calls(step) if os.path.realpath(file).startswith(PACKAGE)]
        assert len(own) <= 40
        assert len(set(own)) <= files


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_several_models_are_told_apart_without_showing_their_tensors(nested: bool, donate: bool) -> None:
    """An error message that nobody reads would show them, and wait for a device."""
    tx = fo.adamw(1e-3)
    steps = []
    for n in (3, 4, 4, 5):
        params: Any = {f"{n} {len(steps)} {k}": torch.ones(2) for k in range(n)}
        params = [params, {"bias": torch.ones(2)}] if nested else params
        steps.append(pure_step(tx, params, donate))
    for step in (*steps, *steps):
        step()

    for step in steps:
        assert not [file for file in calls(step) if "tensor_str" in file]


def test_a_model_that_is_used_stays_bound() -> None:
    """Of many models, those that have waited longest are bound anew."""
    tx = fo.adamw(1e-3)
    first, *others = (pure_step(tx, {str(k): torch.ones(2) for k in range(n)}, True) for n in range(2, 14))
    first()
    first()
    n = len(calls(first))
    for other in others:
        other()
        assert len(calls(first)) <= n + 40


def set_of_gradients(params: list[nn.Parameter], present: int) -> None:
    """Gives gradients to the parameters whose bits are set."""
    for i, p in enumerate(params):
        p.grad = torch.ones(2) if present >> i & 1 else None


def test_a_rule_is_traced_once_whichever_gradients_there_are() -> None:
    traced = []

    @fo.elementwise
    def double(u: Any) -> Any:
        traced.append(1)
        return -2 * u

    params = [nn.Parameter(torch.zeros(2)) for _ in range(5)]
    opt = TransformOptimizer(params, double())
    for present in range(1, 32):
        set_of_gradients(params, present)
        opt.step()

    assert len(traced) == 1
    torch.testing.assert_close(params, [torch.full((2,), -32.0)] * 5)


def test_gradients_that_are_seen_again_stay_bound() -> None:
    """Of many sets of gradients, those that have waited longest are bound anew, and others are found at once."""
    params = [nn.Parameter(torch.zeros(2)) for _ in range(5)]
    opt = AdamW(params)
    found = []
    for present in (3, 3, *(p for other in range(4, 32) for p in (other, 3))):
        set_of_gradients(params, present)
        found.append((present, len(calls(opt.step))))

    again = [n for present, n in found[1:] if present == 3]
    assert max(again) <= again[0] + 40


def test_a_step_of_rules_calls_nothing_for_each_tensor() -> None:
    """A step that writes in place reads tensors in lists, whatever their number."""
    assert per_tensor(optimizer(None)) <= 1
    assert per_tensor(optimizer(fo.adamw(1e-3))) <= 1
    assert per_tensor(pure(fo.adamw(1e-3), donate=True)) <= 1


@pytest.mark.parametrize("opaque", OPAQUE)
@pytest.mark.parametrize("way", ["optimizer", "pure"])
def test_an_opaque_transformation_costs_a_few_calls_for_each_tensor(way: str, opaque: str) -> None:
    """Fewer than a plain loop over the parameters, which calls some dozen functions for each."""
    tx = fo.chain(OPAQUE[opaque](), fo.adamw(1e-3))
    make = optimizer(tx) if way == "optimizer" else pure(tx, donate=False)
    assert per_tensor(make) <= 40


@pytest.mark.parametrize("members", [1, 4])
def test_calls_do_not_grow_with_the_square_of_tensors(members: int) -> None:
    tx = fo.chain(*[fo.stateless(identity) for _ in range(members)], fo.adamw(1e-3))
    found = []
    for n in (40, 80, 160):
        step = optimizer(tx)(n)
        for _ in range(3):
            step()
        found.append(len(calls(step)))
    assert found[2] - found[1] <= 2.2 * (found[1] - found[0])
