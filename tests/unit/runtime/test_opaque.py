"""State of opaque transformations: entries of a parameter, entries of the tree, and both put together again."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import optree
import pytest
import torch
from hypothesis import (
    example,
    given,
    settings,
    strategies as st,
)

import functional_optim as fo
from functional_optim._opaque import SplitState
from functional_optim._transform import Link
from functional_optim._tree import MaskedNode, View
from functional_optim.adapters import TransformOptimizer


Params = Mapping[str, Any]


class Moments(NamedTuple):
    """A state of trees and a counter."""

    count: Any
    mu: Any
    nu: Any


class Pair(NamedTuple):
    """The state of one parameter."""

    first: Any
    second: Any


def only_seen(params: Params) -> dict[str, torch.Tensor]:
    """The parameters that a transformation sees."""
    return {k: p for k, p in params.items() if not isinstance(p, MaskedNode)}


def zeros(params: Params) -> dict[str, torch.Tensor]:
    return {k: torch.zeros_like(p) for k, p in only_seen(params).items()}


def with_masked(params: Params) -> dict[str, Any]:
    """A tree as `tree_map` makes it, in which masked parameters stay masked."""
    return {k: p if isinstance(p, MaskedNode) else torch.zeros_like(p) for k, p in params.items()}


class Form(NamedTuple):
    """A form of state.

    Args:
      init: makes the state.
      param: the paths of the entries of each parameter.
      tree: the paths of the entries of the tree.
    """

    init: Callable[[Params], Any]
    param: Sequence[str] = ()
    tree: Sequence[str] = ()


def moments(params: Params) -> Moments:
    return Moments(torch.zeros(()), zeros(params), zeros(params))


FORMS = {
    "nothing": Form(lambda params: ()),
    "an empty dict": Form(lambda params: {}),
    "None": Form(lambda params: None, tree=[""]),
    "a number": Form(lambda params: 0, tree=[""]),
    "a tensor": Form(lambda params: torch.zeros(()), tree=[""]),
    "a dict by name": Form(zeros, [""]),
    "masked parameters in the dict": Form(with_masked, [""]),
    "an ordered dict": Form(lambda params: OrderedDict(zeros(params)), [""]),
    "another order": Form(lambda params: dict(reversed(zeros(params).items())), [""]),
    "another order, ordered": Form(lambda params: OrderedDict(reversed(zeros(params).items())), [""]),
    "a list": Form(lambda params: list(zeros(params).values()), [""]),
    "a tuple": Form(lambda params: tuple(zeros(params).values()), [""]),
    "a list of tuples": Form(lambda params: [(x, 1.5) for x in zeros(params).values()], ["0", "1"]),
    "trees in a NamedTuple": Form(moments, ["mu", "nu"], ["count"]),
    "trees in a tuple": Form(lambda params: (zeros(params), zeros(params)), ["0", "1"]),
    "trees in a dict": Form(
        lambda params: {"mu": zeros(params), "count": 0, "inner": {"rate": 0.5, "nu": zeros(params)}},
        ["mu", "inner.nu"],
        ["count", "inner.rate"],
    ),
    "tuples of parameters": Form(lambda params: {k: (x, x + 1) for k, x in zeros(params).items()}, ["0", "1"]),
    "NamedTuples of parameters": Form(
        lambda params: {k: Pair(x, 2) for k, x in zeros(params).items()}, ["first", "second"]
    ),
    "dicts of parameters": Form(
        lambda params: {"all": {k: {"b": x, "a": {"c": x + 1}} for k, x in zeros(params).items()}},
        ["all.b", "all.a.c"],
    ),
    "None of parameters": Form(lambda params: {"mu": dict.fromkeys(zeros(params)), "n": 1}, ["mu"], ["n"]),
    "empty containers of parameters": Form(lambda params: {k: {} for k in zeros(params)}),
    "numbers of parameters": Form(lambda params: {"steps": dict.fromkeys(zeros(params), 0)}, ["steps"]),
    "the tree's alone": Form(
        lambda params: {"count": torch.zeros(()), "norms": [torch.zeros(3), {"rate": 0.1}]},
        tree=["count", "norms.0", "norms.1.rate"],
    ),
    "a tuple of as many as there may be parameters": Form(
        lambda params: {"bounds": (0.1, 0.2), "mu": zeros(params)}, ["mu"], ["bounds.0", "bounds.1"]
    ),
    "a counter among the parameters": Form(lambda params: {**zeros(params), "count": 0}, [""], ["count"]),
    "trees among the parameters": Form(
        lambda params: {**zeros(params), "more": {"nu": zeros(params), "rate": 0.5}}, ["", "more.nu"], ["more.rate"]
    ),
    "chained states": Form(
        lambda params: (moments(params), (), (zeros(params), 1)), ["0.mu", "0.nu", "2.0"], ["0.count", "2.1"]
    ),
}  # fmt: skip


NAMES: dict[str, Sequence[str]] = {
    "one": ["w"],
    "two": ["w", "b"],
    "many": ["z.weight", "a", "10", "2", "one"],
    "masked": ["w", "masked", "b"],
    "masked first": ["masked", "w"],
    "masked all": ["masked"],
}


def split_state(init: Callable[[Params], Any], names: Sequence[str]) -> SplitState:
    """The state of a transformation over parameters of different shapes, that called `masked` not seen."""
    tx = fo.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
    params = OrderedDict((name, torch.ones(k + 1)) for k, name in enumerate(names))
    return SplitState(Link(tx, (), tuple(name != "masked" for name in names)), "own", View.of(params))


def assert_same(a: Any, b: Any) -> None:
    """Asserts that trees have one structure, their dicts one order of keys, and equal leaves."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    elif isinstance(a, Mapping):
        assert set(a) == set(b)
        for k in a:
            assert_same(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def first_state(split: SplitState) -> Any:
    """The state of parameters that have no entries yet."""
    return split.gather({name: {} for name in split.view.spec.entries()})


def each(entries: Sequence[tuple[Sequence[str], str, Any]]) -> list[tuple[str, str, Any]]:
    """Entries, one for each parameter that holds them."""
    return [(name, key, x) for names, key, x in entries for name in names]


def put(states: dict[str, dict[str, Any]], entries: Sequence[tuple[Sequence[str], str, Any]]) -> None:
    """Puts entries into the dicts of parameters, as an optimizer does; no two have one place."""
    for name, key, x in each(entries):
        assert key not in states[name], (name, key)
        states[name][key] = x


def renumbered(state: Any) -> Any:
    """The same state with other numbers, no two of them equal."""
    count = iter(range(1, 1000))
    return optree.tree_map(lambda x: x + next(count), state, namespace="functional_optim")


@pytest.mark.parametrize("tree", [name for name in NAMES if name != "masked all"])
@pytest.mark.parametrize("form", FORMS)
def test_entries_of_parameters_and_of_the_tree(form: str, tree: str) -> None:
    names, case = NAMES[tree], FORMS[form]
    split = split_state(case.init, names)
    seen = [name for name in names if name != "masked"]
    of_params = {(name, path) for name in seen for path in case.param}
    assert set(split.keys) == of_params | {(None, path) for path in case.tree}


@pytest.mark.parametrize("tree", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_state_that_is_split_and_joined_is_the_same(form: str, tree: str) -> None:
    names = NAMES[tree]
    split = split_state(FORMS[form].init, names)
    params = OrderedDict((n, torch.ones(k + 1) if n != "masked" else MaskedNode()) for k, n in enumerate(names))
    state = renumbered(FORMS[form].init(params))
    assert_same(split.join(split.split(state)), state)


@pytest.mark.parametrize("tree", [name for name in NAMES if name != "masked all"])
@pytest.mark.parametrize("form", FORMS)
def test_state_in_the_dicts_of_parameters(form: str, tree: str) -> None:
    """`gather` finds all that `entries` puts into the dicts; keys begin with the prefix."""
    names = NAMES[tree]
    split = split_state(FORMS[form].init, names)
    params = OrderedDict((n, torch.ones(k + 1) if n != "masked" else MaskedNode()) for k, n in enumerate(names))
    state = renumbered(FORMS[form].init(params))
    states: dict[str, dict[str, Any]] = {name: {"step": 3} for name in names}
    put(states, split.entries(state, states, [n for n in names if n != "masked"]))
    assert_same(split.gather(states), state)
    assert {key.split(".")[0] for own in states.values() for key in own} <= {"step", "own", "own:tree"}
    assert states.get("masked", {"step": 3}) == {"step": 3}


def test_parameters_that_took_no_step_keep_their_entries() -> None:
    split = split_state(moments, ["w", "b"])
    new = renumbered(first_state(split))
    # an entry of the tree is with parameters that took the step, and with parameters that have it already
    places = {("b", "own.mu"), ("b", "own.nu"), ("b", "own:tree.count")}
    without: dict[str, dict[str, Any]] = {"w": {}, "b": {}}
    assert {(name, key) for name, key, _ in each(split.entries(new, without, ["b"]))} == places
    known = {"w": {"own:tree.count": torch.zeros(())}, "b": {}}
    assert {(name, key) for name, key, _ in each(split.entries(new, known, ["b"]))} == places | {
        ("w", "own:tree.count")
    }
    # or with the first, if the transformation sees none of them
    assert [(name, key) for name, key, _ in each(split.entries(new, without, []))] == [("w", "own:tree.count")]


def test_entries_that_are_nowhere_are_those_of_init() -> None:
    split = split_state(moments, ["w", "b"])
    state = split.gather({"w": {"own.mu": torch.full((1,), 5.0)}, "b": {}})
    nu = {"w": torch.zeros(1), "b": torch.zeros(2)}
    assert_same(state, Moments(torch.zeros(()), {**nu, "w": torch.full((1,), 5.0)}, nu))


@pytest.mark.parametrize("present", [["w", "b"], ["b"], []])
def test_entries_that_are_missing_and_made(present: list[str]) -> None:
    """An entry of a parameter that takes no step may be missing, one of the tree may not; made ones are not shared."""
    split = split_state(moments, ["w", "b"])
    states: dict[str, dict[str, Any]] = {"w": {"own.mu": torch.ones(1)}, "b": {}}
    lacking = {("w", "nu"), ("b", "mu"), ("b", "nu")}
    expected = {(None, "count")} | {(name, path) for name, path in lacking if name in present}
    missing = split.missing(states, present)
    assert set(missing) == expected
    first, second = split.make(missing, present), split.make(missing, present)
    holders = present or ["w"]
    for made in (first, second):
        assert {(name, key): x.tolist() for name, key, x in each(made)} == {
            (holder, f"own.{path}" if name else f"own:tree.{path}"): [0.0] * (1 + (name == "b")) if name else 0.0
            for name, path in expected
            for holder in ([name] if name else holders)
        }
    assert not {id(x) for *_, x in first} & {id(x) for *_, x in second}
    put(states, first)
    assert split.missing(states, present) == []


def test_entries_that_are_none_are_not_missing() -> None:
    split = split_state(FORMS["None of parameters"].init, ["w", "b"])
    assert split.missing({"w": {}, "b": {}}, ["w", "b"]) == [(None, "n")]


def test_entry_of_the_tree_is_found_with_any_parameter() -> None:
    """A parameter may have been added in front since the state was written."""
    split = split_state(moments, ["w", "b"])
    assert split.gather({"w": {}, "b": {"own:tree.count": torch.tensor(7.0)}}).count == 7


# -- refusals ---------------------------------------------------------------------------------------------------------


def growing(params: Params) -> Any:
    return {"sum": torch.zeros(sum(p.numel() for p in only_seen(params).values()))}


REFUSED: dict[str, tuple[Callable[[Params], Any], type[Exception], str]] = {
    "all parameters in one tensor": (
        growing, ValueError, r"at 'sum' is a tensor of shape \(3,\) that depends on the number of parameters"
    ),
    "two entries a parameter in one list": (
        lambda params: [x for x in zeros(params).values() for _ in range(2)], ValueError,
        "has 4 entries for 2 parameters, and 6 if there is one more",
    ),
    "pairs of parameters": (
        lambda params: {f"{a}/{b}": 0.0 for a in params for b in params}, ValueError,
        "has 4 entries for 2 parameters, and 9 if there is one more",
    ),
    "other names": (
        lambda params: {f"state of {k}": x for k, x in zeros(params).items()}, ValueError,
        "has 2 entries for 2 parameters, and 3 if there is one more",
    ),
    "another kind": (
        lambda params: {"x": 1.0 if len(params) == 2 else [1.0]}, ValueError,
        "at 'x' is of another kind if there is one more parameter",
    ),
    "a string": (lambda params: {"name": "adam"}, TypeError, r"holds 'adam' at 'name', expected tensors and numbers"),
    "a string of a parameter": (
        lambda params: {"kinds": dict.fromkeys(params, "matrix")}, TypeError, "holds 'matrix' at 'kinds'"
    ),
    "a set": (lambda params: {1.0, 2.0}, TypeError, "expected tensors and numbers"),
    "an object": (lambda params: object(), TypeError, "holds <object object"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_state_that_cannot_be_split_is_refused(name: str) -> None:
    init, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as caught:
        split_state(init, ["w", "b"])
    assert "GradientTransformation" in str(caught.value)


def test_masked_parameter_with_an_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="at 'masked' has an entry for a parameter that the transformation does not"):
        split_state(lambda params: dict.fromkeys(params, 1.0), ["w", "masked"])


OTHER: dict[str, Callable[[Moments], Any]] = {
    "an entry is gone": lambda s: s._replace(mu={"w": s.mu["w"]}),
    "an entry more": lambda s: s._replace(mu={**s.mu, "c": s.mu["w"]}),
    "a list for a dict": lambda s: s._replace(mu=list(s.mu.values())),
    "a plain tuple": tuple,
    "a tensor for a tree": lambda s: s._replace(mu=torch.zeros(3)),
    "a tree for a parameter's tensor": lambda s: s._replace(mu={**s.mu, "b": [s.mu["b"]]}),
    "a tree for the tree's tensor": lambda s: s._replace(count={"now": 1}),
    "another NamedTuple": lambda s: Pair(s.mu, s.nu),
    "nothing": lambda s: None,
}


@pytest.mark.parametrize("name", OTHER)
def test_update_that_changes_the_structure_is_refused(name: str) -> None:
    split = split_state(moments, ["w", "b"])
    with pytest.raises((ValueError, TypeError), match="GradientTransformation"):
        split.split(OTHER[name](first_state(split)))


# -- drawn states -----------------------------------------------------------------------------------------------------


KEYS = st.sampled_from(["a", "b", "a.b", "tree", "0", "count"])


def leaf_or_params(per_param: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A number of the tree, or a dict with an entry for each parameter."""
    return st.just(0.0) | per_param.map(lambda own: {"w": own, "v": own})


NESTS = st.recursive(
    st.just(0.0), lambda inner: st.dictionaries(KEYS, inner, max_size=2) | st.tuples(inner), max_leaves=4
)
STATES = st.recursive(
    leaf_or_params(NESTS),
    lambda inner: st.dictionaries(KEYS, inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=5,
)


def for_params(state: Any, params: Params) -> Any:
    """A drawn state with an entry for each parameter, where it has them for `w` and `v`."""
    if isinstance(state, dict) and set(state) == {"w", "v"}:
        return dict.fromkeys(params, state["w"])
    if isinstance(state, dict):
        return {k: for_params(x, params) for k, x in state.items()}
    return tuple(for_params(x, params) for x in state) if isinstance(state, tuple) else state


@pytest.mark.slow
@example(drawn={"a.b": 0.0, "a": {"b": 0.0}})  # entries of the tree
@example(drawn={"a.b": {"w": 0.0, "v": 0.0}, "a": {"w": {"b": 0.0}, "v": {"b": 0.0}}})  # of a parameter
@example(drawn={"tree": {"w": {"a": 0.0}, "v": {"a": 0.0}}, "a": 0.0})  # of both
@settings(max_examples=500)
@given(drawn=STATES)
def test_no_entry_of_a_drawn_state_is_lost(drawn: Any) -> None:
    """It comes back as it was; no two entries have one key."""
    split = split_state(lambda params: for_params(drawn, params), ["w", "v"])
    state = renumbered(for_params(drawn, {"w": 0, "v": 0}))
    states: dict[str, dict[str, Any]] = {"w": {}, "v": {}}
    put(states, split.entries(state, states, ["w", "v"]))
    assert_same(split.gather(states), state)


# -- in an optimizer --------------------------------------------------------------------------------------------------


class InPlace(fo.GradientTransformation):
    """A sum of updates that is written in place, as optimizers from elsewhere do."""

    def __init__(self) -> None:
        super().__init__(zeros, self.run)

    @staticmethod
    def run(updates: Params, state: Any, params: Any = None) -> tuple[Any, Any]:
        return {k: None if u is None else state[k].add_(u).clone() for k, u in updates.items()}, state


def test_state_of_an_optimizer_without_other_slots_is_in_its_state_dict() -> None:
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    opt = TransformOptimizer(params, fo.chain(InPlace(), fo.scale(-1.0)))
    for _ in range(3):
        for p in params:
            p.grad = torch.ones(2)
        opt.step()
    found = opt.state_dict()["state"]
    assert {k: own["transformation_0"].tolist() for k, own in found.items()} == {0: [3.0, 3.0], 1: [3.0, 3.0]}


@pytest.mark.parametrize("removed", ["all", "one"])
def test_removed_state_starts_anew_where_it_was_written_in_place(removed: str) -> None:
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    opt = TransformOptimizer(params, fo.chain(InPlace(), fo.scale(-1.0)))

    def step() -> list[float]:
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.ones(2)
        opt.step()
        return [(p - q)[0].item() for p, q in zip(params, before, strict=True)]

    assert [step() for _ in range(3)] == [[-1, -1], [-2, -2], [-3, -3]]
    if removed == "all":
        opt.state.clear()
    else:
        opt.state.pop(params[1])
    assert step() == ([-1, -1] if removed == "all" else [-4, -1])
