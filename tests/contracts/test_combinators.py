"""Combinators: what a combination computes, which leaves it sees, and what it passes on."""

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
from _lib.compare import DOUBLE, assert_same_bits
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


@pytest.mark.parametrize("kind", ["path", "tree"])
@pytest.mark.parametrize("combination", ["masked", "partition"])
def test_masks_and_labels_are_evaluated_once(combination: str, kind: str) -> None:
    """Per tree, not per step: `init` and the first step look at the mask, the steps that follow do not."""
    calls: list[Any] = []

    def of_path(path: str, p: torch.Tensor) -> bool:
        calls.append(path)
        return p.ndim > 1

    def of_tree(tree: Any) -> Any:
        calls.append(tree)
        return optree.tree_map(lambda p: p.ndim > 1, tree)

    choice, params = of_path if kind == "path" else of_tree, make_tree(0)
    if combination == "masked":
        tx = fo.chain(fo.masked(fo.trace(0.9), choice), fo.scale(-1.0))
    else:
        tx = fo.chain(fo.partition({True: fo.trace(0.9), False: fo.identity()}, choice), fo.scale(-1.0))
    params, state = train(tx, params, [like(params, 0)])
    evaluated = len(calls)

    train(tx, params, [like(params, seed) for seed in range(1, STEPS)], state)

    assert evaluated <= 2 * (3 if kind == "path" else 1)
    assert len(calls) == evaluated


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

    tx.update(params, tx.init(params), params, value=1, other=2)

    assert seen == [(1, "default")]
