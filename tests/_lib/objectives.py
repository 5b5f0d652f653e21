"""Objectives of trees for L-BFGS and line searches, and the searches that minimize them."""

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch

import functional_optim as fo
from _lib.trees import F64, Tree, leaves, tree_map


def flat(tree: Tree) -> torch.Tensor:
    return torch.cat([x.reshape(-1) for x in leaves(tree)])


def rosenbrock(tree: Any, shift: Any = 0.0) -> Any:
    """The function of Rosenbrock in three numbers, in tensors of either library."""
    (x, y), z = tree["pair"], tree["last"]
    return (1 - x) ** 2 + 100 * (y - x * x - shift) ** 2 + (1 - y) ** 2 + 100 * (z - y * y) ** 2


def bumpy(tree: Any) -> Any:
    """The same with bumps in every direction, so that a line has several valleys."""
    (x, y), z = tree["pair"], tree["last"]
    bumps = sum(height / (1 + 30 * (v - k) ** 2) for v in (x, y, z) for k, height in BUMPS)
    return rosenbrock(tree) / 100 + bumps


BUMPS = [(-0.4, 5.0), (0.9, -4.0), (1.6, 4.0)]


START = {"pair": torch.tensor([-1.2, 1.0], dtype=F64), "last": torch.tensor(0.5, dtype=F64)}


def value_and_grad(f: Callable[[Any], Any], params: Tree) -> tuple[torch.Tensor, Tree]:
    own = tree_map(lambda p: p.detach().clone().requires_grad_(), params)
    value = f(own)
    grads = torch.autograd.grad(value, leaves(own))
    return value.detach(), optree.tree_unflatten(optree.tree_structure(own), grads)


ALL_SEARCHES = {
    "zoom": fo.scale_by_zoom_linesearch(20, initial_guess_strategy="one"),
    "backtracking": fo.scale_by_backtracking_linesearch(20, store_grad=True),
    "strong_wolfe": fo.scale_by_strong_wolfe_linesearch(),
}


each_search = pytest.mark.parametrize("search", ALL_SEARCHES.values(), ids=ALL_SEARCHES)
