"""Slots that hold the parameters to evaluate at: read from states, and swapped in by optimizers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.chains import is_matrix
from _lib.compare import DOUBLE, assert_same_bits
from _lib.training import train
from _lib.trees import clone, like, make_tree
from functional_optim.adapters import TransformOptimizer


STEPS = 20


@fo.elementwise(state={"z": fo.slot("param"), "x": fo.slot("param", evaluate=True), "nu": fo.zeros})
def schedule_free_adamw(u, p, z, x, nu, *, step, learning_rate, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.01):  # type: ignore[no-untyped-def]
    nu = b2 * nu + (1 - b2) * u * u
    z = z - learning_rate * (u / (torch.sqrt(nu / (1 - b2**step)) + eps) + weight_decay * p)
    x = x + (z - x) / step
    return (1 - b1) * z + b1 * x - p, z, x, nu


@fo.elementwise(state={"slow": fo.slot("param", evaluate=True)}, final=True)
def lookahead(u, p, slow, *, step, every=3, alpha=0.5):  # type: ignore[no-untyped-def]
    syncs = step / every == torch.floor(step / every)
    fast = p + u
    slow = torch.where(syncs, slow + alpha * (fast - slow), slow)
    return torch.where(syncs, slow, fast) - p, slow


def by_schedule_free(y: Any, grads: list[Any]) -> tuple[Any, Any]:
    z, x, v = y.clone(), y.clone(), torch.zeros_like(y)
    for t, g in enumerate(grads, 1):
        v = 0.99 * v + 0.01 * g**2
        z = z - 0.05 * (g / ((v / (1 - 0.99**t)).sqrt() + 1e-8) + 0.01 * y)
        x = (1 - 1 / t) * x + z / t
        y = 0.1 * z + 0.9 * x
    return y, x


def by_lookahead(p: Any, grads: list[Any]) -> tuple[Any, Any]:
    slow = p.clone()
    for t, g in enumerate(grads, 1):
        p = p - 0.1 * g
        if t % 3 == 0:
            p = slow = slow + 0.5 * (p - slow)
    return p, slow


METHODS: dict[str, tuple[Any, Callable[[Any, list[Any]], tuple[Any, Any]]]] = {
    "schedule-free": (schedule_free_adamw(0.05), by_schedule_free),
    "lookahead": (fo.chain(fo.sgd(0.1), lookahead()), by_lookahead),
    "named": (fo.named_chain(("rate", fo.sgd(0.1)), ("slow", lookahead())), by_lookahead),
}


@pytest.mark.parametrize("name", METHODS)
def test_parameters_to_evaluate_at(name: str) -> None:
    tx, by_hand = METHODS[name]
    first = make_tree(0)
    grads = [like(first, seed) for seed in range(1, STEPS + 1)]
    expected = {k: by_hand(p, [g[k] for g in grads]) for k, p in first.items()}

    params, state = train(tx, clone(first), grads)

    torch.testing.assert_close(params, {k: both[0] for k, both in expected.items()}, **DOUBLE)
    torch.testing.assert_close(fo.eval_params(state, params), {k: both[1] for k, both in expected.items()}, **DOUBLE)


@pytest.mark.parametrize("name", METHODS)
def test_optimizers_swap_them_in(name: str) -> None:
    tx, by_hand = METHODS[name]
    first = make_tree(0)
    grads = [like(first, seed) for seed in range(1, STEPS + 1)]
    model = {k: torch.nn.Parameter(p.clone()) for k, p in first.items()}
    opt = TransformOptimizer(list(model.items()), tx)
    for g in grads:
        for k, p in model.items():
            p.grad = g[k].clone()
        opt.step()
    trained = clone({k: p.detach() for k, p in model.items()})

    with opt.averaged_params():
        inside = clone({k: p.detach() for k, p in model.items()})

    expected = {k: by_hand(p, [g[k] for g in grads]) for k, p in first.items()}
    torch.testing.assert_close(trained, {k: both[0] for k, both in expected.items()}, **DOUBLE)
    torch.testing.assert_close(inside, {k: both[1] for k, both in expected.items()}, **DOUBLE)
    assert_same_bits({k: p.detach() for k, p in model.items()}, trained)


def test_a_masked_leaf_is_evaluated_as_it_is() -> None:
    first = make_tree(0)
    tx = fo.chain(fo.sgd(0.1), fo.masked(lookahead(), is_matrix))

    params, state = train(tx, clone(first), [like(first, 1)])

    average = fo.eval_params(state, params)
    assert_same_bits(average, {**params, "weight": first["weight"]})


TWO = fo.chain(fo.sgd(0.1), lookahead(), fo.params_ema(0.5))


@pytest.mark.parametrize("slot", ["slow", "lookahead.slow", "ema", "params_ema.ema"])
def test_one_of_two_is_read_by_its_name(slot: str) -> None:
    first = make_tree(0)
    params, state = train(TWO, clone(first), [like(first, 1)])
    model = {k: torch.nn.Parameter(p.clone()) for k, p in first.items()}
    opt = TransformOptimizer(list(model.items()), TWO)
    for k, p in model.items():
        p.grad = like(first, 1)[k]
    opt.step()

    average = fo.eval_params(state, params, slot)

    assert_same_bits(average, state[1].slow if "slow" in slot else state[2].ema)
    with opt.averaged_params(slot=slot):
        assert_same_bits({k: p.detach() for k, p in model.items()}, average)


def test_two_are_refused_with_both_names() -> None:
    params = make_tree(0)
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    opt = TransformOptimizer([p], TWO)
    opt.step()

    with pytest.raises(ValueError, match=r"one parameter at '\w+', 'slow' and 'ema'; say which to read: `eval_params"):
        fo.eval_params(TWO.init(params), params)
    with pytest.raises(ValueError, match=r"'slow' and 'ema'; say which to swap in: `averaged_params\(slot='ema'\)`"):
        opt.averaged_params().__enter__()
    with pytest.raises(ValueError, match=r"is called 'x'; there are 'slow', 'ema'"):
        fo.eval_params(TWO.init(params), params, "x")
    with pytest.raises(ValueError, match=r"is called 'x'; there are 'slow', 'ema'"):
        opt.averaged_params(slot="x").__enter__()


def test_two_of_one_rule_have_names_that_differ() -> None:
    params = make_tree(0)
    tx = fo.chain(fo.params_ema(0.9), fo.params_ema(0.99))
    params, state = train(tx, params, [like(params, 1)])

    average = fo.eval_params(state, params, "params_ema_ema_2")

    assert_same_bits(average, state[1].ema)


def test_a_number_is_no_place_to_evaluate_at() -> None:
    with pytest.raises(ValueError, match="one number per element, got per='leaf'"):
        fo.slot(1.0, per="leaf", evaluate=True)
