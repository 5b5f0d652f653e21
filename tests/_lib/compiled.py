"""Chains and train steps that are compiled, and comparison with eager mode."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.func import functional_call, grad_and_value
from torch.utils import _pytree as pytree

import functional_optim as fo


STEPS = 20
MODEL = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


@fo.leafwise(state={"rows": fo.slot(shape=lambda p: p.shape[:1])})
def scale_rows(u: Any, rows: Any, *, decay: Any = 0.9) -> Any:
    rows = decay * rows + u.reshape(u.shape[0], -1).square().mean(1)
    return u / (rows.sqrt() + 1e-3).reshape(-1, *[1] * (u.ndim - 1)), rows


@fo.elementwise(state={"total": fo.slot(per="tree")})
def keep_direction(u: Any, before: Any, total: Any) -> Any:
    """A rule around another one, with a number that all leaves share."""
    total = total + fo.tree_sum(u * u)
    return torch.where(u * before > 0, u, 0.0) / (1 + total), total


def counting(params: Any) -> Any:
    return {"n": torch.zeros(())}


def halve(updates: Any, state: Any, params: Any = None) -> Any:
    """An opaque transformation: the first update is halved, the second divided by three."""
    n = state["n"] + 1
    return {k: u / (1 + n) for k, u in updates.items()}, {"n": n}


RATE = torch.tensor(0.1)  # tests change it between steps
CHAINS: dict[str, Callable[[], Any]] = {
    "schedule": lambda: fo.chain(
        fo.clip_by_global_norm(0.1),
        fo.adamw(fo.cosine_decay_schedule(0.1, STEPS), mask=lambda path, p: p.ndim > 1),
        fo.params_ema(0.9),
    ),
    "tensor": lambda: fo.sgd(RATE, momentum=0.9),
    "partition": lambda: fo.partition(
        {"a": fo.adam(1e-2), "b": fo.masked(fo.sgd(0.1), re.compile("0"))},
        {re.compile("bias"): "b", re.compile(""): "a"},
    ),
    "wrapping": lambda: fo.chain(keep_direction(fo.trace(0.9)), fo.scale_by_learning_rate(0.1)),
    "opaque": lambda: fo.chain(fo.trace(0.5), fo.GradientTransformation(counting, halve), fo.sgd(0.1, momentum=0.9)),
    "leafwise": lambda: fo.named_chain(("clip", fo.clip(0.1)), ("rows", scale_rows()), ("lr", fo.sgd(0.1))),
}


@contextlib.contextmanager
def dynamo(**config: Any) -> Iterator[None]:
    """Settings of the compiler, which takes seconds to import."""
    import torch._dynamo

    with torch._dynamo.config.patch(**config):
        yield


def counter(backend: str = "aot_eager") -> Any:
    """A backend that counts graphs."""
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend(backend)


def loss(params: Any, x: torch.Tensor) -> torch.Tensor:
    return functional_call(MODEL, params, (x,)).square().mean()


def train_step(tx: Any, form: str) -> Callable[..., Any]:
    """A train step in one of the forms of the pure API."""

    def step(params: Any, state: Any, x: torch.Tensor, **extra: Any) -> Any:
        grads, value = grad_and_value(loss)(params, x)
        if form == "update":
            updates, state = tx.update(grads, state, params, **extra)
            params = fo.apply_updates(params, updates)
        else:
            params, state = fo.apply_gradients(tx, params, grads, state, donate=form == "donate", **extra)
        return params, state, value

    return step


def start(tx: Any) -> Any:
    params = {k: p.detach().clone() for k, p in MODEL.named_parameters()}
    return params, tx.init(params)


def batch(k: int) -> torch.Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(k))


def assert_equal(actual: Any, expected: Any) -> None:
    """The same containers, and the same bits in every tensor."""
    assert pytree.tree_structure(actual) == pytree.tree_structure(expected)
    for x, y in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        if x is not y:
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


def assert_close(actual: Any, expected: Any) -> None:
    """The same but for rounding: a few units in the last place of float32, of numbers up to 1."""
    for x, y in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def packed_start(tx: Any) -> Any:
    params = fo.pack({k: p.detach() for k, p in MODEL.named_parameters()})
    return params, tx.init(params)
