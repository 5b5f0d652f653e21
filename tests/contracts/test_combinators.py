"""Combinators: what a combination computes, which leaves it sees, and what it passes on."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optree
import pytest
import torch

import functional_optim as fo
from _lib.chains import Halve, TimesValue, is_matrix, scale_by_value
from _lib.compare import DOUBLE, Snapshot, assert_same_bits
from _lib.training import train, trajectory
from _lib.trees import clone, leaves, like, make_tree


STEPS = 20


def to_jax(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x.numpy()), tree)


def to_torch(tree: Any) -> Any:
    return jax.tree.map(lambda x: torch.from_numpy(np.array(x)), tree)


def train_optax(tx: Any, params: Any, grads: list[Any]) -> Any:
    """The parameters of each step, by optax."""
    params = to_jax(params)
    state, trajectory = tx.init(params), []
    for g in map(to_jax, grads):
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(to_torch(params))
    return trajectory


def double(x: float) -> Any:
    """A hyper-parameter that keeps optax's formulas in double precision."""
    return jnp.asarray(x, jnp.float64)


# --- chain, named_chain and the small ones


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


# --- masks and labels


class Forms(NamedTuple):
    """Ways to say which leaves of `make_tree` are meant: those named in `matched`."""

    matched: tuple[str, ...]
    mask: Any


def labels_of(mask: dict[str, bool]) -> dict[str, str]:
    return {k: "yes" if m else "no" for k, m in mask.items()}


def nested(tree: dict[str, Any]) -> dict[str, Any]:
    """`make_tree`'s leaves in a tree with paths such as "body.0.weight"."""
    return {"body": [{"weight": tree["weight"], "bias": tree["bias"]}], "scale": tree["scale"]}


MASKS = {
    "tree": Forms(("weight",), {"body": [{"weight": True, "bias": False}], "scale": False}),
    "prefix": Forms(("weight", "bias"), {"body": True, "scale": False}),
    "deeper prefix": Forms(("weight", "bias"), {"body": [True], "scale": False}),
    "true": Forms(("weight", "bias", "scale"), True),
    "0-d tensors": Forms(
        ("weight",), {"body": [{"weight": torch.tensor(True), "bias": torch.tensor(False)}], "scale": 0}
    ),
    "function of path and parameter": Forms(("weight",), lambda path, p: path.endswith("weight") and p.ndim == 2),
    "function of path": Forms(("scale",), lambda path, p: path == "scale"),
    "function of the tree": Forms(("weight",), lambda tree: optree.tree_map(lambda p: p.ndim > 1, tree)),
    "function to a prefix": Forms(("scale",), lambda tree: {"body": False, "scale": True}),
    "regular expression": Forms(("bias",), re.compile(r"\.bias$")),
    "regular expression, anchored": Forms(("weight", "bias"), re.compile(r"^body\.0\.")),
    "regular expression as text": Forms(("weight", "scale"), "weight|scale"),
    "mapping of regular expressions": Forms(("weight", "scale"), {re.compile("bias"): False, re.compile(""): True}),
}


@pytest.mark.parametrize("name", MASKS)
def test_forms_of_masks(name: str) -> None:
    matched, mask = MASKS[name]
    params, grads = make_tree(0), make_tree(1)
    tx = fo.masked(fo.scale(-2.0), mask)

    updates, _ = tx.update(nested(grads), tx.init(nested(params)), nested(params))

    torch.testing.assert_close(updates, nested({k: -2 * g if k in matched else g for k, g in grads.items()}))


LABELS: dict[str, Forms] = {
    "tree": Forms(("weight",), {"body": [{"weight": "yes", "bias": "no"}], "scale": "no"}),
    "prefix": Forms(("weight", "bias"), {"body": "yes", "scale": "no"}),
    "one label": Forms(("weight", "bias", "scale"), "yes"),
    "function of path and parameter": Forms(("weight",), lambda path, p: "yes" if p.ndim == 2 else "no"),
    "function of the tree": Forms(("weight",), lambda t: optree.tree_map(lambda p: "yes" if p.ndim > 1 else "no", t)),
    "function to a prefix": Forms(("scale",), lambda tree: {"body": "no", "scale": "yes"}),
    "mapping of regular expressions": Forms(("weight", "scale"), {re.compile("bias"): "no", re.compile(""): "yes"}),
    "the first expression counts": Forms(
        ("bias",), {re.compile("body.*b"): "yes", re.compile("body"): "no", re.compile("s"): "no"}
    ),
}


