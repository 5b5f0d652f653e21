"""Masks and labels: their forms, what they look at, and the leaves that they choose."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import optree
import pytest
import torch

import functional_optim as fo
from _lib.compare import DOUBLE
from _lib.training import train
from _lib.trees import clone, like, make_tree


STEPS = 20


class Forms(NamedTuple):
    """Ways to say which leaves of `make_tree` are meant: those named in `matched`."""

    matched: tuple[str, ...]
    mask: Any


def nested(tree: dict[str, Any]) -> dict[str, Any]:
    """`make_tree`'s leaves in a tree with paths such as "body.0.weight"."""
    return {"body": [{"weight": tree["weight"], "bias": tree["bias"]}], "scale": tree["scale"]}


MASKS = {
    "tree": Forms(("weight",), {"body": [{"weight": True, "bias": False}], "scale": False}),
    "prefix": Forms(("weight", "bias"), {"body": True, "scale": False}),
    "deeper prefix": Forms(("weight", "bias"), {"body": [True], "scale": False}),
    "true": Forms(("weight", "bias", "scale"), True),
    "0-d tensors": Forms(
        ("weight",), {"body": [{"weight": torch.tensor(True), "bias": torch.tensor(False)}], "scale": np.False_}
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
