"""How often the memory of leaves is measured in a step."""

from typing import Any

import pytest
import torch
from functional_optim.kernels import launch

import functional_optim as fo


def test_parts_of_a_tree_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where leaves see different rules, what is known of the whole tree is not asked of each leaf again."""
    params = {f"{k}": torch.ones(3, 3) if k % 2 else torch.ones(3) for k in range(20)}
    tx = fo.adamw(0.1, mask=lambda path, p: p.ndim > 1)
    state = tx.init(params)

    def step() -> None:
        with torch.no_grad():
            fo.apply_gradients(tx, params, {k: torch.ones_like(p) for k, p in params.items()}, state, donate=True)

    for _ in range(3):
        step()
    asked: list[Any] = []
    monkeypatch.setattr(launch, "span", lambda x: asked.append(x) or 0)
    step()

    assert not asked