@pytest.mark.parametrize("combine", [fo.partition, fo.multi_transform])
@pytest.mark.parametrize("name", LABELS)
def test_forms_of_labels(name: str, combine: Any) -> None:
    matched, labels = LABELS[name]
    params, grads = make_tree(0), make_tree(1)
    tx = combine({"yes": fo.scale(-2.0), "no": fo.set_to_zero(), "unused": fo.adam(1.0)}, labels)

    updates, _ = tx.update(nested(grads), tx.init(nested(params)), nested(params))

    torch.testing.assert_close(updates, nested({k: g * (-2 if k in matched else 0) for k, g in grads.items()}))


@pytest.mark.parametrize("label", [1, ("a", 1), None, True], ids=repr)
def test_labels_are_anything_hashable(label: Any) -> None:
    tx = fo.partition({label: fo.scale(2.0)}, lambda path, p: label)

    updates, state = tx.update([torch.ones(2)], tx.init([torch.ones(2)]), [torch.ones(2)])

    torch.testing.assert_close(updates, [torch.full((2,), 2.0)])
    assert list(state.inner_states) == [label]


def forms_of(choose: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Functions that choose alike: one asked about each leaf, one about the tree, and an object that is called."""

    class Chooser:
        def __call__(self, path: str, p: Any) -> Any:
            return choose(path, p)

    return {
        "path": lambda path, p: choose(path, p),
        "tree": lambda tree: {k: choose(k, p) for k, p in tree.items()},
        "object": Chooser(),
    }


FORMS = ("path", "tree", "object")
COMBINED: dict[str, Callable[[Any, Any], Any]] = {
    "masked": lambda tx, mask: fo.masked(tx, mask),
    "partition": lambda tx, mask: fo.partition({False: fo.identity(), True: tx}, mask),
    "in a chain": lambda tx, mask: fo.chain(fo.identity(), fo.named_chain(("inner", fo.masked(tx, mask)))),
    "masked twice": lambda tx, mask: fo.masked(fo.masked(tx, mask), True),
    "in a partition": lambda tx, mask: fo.partition({"all": fo.masked(tx, mask)}, "all"),
    "beside an opaque one": lambda tx, mask: fo.chain(
        fo.stateless(lambda updates, params: updates), fo.masked(tx, mask)
    ),
}


class Looks(NamedTuple):
    """Something that a mask may look at.

    Args:
      choose: says for a leaf whether it is matched.
      prepare: makes it say so of the leaves with some names, among new tensors.
    """

    choose: Callable[[str, Any], bool]
    prepare: Callable[[dict[str, torch.Tensor], set[str]], None]


chosen: set[Any] = set()  # names or identities, as a closure or a global variable holds them


def choose_by_attribute(params: dict[str, Any], matched: set[str]) -> None:
    for k, p in params.items():
        p.is_matched = k in matched


LOOKS = {
    "values": Looks(
        lambda path, p: bool((p > 100).all()), lambda params, matched: [params[k].add_(1000.0) for k in matched]
    ),
    "requires_grad": Looks(
        lambda path, p: p.requires_grad, lambda params, matched: [params[k].requires_grad_() for k in matched]
    ),
    "attributes": Looks(lambda path, p: p.is_matched, choose_by_attribute),
    "identity": Looks(
        lambda path, p: id(p) in chosen, lambda params, matched: chosen.update(id(params[k]) for k in matched)
    ),
    "a closure": Looks(lambda path, p: path in chosen, lambda params, matched: chosen.update(matched)),
}  # fmt: skip
ANSWERS: list[set[str]] = [{"weight"}, {"bias"}, set(), {"weight", "bias", "scale"}, {"weight"}]


@pytest.mark.filterwarnings("ignore:the mask")  # one of the answers matches nothing, which is worth a warning
@pytest.mark.parametrize("api", ["update", "apply_gradients", "donate"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("combination", COMBINED)
@pytest.mark.parametrize("look", LOOKS)
def test_masks_that_look_at_more_than_the_structure(look: str, combination: str, form: str, api: str) -> None:
    """A transformation that has been used answers for new trees of one structure as one that has not."""
    looks = LOOKS[look]
    tx = COMBINED[combination](fo.chain(fo.trace(0.5), fo.scale(-2.0)), forms_of(looks.choose)[form])
    for matched in ANSWERS:
        chosen.clear()
        params, grads = make_tree(0), [make_tree(1), make_tree(2)]
        looks.prepare(params, matched)
        # two steps of momentum: -2 g1, then -2 (g1 / 2 + g2)
        first, second = ({k: -2 * g if k in matched else g for k, g in own.items()} for own in grads)
        second = {k: u - grads[0][k] if k in matched else u for k, u in second.items()}
        before = clone(params)
        with torch.no_grad():
            state = tx.init(params)
            if api == "update":
                updates, state = tx.update(grads[0], state, params)
                torch.testing.assert_close(updates, first, **DOUBLE)
                updates, _ = tx.update(grads[1], state, params)
                torch.testing.assert_close(updates, second, **DOUBLE)
            else:
                new, _ = fo.apply_gradients(tx, params, grads[0], state, donate=api == "donate")
                torch.testing.assert_close(new, {k: before[k] + first[k] for k in new}, **DOUBLE)


@pytest.mark.parametrize("form", FORMS)
def test_labels_that_look_at_more_than_the_structure(form: str) -> None:
    """Each label has a rate of its own; the answers leave some out, swap them, and give one to all."""
    rates = {"a": -1.0, "b": -10.0, "c": -100.0, "d": -1000.0}
    labels: dict[str, str] = {}
    # "d" is the same rule as "a" with another number, "c" another rule
    txs = {k: fo.chain(fo.identity(), fo.scale(rate)) for k, rate in rates.items()}
    txs["c"] = fo.chain(fo.trace(0.0), fo.scale(rates["c"]))
    tx = fo.partition(txs, forms_of(lambda path, p: labels[path])[form])
    params, grads = make_tree(0), make_tree(1)

    for answer in ("aab", "bba", "abc", "cab", "aaa", "bbb", "ddd", "ccc", "aaa", "dda", "aad", "abb"):
        labels.update(zip(params, answer, strict=True))
        updates, _ = tx.update(grads, tx.init(params), params)

        torch.testing.assert_close(updates, {k: g * rates[labels[k]] for k, g in grads.items()}, **DOUBLE)


@pytest.mark.filterwarnings("ignore:the mask")  # it matches nothing at first
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("donate", [False, True])
def test_a_mask_that_follows_values_from_step_to_step(form: str, donate: bool) -> None:
    """A leaf stands still from the step on that brings its sum below zero."""
    mask = forms_of(lambda path, p: bool(p.sum() < 0))[form]
    tx = fo.chain(fo.sgd(0.1), fo.masked(fo.set_to_zero(), mask))
    params = {k: p.abs() + k_th for k_th, (k, p) in enumerate(make_tree(0).items())}
    grads = [{k: g.abs() for k, g in like(params, seed).items()} for seed in range(STEPS)]
    expected, frozen_at = clone(params), dict.fromkeys(params, STEPS)
    for step, g in enumerate(grads):
        for k, p in expected.items():
            if p.sum() < 0:
                frozen_at[k] = min(frozen_at[k], step)
            else:
                expected[k] = p - 0.1 * g[k]

    new, _ = train(tx, params, grads, donate=donate)

    assert len(set(frozen_at.values())) > 1, frozen_at  # the steps tell leaves apart
    torch.testing.assert_close(new, expected, **DOUBLE)


@pytest.mark.parametrize("form", FORMS)
def test_a_state_that_was_made_for_fewer_leaves(form: str) -> None:
    """It has nothing for a leaf that is matched later, which is refused; the state is good for the old answer."""
    matched = {"weight"}
    mask = forms_of(lambda path, p: path in matched)[form]
    tx, params, grads = fo.masked(fo.trace(0.5), mask), make_tree(0), make_tree(1)
    _, state = tx.update(grads, tx.init(params), params)
    matched.add("bias")

    with pytest.raises((TypeError, ValueError), match=r"trace.* at 'bias'"):
        tx.update(grads, state, params)

    matched.remove("bias")
    updates, _ = tx.update(grads, state, params)
    torch.testing.assert_close(updates, {k: g * (1.5 if k == "weight" else 1) for k, g in grads.items()}, **DOUBLE)


YES, NO = re.compile("weight"), re.compile("")
# Masks and labels that are trees, and how their owner changes them afterwards.
TREES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "a dict": (lambda: {"body": [{"weight": True, "bias": False}], "scale": False}, lambda m: m.update(scale=True)),
    "a dict within": (
        lambda: {"body": [{"weight": True, "bias": False}], "scale": False},
        lambda m: m["body"][0].update(weight=False, bias=True),
    ),
    "a list within": (
        lambda: {"body": [{"weight": True, "bias": False}], "scale": False}, lambda m: m["body"].append(True)
    ),
    "emptied": (lambda: {"body": [{"weight": True, "bias": False}], "scale": False}, lambda m: m.clear()),
    "a prefix": (lambda: {"body": [{"weight": True, "bias": False}], "scale": False}, lambda m: m.update(body=False)),
    "regular expressions": (lambda: {YES: True, NO: False}, lambda m: m.update({YES: False})),
    "regular expressions, emptied": (lambda: {YES: True, NO: False}, lambda m: m.clear()),
    "tensors": (
        lambda: {"body": [{"weight": torch.tensor(True), "bias": torch.tensor(False)}], "scale": torch.tensor(False)},
        lambda m: [m["body"][0]["weight"].fill_(False), m["scale"].fill_(True)],
    ),
    "arrays": (
        lambda: {"body": [{"weight": np.array(True), "bias": np.array(False)}], "scale": np.array(False)},
        lambda m: [m["body"][0]["weight"].fill(False), m["scale"].fill(True)],
    ),
}  # fmt: skip


# labels are hashable, which numbers in memory by value are not
TREES_IN = [(name, c) for name in TREES for c in COMBINED if name not in ("tensors", "arrays") or c != "partition"]


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize(("name", "combination"), TREES_IN)
def test_trees_that_change_after_a_transformation_is_made(name: str, combination: str, used: bool) -> None:
    make, change = TREES[name]
    tree = make()
    tx = COMBINED[combination](fo.chain(fo.trace(0.5), fo.scale(-2.0)), tree)
    params, grads = nested(make_tree(0)), nested(make_tree(1))
    if used:
        tx.update(grads, tx.init(params), params)

    change(tree)

    expected = nested({k: -2 * g if k == "weight" else g for k, g in make_tree(1).items()})
    for missing in ({}, {"scale": None}):  # leaves that it has been bound to, and others
        updates, _ = tx.update({**grads, **missing}, tx.init(params), params)
        torch.testing.assert_close(updates, {**expected, **missing}, **DOUBLE)


def test_equal_transformations_of_a_tree_that_changed_between() -> None:
    """They do not share what one of them was bound to."""
    frozen = {"a": True, "b": False}
    ones = {"a": torch.ones(1), "b": torch.ones(1)}
    first, new = fo.chain(fo.masked(fo.set_to_zero(), frozen), fo.sgd(1.0)), []
    for flip in (False, True, False):
        frozen.update(a=not flip, b=flip)
        tx = fo.chain(fo.masked(fo.set_to_zero(), frozen), fo.sgd(1.0))
        new.append([x.item() for x in fo.apply_gradients(tx, ones, ones, tx.init(ones))[0].values()])
        new.append([x.item() for x in fo.apply_gradients(first, ones, ones, first.init(ones))[0].values()])

    assert new == [[1, 0], [1, 0], [0, 1], [1, 0], [1, 0], [1, 0]]


def test_transformations_of_a_partition_that_change_afterwards() -> None:
    txs, params, grads = {"a": fo.scale(-1.0)}, make_tree(0), make_tree(1)
    tx = fo.partition(txs, "a")

    txs.update(a=fo.scale(5.0))

    updates, _ = tx.update(grads, tx.init(params), params)
    torch.testing.assert_close(updates, {k: -g for k, g in grads.items()})


def test_a_function_that_wants_no_absent_parameter() -> None:
    """A mask by path and parameter is not asked about what is None."""
    tx = fo.masked(fo.scale(2.0), lambda path, p: p.ndim > 0)
    params = {"a": torch.ones(2), "b": None}

    updates, _ = tx.update(params, tx.init(params), params)

    torch.testing.assert_close(updates, {"a": torch.full((2,), 2.0), "b": None})


def one(name: str) -> dict[str, bool]:
    """The mask of one leaf of `make_tree`."""
    return {k: k == name for k in make_tree(0)}


# A leaf of one rule may have more reductions behind it than a leaf of another when both meet in the same global norm.
SCOPES: dict[str, tuple[Any, Any]] = {
    "clip one, then all": (
        lambda: fo.chain(fo.masked(fo.clip_by_global_norm(0.1), one("weight")), fo.clip_by_global_norm(0.2)),
        lambda: optax.chain(
            optax.masked(optax.clip_by_global_norm(0.1), one("weight")), optax.clip_by_global_norm(0.2)
        ),
    ),
    "clip another, then all": (
        lambda: fo.chain(fo.masked(fo.clip_by_global_norm(0.1), one("bias")), fo.clip_by_global_norm(0.2)),
        lambda: optax.chain(optax.masked(optax.clip_by_global_norm(0.1), one("bias")), optax.clip_by_global_norm(0.2)),
    ),
    "trust ratio of one, then clip": (
        lambda: fo.chain(fo.masked(fo.scale_by_trust_ratio(), one("weight")), fo.clip_by_global_norm(0.2)),
        lambda: optax.chain(optax.masked(optax.scale_by_trust_ratio(), one("weight")), optax.clip_by_global_norm(0.2)),
    ),
    "trust ratio of another, then clip": (
        lambda: fo.chain(fo.masked(fo.scale_by_trust_ratio(), one("bias")), fo.clip_by_global_norm(0.2)),
        lambda: optax.chain(optax.masked(optax.scale_by_trust_ratio(), one("bias")), optax.clip_by_global_norm(0.2)),
    ),
    "masked": (
        lambda: fo.masked(fo.clip_by_global_norm(0.5), {"weight": True, "bias": True, "scale": False}),
        lambda: optax.masked(optax.clip_by_global_norm(0.5), {"weight": True, "bias": True, "scale": False}),
    ),
    "clip per label": (
        lambda: fo.partition(
            {"a": fo.chain(fo.clip_by_global_norm(0.3), fo.sgd(0.1, 0.9)), "b": fo.clip_by_global_norm(0.7)},
            {"weight": "a", "bias": "b", "scale": "b"},
        ),
        lambda: optax.partition(
            {
                "a": optax.chain(optax.clip_by_global_norm(0.3), optax.sgd(0.1, 0.9)),
                "b": optax.clip_by_global_norm(0.7),
            },
            {"weight": "a", "bias": "b", "scale": "b"},
        ),
    ),
    "clip all, then per label": (
        lambda: fo.chain(
            fo.clip_by_global_norm(1.0),
            fo.partition(
                {"a": fo.chain(fo.scale(3.0), fo.clip_by_global_norm(0.3)), "b": fo.scale_by_sign()},
                {"weight": "a", "bias": "b", "scale": "a"},
            ),
            fo.clip_by_global_norm(0.2),
        ),
        lambda: optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.partition(
                {
                    "a": optax.chain(optax.scale(3.0), optax.clip_by_global_norm(0.3)),
                    "b": optax.scale_by_sign(),
                },
                {"weight": "a", "bias": "b", "scale": "a"},
            ),
            optax.clip_by_global_norm(0.2),
        ),
    ),
    "masks within masks": (
        lambda: fo.masked(
            fo.chain(
                fo.clip_by_global_norm(0.5),
                fo.masked(
                    fo.chain(fo.clip_by_global_norm(0.1), fo.trace(0.9)), {"weight": True, "bias": False, "scale": True}
                ),
            ),
            {"weight": True, "bias": True, "scale": False},
        ),
        # the intersection, written out, because optax's inner mask is given trees with holes
        lambda: optax.chain(
            optax.masked(optax.clip_by_global_norm(0.5), {"weight": True, "bias": True, "scale": False}),
            optax.masked(
                optax.chain(optax.clip_by_global_norm(0.1), optax.trace(0.9)),
                {"weight": True, "bias": False, "scale": False},
            ),
        ),
    ),
    "a partition within a mask": (
        lambda: fo.masked(
            fo.partition(
                {"a": fo.adam(0.1), "b": fo.chain(fo.clip_by_global_norm(0.3), fo.scale(-1.0))},
                {"weight": "a", "bias": "b", "scale": "b"},
            ),
            {"weight": True, "bias": True, "scale": False},
        ),
        lambda: optax.partition(
            {
                "a": optax.adam(double(0.1), double(0.9), double(0.999)),
                "b": optax.chain(optax.clip_by_global_norm(0.3), optax.scale(-1.0)),
                "pass": optax.identity(),
            },
            {"weight": "a", "bias": "b", "scale": "pass"},
        ),
    ),
    "partitions within a partition": (
        lambda: fo.partition(
            {
                "outer": fo.partition(
                    {"a": fo.trace(0.5), "b": fo.clip_by_global_norm(0.1)}, {"weight": "a", "bias": "b", "scale": "a"}
                ),
                "other": fo.scale(-0.5),
            },
            {"weight": "outer", "bias": "outer", "scale": "other"},
        ),
        lambda: optax.partition(
            {"a": optax.trace(0.5), "b": optax.clip_by_global_norm(0.1), "other": optax.scale(-0.5)},
            {"weight": "a", "bias": "b", "scale": "other"},
        ),
    ),
}


@pytest.mark.parametrize("backend", ["reference", "c"])
@pytest.mark.parametrize("name", SCOPES)
def test_scopes_against_optax(name: str, backend: str) -> None:
    ours, theirs = SCOPES[name]
    params = make_tree(0)
    grads = [like(params, seed) for seed in range(1, STEPS + 1)]
    expected = train_optax(theirs(), params, grads)

    with fo.use_backend(backend):
        actual = trajectory(ours(), params, grads)

    torch.testing.assert_close(actual, expected, **DOUBLE)


def test_masked_leaves_have_no_state() -> None:
    params = make_tree(0)
    tx = fo.masked(fo.masked(fo.scale_by_adam(), "weight|scale"), "weight|bias")

    state = tx.init(params)

    tensors = [x for x in leaves(state) if isinstance(x, torch.Tensor)]
    assert sum(x.numel() for x in tensors) == 1 + 2 * params["weight"].numel()


# signs cancel, and the norm in between does not see them
OPAQUE: dict[str, Callable[[Any], Any]] = {
    "chain": lambda tx: fo.chain(fo.scale(-1.0), tx, fo.scale(-6.0)),
    "masked": lambda tx: fo.masked(
        fo.chain(fo.scale(-1.0), tx, fo.scale(-6.0)), {"weight": True, "bias": True, "scale": False}
    ),
    "partition": lambda tx: fo.partition(
        {"a": fo.chain(fo.scale(-1.0), tx, fo.scale(-6.0)), "b": fo.identity()},
        {"weight": "a", "bias": "a", "scale": "b"},
    ),
    "partition in masked": lambda tx: fo.masked(
        fo.partition({"a": fo.chain(tx, fo.scale(6.0))}, "a"), re.compile("weight|bias")
    ),
    "alone in masked": lambda tx: fo.chain(
        fo.masked(tx, lambda path, p: path != "scale"),
        fo.partition({1: fo.scale(6.0), 2: fo.identity()}, {"weight": 1, "bias": 1, "scale": 2}),
    ),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", OPAQUE)
def test_opaque_members_see_the_leaves_of_their_scope(name: str, donate: bool) -> None:
    """A matrix method stands for those that no kernel is made of: it needs the other leaves of its scope."""
    norms: list[torch.Tensor] = []

    def update(updates: Any, state: int, params: Any = None) -> tuple[Any, int]:
        present = [u for u in leaves(updates) if u is not None]
        norms.append(torch.stack([u.square().sum() for u in present]).sum().sqrt())
        return optree.tree_map(lambda u: u / norms[-1], updates), state + 1

    params, grads = make_tree(0), [make_tree(seed) for seed in range(1, STEPS + 1)]
    tx = OPAQUE[name](fo.GradientTransformation(lambda params: 0, update))
    expected = clone(params)
    for g in grads:
        scoped = ["weight", "bias"] if name != "chain" else list(g)
        norm = torch.stack([g[k].square().sum() for k in scoped]).sum().sqrt()
        expected = {k: p + (6 * g[k] / norm if k in scoped else g[k]) for k, p in expected.items()}

    new, state = train(tx, params, grads, donate=donate)

    torch.testing.assert_close(new, expected, **DOUBLE)
    assert STEPS in [x for x in leaves(state) if isinstance(x, int)]


# --- extra arguments


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

    with pytest.raises(TypeError, match=r"scale_by_value needs the extra argument `value`"):
        tx.update(params, tx.init(params), params, grad=params)
