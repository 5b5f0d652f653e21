"""Steps whose tensors are checked in Python."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functional_optim.kernels import native

import functional_optim as fo
from functional_optim.adapters import SGD, AdamW, TransformOptimizer


def parameters(n: int = 2, size: int = 16) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64)) for _ in range(n)]


@fo.stateless
def halved(updates: Any, params: Any) -> Any:
    return {k: None if u is None else u / 2 for k, u in updates.items()}


MAKERS: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: AdamW(params, lr=0.1),
    "a transformation between kernels": lambda params: TransformOptimizer(
        params, fo.chain(fo.scale(2.0), halved, fo.sgd(0.1, momentum=0.9))
    ),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_steps_without_a_check_in_c(maker: str, in_python: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow check leaves out the addresses; several steps, because the first ones look at every tensor anew."""
    monkeypatch.setattr(native, "use", lambda library: None)
    ours, plain = parameters(), parameters()
    opt, twin = MAKERS[maker](ours), MAKERS[maker](plain)
    for step in range(5):
        for p, q in zip(ours, plain, strict=True):
            p.grad = torch.full_like(p, 1.0 + step, requires_grad=False).as_subclass(torch.Tensor)
            q.grad = torch.full_like(q, 1.0 + step)
        opt.step()
        twin.step()
    for p, q in zip(ours, plain, strict=True):
        assert torch.equal(p.detach().as_subclass(torch.Tensor), q.detach())
