"""Chains of all kinds, and rules, masks, schedules and transformations that pickle finds."""

import math
from typing import Any

import torch

import functional_optim as fo
from _lib.trees import Tree, tree_map


STEPS = 20


def is_matrix(path: str, p: torch.Tensor) -> bool:
    """A mask that pickle finds."""
    return p.ndim > 1


def halving(count: Any) -> Any:
    """A schedule that can be traced."""
    return 0.5**count


@fo.elementwise(extra=("value",))
def scale_by_value(u: torch.Tensor, *, value: Any, factor: Any = 1.0) -> torch.Tensor:
    """A rule of the tests' own that needs an extra argument."""
    return u * value * factor


@fo.elementwise(state={"best": fo.slot("first_update"), "seen": fo.slot(1.0, per="leaf")})
def remember_first(
    u: torch.Tensor, best: torch.Tensor, seen: torch.Tensor, *, rate: Any = 0.5
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A rule of the tests' own with two kinds of slots."""
    best = best + rate * (u - best)
    return best, best, seen * rate


@fo.elementwise(state={"norm": fo.slot(per="tree")})
def watch(u: Any, norm: Any) -> tuple[Any, Any]:
    """A rule with one number for the tree."""
    return u, fo.tree_norm(u)


@fo.elementwise
def cautious(u: Any, before: Any) -> Any:
    """A rule around another."""
    return torch.where(u * before < 0, u, 0.0)


@fo.elementwise
def nested(u: Any, p: Any) -> Any:
    """A reduction of what depends on a reduction that depends on a reduction."""
    u = u / (1 + fo.tree_norm(u))
    u = u * fo.leaf_norm(u + p)
    return u / fo.tree_amax(torch.abs(u))


def flip(updates: Any, params: Any) -> Any:
    """A barrier: what a kernel, which sees one element at a time, cannot do."""
    return {k: None if u is None else u.flip(0) if u.ndim else u for k, u in updates.items()}


class Halve:
    """An optimizer from elsewhere: it has `init` and `update`, and takes no extra arguments."""

    def init(self, params: Tree) -> tuple[()]:
        return ()

    def update(self, updates: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, Any]:
        return tree_map(lambda u: u / 2, updates), state


class TimesValue:
    """An optimizer from elsewhere that takes extra arguments, counts its calls and remembers what it was given."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def init(self, params: Tree) -> dict[str, int]:
        return {"calls": 0}

    def update(self, updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, Any]:
        self.calls.append(extra)
        return tree_map(lambda u: u * extra["value"], updates), {"calls": state["calls"] + 1}


CHAINS: dict[str, Any] = {
    "sgd": fo.sgd(0.1),
    "momentum": fo.sgd(0.1, momentum=0.9, nesterov=True),
    "clip, AdamW and average": fo.chain(
        fo.clip_by_global_norm(1.0), fo.adamw(1e-2, weight_decay=0.1, mask=is_matrix), fo.params_ema(0.9)
    ),
    "lamb with schedule": fo.chain(fo.zero_nans(), fo.lamb(fo.cosine_decay_schedule(1e-2, STEPS), weight_decay=0.1)),
    "host schedule": fo.sgd(lambda count: [0.1, 0.2][int(count) % 2]),
    "partition": fo.partition({True: fo.adam(1e-2), False: fo.sgd(0.1, 0.9)}, is_matrix),
    "barrier first": fo.chain(fo.stateless(flip), fo.adam(1e-2)),
    "barrier between": fo.chain(fo.trace(0.9), fo.stateless(flip), fo.scale_by_adam(), fo.scale(-1e-2)),
    "barrier last": fo.chain(fo.adam(1e-2), fo.stateless(flip)),
    "only a barrier": fo.chain(Halve()),
}
# Learning rates by the form in which they are given; those of one form make one program.
RATES: list[tuple[str, list[Any]]] = [
    ("number", [0.1, 0.2, 1e-30, 3]),
    ("0-d tensor", [torch.tensor(0.1), torch.tensor(0.2), torch.tensor(0.3, dtype=torch.float64)]),
    ("schedule", [fo.linear_schedule(0.1, 0.0, 9), fo.linear_schedule(0.2, 0.1, 9)]),
    ("function", [lambda count: [0.1, 0.2, 0.3][int(count) % 3], lambda count: math.cos(count)]),
]
