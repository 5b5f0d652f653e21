"""Scopes: rules and functions within masks and partitions, beside optax."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optree
import pytest
import torch

import functional_optim as fo
from _lib.compare import DOUBLE
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
