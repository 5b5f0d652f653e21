"""Rules, and transformations that are not made of rules and have the same formulas."""

from collections.abc import Mapping
from typing import Any

import torch

import functional_optim as fo


Params = Mapping[str, Any]


def seen(tree: Params) -> dict[str, torch.Tensor]:
    """The leaves that are there."""
    return {k: x for k, x in tree.items() if isinstance(x, torch.Tensor)}


@fo.elementwise(state={"m": fo.slot(0.0)})
def momentum(u: Any, m: Any) -> Any:
    """A sum of updates that fades."""
    m = 0.5 * m + u
    return m, m


def opaque_momentum() -> fo.GradientTransformation:
    def update(updates: Params, state: Params, params: Any = None) -> Any:
        new = {k: 0.5 * m + updates[k] if isinstance(updates.get(k), torch.Tensor) else m for k, m in state.items()}
        return {k: new[k] if isinstance(x, torch.Tensor) else x for k, x in updates.items()}, new

    return fo.GradientTransformation(lambda params: {k: torch.zeros_like(p) for k, p in seen(params).items()}, update)


@fo.elementwise
def by_norm(u: Any) -> Any:
    """Updates of norm 1."""
    return u / fo.tree_norm(u)


def opaque_by_norm() -> fo.GradientTransformation:
    def update(updates: Params, state: Any, params: Any = None) -> Any:
        norm = torch.stack([x.square().sum() for x in seen(updates).values()]).sum().sqrt()
        return {k: x / norm if isinstance(x, torch.Tensor) else x for k, x in updates.items()}, state

    return fo.GradientTransformation(lambda params: (), update)


@fo.leafwise
def doubled(u: torch.Tensor) -> torch.Tensor:
    """A rule for whole tensors."""
    return 2.0 * u


@fo.elementwise
def kept(u: Any, before: Any, *, share: Any = 0.25) -> Any:
    """Updates, and a share of the updates that entered."""
    return u + share * before


def counting(found: list[int]) -> fo.GradientTransformation:
    """Notes how many steps it has taken."""

    def update(updates: Params, state: Any, params: Any = None) -> Any:
        found.append(int(state["n"]))
        return updates, {"n": state["n"] + 1}

    return fo.GradientTransformation(lambda params: {"n": torch.zeros(())}, update)
