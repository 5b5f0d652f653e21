"""Compiled steps of tensors and trees that do not fit: refused, or computed, as in eager mode."""

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import functional_optim as fo
from _lib.compiled import assert_equal


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own


def params_of(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([[1.0, 2.0, 3.0]] * 2, dtype=dtype), "b": torch.tensor([4.0, 5.0], dtype=dtype)}


def on_meta(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.to("meta"), tree)


def recipe(rate: Any = 0.1) -> Any:
    return fo.chain(fo.zero_nans(), fo.adam(rate))


def outcome(step: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return step(*arguments)
    except Exception as error:
        return type(error), str(error)


def with_state(state: Any, **fields: Any) -> Any:
    """A state with others in the place of some fields of Adam's."""
    (nans, (adam, *rest)) = state
    return nans, (adam._replace(**fields), *rest)


# of parameters, gradients, the state and the learning rate: those with some tensors on meta
ON_META: dict[str, Callable[..., Any]] = {
    "gradients": lambda p, g, s, r: (p, on_meta(g), s, r),
    "one gradient": lambda p, g, s, r: (p, {**g, "b": g["b"].to("meta")}, s, r),
    "parameters": lambda p, g, s, r: (on_meta(p), g, s, r),
    "parameters and gradients": lambda p, g, s, r: (on_meta(p), on_meta(g), s, r),
    "the state": lambda p, g, s, r: (p, g, on_meta(s), r),
    "a slot": lambda p, g, s, r: (p, g, with_state(s, mu=on_meta(s[1][0].mu)), r),
    "a number per leaf": lambda p, g, s, r: (p, g, (on_meta(s[0]), s[1]), r),
    "the counter": lambda p, g, s, r: (p, g, with_state(s, count=s[1][0].count.to("meta")), r),
    "the rate": lambda p, g, s, r: (p, g, s, r.to("meta")),
    "all but numbers": lambda p, g, s, r: (
        on_meta(p),
        on_meta(g),
        with_state((on_meta(s[0]), on_meta(s[1])), count=s[1][0].count),
        r,
    ),
    "all": lambda p, g, s, r: (*map(on_meta, (p, g, s)), r.to("meta")),
}


@pytest.mark.parametrize("donate", [False, True], ids=["new", "donated"])
@pytest.mark.parametrize("case", ON_META)
def test_tensors_on_meta(case: str, donate: bool) -> None:
    """Torch hands such a step to its fake implementation while it is traced, which computes nothing."""

    def run(compiles: bool) -> Any:
        own = params_of(), {k: x / 2 for k, x in params_of().items()}, recipe().init(params_of()), torch.tensor(0.1)
        params, grads, state, rate = ON_META[case](*own)
        tx = recipe(rate)
        step: Any = lambda p, g, s: fo.apply_gradients(tx, p, g, s, donate=donate)  # noqa: E731
        if compiles:
            step = torch.compile(step, fullgraph=True, backend="eager")
        found = outcome(step, params, grads, state)
        return found, params, state

    actual, expected = run(True), run(False)
    assert pytree.tree_structure(actual) == pytree.tree_structure(expected)
    for x, y in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        assert (x.device, x.shape) == (y.device, y.shape) if isinstance(y, torch.Tensor) else x == y
        assert not isinstance(y, torch.Tensor) or y.is_meta or torch.equal(x, y)
    assert case.startswith("all") is not isinstance(expected[0][0], type)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one gradient", "a slot", "the rate"])
def test_tensors_on_meta_of_members(case: str) -> None:
    own = params_of(), params_of(), torch.vmap(recipe().init)(params_of()), torch.tensor(0.1)
    params, grads, state, rate = ON_META[case](*own)
    tx = recipe(rate)

    def step(p: Any, g: Any, s: Any) -> Any:
        return fo.apply_gradients(tx, p, g, s)

    with pytest.raises(Exception, match="meta"):
        torch.compile(torch.vmap(step), fullgraph=True, backend="eager")(params, grads, state)


@pytest.mark.parametrize("name", ["extra", "hyper-parameter"])
def test_a_number_on_meta_is_refused_by_its_name(name: str) -> None:
    rate = torch.tensor(0.1, device="meta")
    tx, extra = (fo.sgd(0.1), {}) if name == "extra" else (fo.sgd(rate), {})
    if name == "extra":
        given = fo.elementwise(lambda u, *, lr: -lr * u, extra=("lr",))  # type: ignore[arg-type, misc]
        tx, extra = given(), {"lr": rate}
    with pytest.raises(ValueError, match=r"(learning_rate|`lr`) is a tensor on meta.*leaves are on cpu"):
        fo.apply_gradients(tx, params_of(), params_of(), tx.init(params_of()), **extra)


# -- refusals -----------------------------------------------------------------------------------------------------

W, RECORDED = ({"w": torch.ones(3, requires_grad=records)} for records in (False, True))
# a step that eager mode refuses, the words that say why, and one like it that is taken
REFUSED: dict[str, tuple[Callable[..., Any], str, Callable[..., Any]]] = {
    "trees": (
        lambda step, s: step(W, {"v": W["w"]}, s),
        r"updates does not have the structure of params: it lacks 'w'",
        lambda step, s: step(W, W, s),
    ),
    "donation that autograd records": (
        lambda step, s: step(RECORDED, W, s, donate=True),
        r"requires a gradient, and donate=True would write",
        lambda step, s: step({"w": torch.ones(3)}, W, s, donate=True),
    ),
    "donation within vmap": (
        lambda step, s: torch.vmap(lambda w: step({"w": w}, W, s, donate=True))(torch.ones(2, 3)),
        r"donate=True writes in place, which a torch.func transformation cannot follow",
        lambda step, s: torch.vmap(lambda w: step({"w": w}, W, s))(torch.ones(2, 3)),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_a_step_that_is_refused_is_followed_by_others(case: str, fullgraph: bool) -> None:
    """The same words as in eager mode, or within those of the compiler; Dynamo gives up no function for it."""
    refused, words, taken = REFUSED[case]
    tx = recipe()

    def step(*trees: Any, **more: Any) -> Any:
        return fo.apply_gradients(tx, *trees, **more)

    compiled = torch.compile(lambda fn, s: fn(step, s), fullgraph=fullgraph, backend="eager")
    with pytest.raises(Exception, match=words) as found:
        compiled(refused, tx.init(W))
    assert len(str(found.value).splitlines()) == 1 or fullgraph
    assert "donated_step(" not in str(found.value)  # the operation, and the text that encodes the chain
    assert_equal(compiled(taken, tx.init(W)), taken(step, tx.init(W)))


# -- containers ---------------------------------------------------------------------------------------------------

Ordered = collections.OrderedDict
KINDS: dict[str, Callable[[Any], Any]] = {
    "dict": dict,
    "ordered, in another order": lambda tree: Ordered(reversed(tree.items())),
}
MIXED = [(a, b, c) for a in KINDS for b in KINDS for c in KINDS if len({a, b, c}) > 1]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["apply", "update"])
def test_trees_in_other_dicts(form: str) -> None:
    """Results have the containers of the parameters, as in eager mode; a compiled state keeps its own."""
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adam(0.1))

    def step(p: Any, g: Any, s: Any) -> Any:
        return fo.apply_gradients(tx, p, g, s) if form == "apply" else tx.update(g, s, p)

    for kinds in MIXED:
        torch.compiler.reset()
        params, grads, first = (KINDS[kind](params_of()) for kind in kinds)
        state = tx.init(first)
        actual = torch.compile(step, fullgraph=True, backend="eager")(params, grads, state)
        expected = step(params, grads, state)
        assert (type(actual[0]), list(actual[0])) == (type(expected[0]), list(expected[0]))
        assert_equal(dict(actual[0]), dict(expected[0]))
        mine, theirs = actual[1][1][0], expected[1][1][0]
        assert type(mine.mu) is type(first)
        assert mine.count == theirs.count
        for slot in ("mu", "nu"):
            assert_equal({k: getattr(mine, slot)[k] for k in params}, {k: getattr(theirs, slot)[k] for k in params})


STRUCTURES: dict[str, Any] = {
    "lacks a leaf": (lambda g: {"w": g["w"]}, "it lacks 'b'"),
    "has another leaf": (lambda g: {**g, "c": g["b"]}, "it has the unknown 'c'"),
    "is a list": (lambda g: [*g.values()], "it lacks 'b', 'w'"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("case", STRUCTURES)
def test_a_tree_of_another_structure_is_refused_in_words(case: str, fullgraph: bool) -> None:
    """Not as a failure of the compiler; without `fullgraph=True` by the very error of eager mode."""
    change, message = STRUCTURES[case]
    tx = fo.adam(0.1)
    state = tx.init(params_of())
    step = torch.compile(lambda p, g, s: fo.apply_gradients(tx, p, g, s), fullgraph=fullgraph, backend="eager")
    kinds: Any = torch._dynamo.exc.Unsupported if fullgraph else ValueError
    with pytest.raises(kinds, match=f"updates does not have the structure of params: {message}"):
        step(params_of(), change(params_of()), state)


@pytest.mark.parametrize("which", ["params", "state"])
def test_donating_an_expanded_tensor_is_refused_by_its_path(which: str) -> None:
    tx = fo.adam(0.1)
    params, state = params_of(), tx.init(params_of())
    if which == "params":
        params["w"] = torch.ones(1, 3).expand(2, 3)
    else:
        state[0].mu["w"] = torch.zeros(1, 3).expand(2, 3)
    step = torch.compile(lambda p, g, s: fo.apply_gradients(tx, p, g, s, donate=True), backend="aot_eager")
    with pytest.raises(Exception, match=rf"{which} at '(0\.mu\.)?w' is an expanded tensor.*pass `x\.clone\(\)`"):
        step(params, params_of(), state)
