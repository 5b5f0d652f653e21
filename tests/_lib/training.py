"""Training: steps of a pure transformation, and small models with seeded batches for optimizers."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

import functional_optim as fo
from _lib.trees import Tree


def train(tx: Any, params: Tree, grads: Sequence[Tree], state: Any = None, donate: bool = False, **extra: Any) -> Any:
    """Steps through a list of gradients."""
    state = tx.init(params) if state is None else state
    for g in grads:
        params, state = fo.apply_gradients(tx, params, g, state, donate=donate, **extra)
    return params, state


def trajectory(tx: Any, params: Any, grads: list[Any]) -> Any:
    """The parameters of each step, by a transformation."""
    state, steps = tx.init(params), []
    for g in grads:
        params, state = fo.apply_gradients(tx, params, g, state)
        steps.append(params)
    return steps


def values(x: Any) -> Any:
    """A copy of the tensors of an optimizer's state or parameters."""
    if isinstance(x, torch.Tensor):
        return x.detach().clone()
    if isinstance(x, dict):
        return {k: values(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [values(v) for v in x]
    return x


def make_model(seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """A network of two layers whose tensors are whole vectors of the CPU, but for the last bias."""
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def make_batches(count: int, rows: int = 8, seed: int = 2, dtype: torch.dtype = torch.float64) -> list[Any]:
    """Inputs and targets of `make_model`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype) for width in (8, 4))
        for _ in range(count)
    ]


def fit(model: torch.nn.Module, optimizer: Any, batches: Iterable[Any]) -> None:
    """Trains on batches, a step each."""
    for x, y in batches:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def grouped(model: torch.nn.Module, **vectors: Any) -> list[dict[str, Any]]:
    """Parameter groups in which matrices decay and vectors do not; `vectors` are more options of the second."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0, **vectors},
    ]
