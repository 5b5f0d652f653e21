"""Extra arguments: rules and functions that take them, at every step, and refusals."""

import functools
from collections.abc import Callable
from typing import Any

import optax
import optree
import pytest
import torch

import functional_optim as fo
from _lib.chains import Halve, TimesValue, scale_by_value
from _lib.compare import Snapshot, assert_same_bits
from _lib.records import ATOL, BACKENDS, RTOL, double, gradients, normal, to_arrays, to_tensors, use
from _lib.trees import make_tree
from functional_optim.adapters import TransformOptimizer


STEPS = 20


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "alone": lambda tx: tx,
    "chain": lambda tx: fo.chain(fo.identity(), tx, fo.scale(1.0)),
    "named_chain": lambda tx: fo.named_chain(("inner", tx)),
    "masked": lambda tx: fo.masked(tx, True),
    "partition": lambda tx: fo.partition({"a": tx}, "a"),
    "behind a plain one": lambda tx: fo.chain(Halve(), fo.scale(2.0), tx),
    "everything": lambda tx: fo.chain(
        fo.masked(fo.named_chain(("a", fo.partition({"b": fo.chain(fo.masked(tx, lambda path, p: True))}, "b"))), "")
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("value", [3.0, torch.tensor(3.0), torch.tensor(3, dtype=torch.int64)], ids=repr)
def test_extra_arguments_reach_rules(wrapper: str, value: Any) -> None:
    tx, params = WRAPPERS[wrapper](scale_by_value(factor=2.0)), make_tree(0)

    updates, _ = tx.update(make_tree(1), tx.init(params), params, value=value)

    torch.testing.assert_close(updates, {k: 6 * g for k, g in make_tree(1).items()})


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_extra_arguments_reach_opaque_members(wrapper: str) -> None:
    inner, params = TimesValue(), make_tree(0)
    tx, other = WRAPPERS[wrapper](fo.chain(inner)), object()

    updates, _ = tx.update(make_tree(1), tx.init(params), params, value=3.0, other=other)

    torch.testing.assert_close(updates, {k: 3 * g for k, g in make_tree(1).items()})
    assert inner.calls == [{"value": 3.0, "other": other}]


def test_extra_arguments_are_new_at_every_step() -> None:
    params = {"w": torch.zeros((), dtype=torch.float64)}
    tx = fo.chain(scale_by_value(), TimesValue())
    state = tx.init(params)

    for step in range(STEPS):
        params, state = fo.apply_gradients(tx, params, {"w": torch.ones_like(params["w"])}, state, value=float(step))

    torch.testing.assert_close(params["w"], torch.tensor(float(sum(k * k for k in range(STEPS))), dtype=torch.float64))
    assert state[1] == {"calls": STEPS}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["sps", "sps+"])
def test_the_polyak_step_is_that_of_optax(variant: str, backend: str) -> None:
    rates, rest = (2.0, 0.5, STEPS), (1.0, 0.1, variant)
    tx = fo.polyak_sgd(0.5, fo.linear_schedule(*rates), *rest)
    theirs = optax.polyak_sgd(0.5, double(optax.linear_schedule(*rates)), *rest)
    params = normal(1000)
    expected, state, their_state = to_arrays(params), tx.init(params), theirs.init(to_arrays(params))
    for step in range(STEPS):
        value = 40.0 * (step % 4) ** 2  # from below the least value to beyond the largest step
        grads = optree.tree_map(lambda g, step=step: g * (step % 5 > 0), gradients("normal", step))
        with use(backend, step):
            params, state = fo.apply_gradients(tx, params, grads, state, value=value)
        updates, their_state = theirs.update(to_arrays(grads), their_state, expected, value=value)
        expected = optax.apply_updates(expected, updates)
        torch.testing.assert_close(params, to_tensors(expected), rtol=RTOL, atol=ATOL)


def test_a_function_gets_the_extra_arguments_that_it_names() -> None:
    seen: list[Any] = []

    def update(
        updates: Any, state: Any, params: Any = None, *, value: Any, missing: Any = "default"
    ) -> tuple[Any, Any]:
        seen.append((value, missing))
        return updates, state

    tx, params = fo.chain(fo.GradientTransformation(lambda params: (), update)), make_tree(0)

    tx.update(params, tx.init(params), params, value=1, grad=params)

    assert seen == [(1, "default")]


