"""Combinators: chains, what they are made of, and functions as transformations."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.chains import Halve, is_matrix
from _lib.compare import DOUBLE, assert_same_bits
from _lib.training import train
from _lib.trees import clone, like, make_tree


STEPS = 20


def test_an_empty_chain_is_the_identity() -> None:
    params, grads = make_tree(0), make_tree(1)

    for tx in (fo.chain(), fo.identity(), fo.chain(fo.chain(), fo.identity()), fo.named_chain()):
        updates, state = tx.update(grads, tx.init(params), params)
        new, _ = fo.apply_gradients(tx, params, grads, state)

        assert_same_bits(updates, grads)
        torch.testing.assert_close(new, {k: p + grads[k] for k, p in params.items()})


def test_set_to_zero_freezes() -> None:
    params = make_tree(0)
    grads = {k: torch.full_like(p, torch.nan) for k, p in params.items()}
    tx = fo.set_to_zero()

    new, _ = fo.apply_gradients(tx, params, grads, tx.init(params))

    assert_same_bits(new, params)


def members() -> tuple[Any, ...]:
    return (
        fo.clip_by_global_norm(1.0),
        fo.scale_by_adam(),
        Halve(),
        fo.add_decayed_weights(0.1),
        fo.trace(0.9),
        fo.scale(-0.1),
    )


def test_a_chain_is_its_members_one_after_another() -> None:
    params, txs = make_tree(0), [fo.chain(tx) for tx in members()]
    tx = fo.chain(*members())
    state, states = tx.init(params), [t.init(params) for t in txs]

    for step in range(STEPS):
        expected = like(params, step)
        for k, t in enumerate(txs):
            expected, states[k] = t.update(expected, states[k], params)
        updates, state = tx.update(like(params, step), state, params)

        torch.testing.assert_close((updates, state), (expected, tuple(s for (s,) in states)), **DOUBLE)


NESTINGS: dict[str, Callable[..., Any]] = {
    "flat": lambda a, b, c, d, e, f: fo.chain(a, b, c, d, e, f),
    "pairs": lambda a, b, c, d, e, f: fo.chain(fo.chain(a, b), fo.chain(c, d), fo.chain(e, f)),
    "right": lambda a, b, c, d, e, f: fo.chain(a, fo.chain(b, fo.chain(c, fo.chain(d, fo.chain(e, fo.chain(f)))))),
    "left": lambda a, b, c, d, e, f: fo.chain(fo.chain(fo.chain(fo.chain(fo.chain(a), b), c), d), e, fo.chain(), f),
    "named": lambda a, b, c, d, e, f: fo.named_chain(
        ("first", fo.chain(a, b, c)), ("second", fo.named_chain(("d", d), ("e", e), ("f", f)))
    ),
    "masked by all": lambda a, b, c, d, e, f: fo.chain(
        fo.masked(fo.chain(a, b), True), fo.masked(fo.chain(c, d, e, f), lambda path, p: True)
    ),
    "one label": lambda a, b, c, d, e, f: fo.chain(
        fo.partition({"x": fo.chain(a, b, c), "y": fo.scale(7.0)}, "x"), d, e, f
    ),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_nesting_changes_the_state_not_the_numbers(nesting: str, donate: bool) -> None:
    params = make_tree(0)
    grads = [like(params, seed) for seed in range(STEPS)]
    expected, _ = train(fo.chain(*members()), params, grads)

    params, _ = train(NESTINGS[nesting](*members()), clone(params), grads, donate=donate)

    torch.testing.assert_close(params, expected, **DOUBLE)


def test_the_state_is_nested_as_the_chain_is() -> None:
    params = make_tree(0)
    inner = fo.named_chain(("momentum", fo.trace(0.9)), ("nothing", fo.identity()), ("lr", fo.scale(-1.0)))
    tx = fo.chain(fo.masked(fo.scale_by_adam(), is_matrix), fo.partition({"p": inner}, "p"), Halve())

    for state in (tx.init(params), tx.update(params, tx.init(params), params)[1]):
        adam, labels, foreign = state
        assert isinstance(adam, fo.MaskedState)
        assert isinstance(labels, fo.PartitionState)
        assert foreign == ()
        assert adam.inner_state._fields == ("count", "mu", "nu")
        assert {k: type(x) for k, x in adam.inner_state.mu.items()} == {
            "weight": torch.Tensor,
            "bias": fo.MaskedNode,
            "scale": fo.MaskedNode,
        }
        assert list(labels.inner_states["p"].inner_state) == ["momentum", "nothing", "lr"]
        assert labels.inner_states["p"].inner_state["nothing"] == ()


@pytest.mark.parametrize("missing", ["weight", "bias"])
@pytest.mark.parametrize("way", ["masked", "partition"])
def test_a_leaf_that_is_not_seen_is_masked_whether_it_has_a_gradient_or_not(way: str, missing: str) -> None:
    """And one that is seen and has none is None."""
    given: list[dict[str, Any]] = []

    def watch(updates: Any, params: Any) -> Any:
        given.append(updates)
        assert {k: type(x) for k, x in params.items()} == {
            k: torch.Tensor if is_matrix(k, p) else fo.MaskedNode for k, p in make_tree(0).items()
        }
        return updates

    inner = fo.stateless(watch)
    ways = {
        "masked": fo.masked(inner, is_matrix),
        "partition": fo.partition({True: inner, False: fo.scale(2.0)}, is_matrix),
    }
    params, tx = make_tree(0), fo.chain(ways[way], fo.scale(-1.0))
    grads: dict[str, Any] = {**make_tree(1), missing: None}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert {k: u is None for k, u in updates.items()} == {k: g is None for k, g in grads.items()}
    expected = {k: type(g) if is_matrix(k, params[k]) else fo.MaskedNode for k, g in grads.items()}
    assert [{k: type(x) for k, x in tree.items()} for tree in given] == [expected]


def test_an_optimizer_from_elsewhere_is_taken_as_it_is() -> None:
    params, grads = make_tree(0), make_tree(1)

    new, _ = fo.apply_gradients(Halve(), params, grads, Halve().init(params))

    torch.testing.assert_close(new, {k: p + grads[k] / 2 for k, p in params.items()})


NO_TRANSFORMATIONS: dict[str, Callable[[], Any]] = {
    "class in chain": lambda: fo.chain(fo.scale(1.0), Halve),
    "optimizer in chain": lambda: fo.chain(fo.adam),
    "rule in chain": lambda: fo.chain(fo.scale_by_adam),
    "rule in named_chain": lambda: fo.named_chain(("adam", fo.scale_by_adam)),
    "class in masked": lambda: fo.masked(Halve, True),
    "class in partition": lambda: fo.partition({"a": Halve}, "a"),
    "apply_gradients": lambda: fo.apply_gradients(fo.adam, {}, {}, ()),  # type: ignore[arg-type]
    "explain": lambda: fo.explain(fo.adam, {}),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", NO_TRANSFORMATIONS)
def test_combinators_refuse_a_factory_that_was_not_called(name: str) -> None:
    with pytest.raises(TypeError, match=r"expected a gradient transformation.*did you forget to call it"):
        NO_TRANSFORMATIONS[name]()


@pytest.mark.parametrize("x", [3, None, [fo.scale(1.0)], (fo.scale(1.0), fo.scale(2.0)), "adam"])
def test_chain_refuses_other_objects(x: Any) -> None:
    with pytest.raises(TypeError, match=rf"expected a gradient transformation.*got {re.escape(repr(x)[:20])}"):
        fo.chain(x)


def test_named_chain_refuses_a_duplicate_name() -> None:
    with pytest.raises(ValueError, match="the name 'a' twice"):
        fo.named_chain(("a", fo.scale(1.0)), ("b", fo.scale(1.0)), ("a", fo.scale(1.0)))


def test_stateless_gets_the_whole_trees() -> None:
    params, grads = make_tree(0), make_tree(1)
    tx = fo.chain(
        fo.scale(2.0),
        fo.stateless(lambda updates, params: {k: u.sum() * params[k] for k, u in updates.items()}),
        fo.scale(0.5),
    )

    updates, state = tx.update(grads, tx.init(params), params)

    torch.testing.assert_close(updates, {k: g.sum() * params[k] for k, g in grads.items()}, **DOUBLE)
    assert state[1] == fo.EmptyState()


@pytest.mark.parametrize("mask", [True, is_matrix])
def test_stateless_with_tree_map_gets_each_leaf(mask: Any) -> None:
    params, grads = make_tree(0), {**make_tree(1), "bias": None}
    tx = fo.masked(fo.stateless_with_tree_map(lambda u, p: u.flip(0) * p if u.ndim else u * p), mask)

    updates, _ = tx.update(grads, tx.init(params), params)

    seen = {
        "weight": grads["weight"].flip(0) * params["weight"],
        "bias": None,
        "scale": grads["scale"] * params["scale"],
    }
    torch.testing.assert_close(updates, seen if mask is True else {**seen, "scale": grads["scale"]})


def test_stateless_without_params() -> None:
    tx = fo.stateless_with_tree_map(lambda u, p: -u if p is None else u)

    updates, _ = tx.update([torch.ones(2), None], tx.init([torch.ones(2), None]))

    torch.testing.assert_close(updates, [-torch.ones(2), None])
