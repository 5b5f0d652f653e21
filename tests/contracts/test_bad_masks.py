"""Masks and labels that are refused, or warned of."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.compare import Snapshot
from _lib.trees import make_tree, zeros


def test_mask_without_a_match_warns() -> None:
    params = {"layer": {"weight": zeros(2), "bias": zeros(2)}}
    tx = fo.chain(fo.masked(fo.trace(0.9), re.compile("wieght")), fo.scale(-1.0))

    text = r"the mask re\.compile\('wieght'\) of trace\(decay=0\.9\) matches no parameter; there are layer\.bias"
    with pytest.warns(UserWarning, match=text):
        state = tx.init(params)

    new, _ = fo.apply_gradients(tx, params, {"layer": {"weight": torch.ones(2), "bias": torch.ones(2)}}, state)
    torch.testing.assert_close(new, {"layer": {"weight": -torch.ones(2), "bias": -torch.ones(2)}})


def test_label_pattern_without_a_match_warns() -> None:
    params = {"weight": zeros(2), "bias": zeros(2)}
    labels = {re.compile("wieght"): "a", re.compile("e"): "a", re.compile(""): "b"}
    tx = fo.partition({"a": fo.sgd(0.1), "b": fo.scale(-1.0)}, labels)

    with pytest.warns(UserWarning, match=r"the pattern 'wieght' of partition is found in no parameter's path; there"):
        tx.init(params)


def test_a_mask_function_of_the_wrong_arguments() -> None:
    tx = fo.adamw(0.1, mask=lambda p: p.ndim > 1)

    with pytest.raises(AttributeError) as caught:
        tx.init({"weight": zeros(2)})

    (note,) = caught.value.__notes__
    assert note.startswith("the mask of add_decayed_weights(")
    assert "takes two: the path and the parameter" in note


def test_a_module_instead_of_its_parameters() -> None:
    module = torch.nn.Linear(2, 2)

    with pytest.raises(TypeError, match=r"params is Linear, a module; pass `dict\(module.named_parameters\(\)\)`"):
        fo.sgd(0.1).init(module)
    with pytest.raises(TypeError, match=r"params is generator .*, expected a tensor or a tree of a known kind: a dict"):
        fo.sgd(0.1).init(module.parameters())


def test_mask_over_an_empty_tree_does_not_warn() -> None:
    """A label that no leaf has, and a tree without leaves, leave a mask within nothing to match."""
    tx = fo.partition({"a": fo.masked(fo.trace(0.9), re.compile("x")), "b": fo.identity()}, "b")

    tx.init({"w": zeros(2)})
    fo.masked(fo.trace(0.9), True).init({})


MASKS: dict[str, tuple[Any, type[Exception], str]] = {
    "label without transformation": (
        fo.partition({"a": fo.scale(1.0)}, {"weight": "a", "bias": "b", "scale": "a"}),
        ValueError,
        r"the parameter at 'bias' has the label 'b', which has no transformation; there are 'a'",
    ),
    "label from a function": (
        fo.partition({"a": fo.scale(1.0)}, lambda path, p: path),
        ValueError,
        r"has the label '(bias|weight|scale)', which has no transformation",
    ),
    "no expression matches": (
        fo.partition({"a": fo.scale(1.0)}, {re.compile("weight"): "a"}),
        ValueError,
        r"the parameter at 'bias' has the label None, which has no",
    ),
    "label of a list": (
        fo.partition({"a": fo.scale(1.0)}, lambda path, p: ["a"]),
        ValueError,
        r"has the label \['a'\], which has no",
    ),
    "labels of another tree": (
        fo.partition({"a": fo.scale(1.0)}, {"weight": "a"}),
        ValueError,
        r"the labels of partition (is|are) neither like the parameters nor a prefix of them",
    ),
    "mask of another tree": (
        fo.masked(fo.scale(1.0), {"weight": True, "bias": True, "other": True}),
        ValueError,
        r"the mask of scale\(step_size=1\.0\) is neither like the parameters nor a prefix",
    ),
    "mask of a longer tree": (
        fo.masked(fo.scale(1.0), {"weight": [True], "bias": True, "scale": True}),
        ValueError,
        r"the mask of .* is .*",
    ),
    "mask of text": (
        fo.masked(fo.scale(1.0), lambda path, p: "yes"),
        ValueError,
        r"the mask of .* is 'yes' at '(bias|weight|scale)', expected True or False",
    ),
    "mask of None": (
        fo.masked(fo.scale(1.0), lambda path, p: None),
        ValueError,
        r"the mask of .* is None at .* expected True or False",
    ),
    "mask of numbers": (
        fo.masked(fo.scale(1.0), {"weight": 1, "bias": True, "scale": False}),
        ValueError,
        r"the mask of .* is 1 at 'weight', expected True or False",
    ),
    "mask of a tensor of a number": (
        fo.masked(fo.scale(1.0), lambda path, p: torch.tensor(1)),
        ValueError,
        r"the mask of .* is tensor\(1\) at .*, expected True or False",
    ),
    "mask of vectors": (
        fo.masked(fo.scale(1.0), lambda path, p: p > 0),
        ValueError,
        r"the mask of .* is tensor.* expected True or False",
    ),
    "mask by an incomplete mapping": (
        fo.masked(fo.scale(1.0), {re.compile("weight"): True}),
        ValueError,
        r"the mask of .* is None at 'bias', expected True or False",
    ),
}


MASK_CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "init": lambda tx, params: tx.init(params),
    "update": lambda tx, params: tx.update(params, fo.EmptyState(), params),
    "explain": fo.explain,
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("call", MASK_CALLS)
def test_bad_masks_and_labels(name: str, call: str) -> None:
    tx, error, message = MASKS[name]
    params = make_tree(0)
    before = Snapshot(params)

    with pytest.raises(error, match=message):
        MASK_CALLS[call](tx, params)

    before.check()