OFFERED = {"value": 1.0, "grad": {}, "value_fn": len}  # names that training loops pass to any transformation


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_extra_arguments_that_every_chain_may_be_offered(wrapper: str) -> None:
    tx, params, grads = WRAPPERS[wrapper](fo.scale(2.0)), make_tree(0), make_tree(1)
    expected, _ = tx.update(grads, tx.init(params), params)

    updates, _ = tx.update(grads, tx.init(params), params, **OFFERED)

    assert_same_bits(updates, expected)


def takes_curvature(updates: Any, state: Any, params: Any = None, *, curvature: Any = 1.0) -> tuple[Any, Any]:
    return updates, state


# Members, and the extra arguments that they take beside those that every chain may be offered.
TAKEN: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "nothing": (fo.identity, set()),
    "a rule": (lambda: fo.sgd(1.0), set()),
    "a rule that takes one": (scale_by_value, set()),
    "a function that takes none": (
        lambda: fo.GradientTransformation(lambda params: (), lambda updates, state, params=None: (updates, state)),
        set(),
    ),
    "a function that takes one": (
        lambda: fo.GradientTransformation(lambda params: (), takes_curvature), {"curvature"}
    ),
}  # fmt: skip


CALLS: dict[str, Callable[..., Any]] = {
    "update": lambda tx, params, grads, state, **extra: tx.update(grads, state, params, **extra),
    "apply_gradients": fo.apply_gradients,
    "donate": functools.partial(fo.apply_gradients, donate=True),
}


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name not in ("alone", "behind a plain one")])
@pytest.mark.parametrize("name", TAKEN)
def test_extra_arguments_that_nothing_takes_are_refused(name: str, wrapper: str, call: str, used: bool) -> None:
    """A misspelt one would be missed where it was meant; the message says which there are."""
    make, taken = TAKEN[name]
    tx, params, grads = WRAPPERS[wrapper](fo.chain(make())), make_tree(0), make_tree(1)
    extra, state = {"value": 2.0, **dict.fromkeys(taken, 3.0)}, tx.init(params)
    if used:
        tx.update(grads, state, params, **extra)
    snapshot = Snapshot(params, grads, state)

    with pytest.raises(TypeError, match="extra argument `vlaue`") as refused:
        CALLS[call](tx, params, grads, state, **extra, vlaue=2.0)

    snapshot.check()
    assert all(repr(k) in str(refused.value) for k in taken | set(OFFERED))
    tx.update(grads, state, params, **extra)


def test_an_extra_argument_that_is_missing_is_refused() -> None:
    tx, params = fo.chain(Halve(), scale_by_value()), make_tree(0)

    with pytest.raises(TypeError, match=r"scale_by_value needs the extra argument `value`: call `update\("):
        tx.update(params, tx.init(params), params, grad=params)
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(
        TypeError, match=r"scale_by_value needs the extra argument `value`: call `step\(closure, value="
    ):
        TransformOptimizer([p], fo.chain(fo.scale(2.0), scale_by_value())).step()


@pytest.mark.parametrize("name", ["u", "s", "p", "vlaue"])
def test_the_first_three_arguments_of_a_function_are_no_extra_ones(name: str) -> None:
    """Positions tell them, not names."""
    tx = fo.chain(fo.GradientTransformation(lambda params: (), lambda u, s, p=None, loss=None: (u, s)), fo.sgd(0.1))
    params = {"w": torch.ones(2)}
    own = torch.nn.Parameter(torch.ones(2))
    own.grad = torch.ones(2)

    with pytest.raises(TypeError, match=rf"takes the extra argument `{name}`; they take 'grad', 'loss', 'value'"):
        fo.apply_gradients(tx, params, params, tx.init(params), **{name: 3.0})
    with pytest.raises(TypeError, match=rf"unexpected keyword argument '{name}'; this chain takes 'loss'"):
        TransformOptimizer([own], tx).step(**{name: 3.0})

    fo.apply_gradients(tx, params, params, tx.init(params), loss=3.0)


def test_donation_is_asked_of_the_function_that_does_it() -> None:
    tx, w = fo.sgd(0.1), torch.ones(3)
    with pytest.raises(TypeError, match=r"takes the extra argument `donate`.* `apply_gradients` takes it"):
        tx.update(w, tx.init(w), w, donate=True)
