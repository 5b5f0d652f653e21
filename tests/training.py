"""What tests with optimizers share: small models, seeded batches and gradients, records of what a step may change."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch


# The same operations in the same order: the same bits.
EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 0.0}


def make_params(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    """A matrix and a vector, of whole vectors of the CPU: torch's kernels round otherwise in an incomplete one."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in ((8, 16), (32,))
    ]


def make_grads(params: Sequence[torch.Tensor], count: int, seed: int = 1) -> list[list[torch.Tensor]]:
    """Gradients for some steps."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params]
        for _ in range(count)
    ]


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All parameters of an optimizer, in order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def take_step(optimizer: Any, grads: Sequence[torch.Tensor]) -> None:
    """A step with these gradients."""
    for p, g in zip(params_of(optimizer), grads, strict=True):
        p.grad = g.clone()
    optimizer.step()


def take_steps(optimizer: Any, grads: Iterable[Sequence[torch.Tensor]]) -> None:
    """Steps with these gradients."""
    for each in grads:
        take_step(optimizer, each)


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
