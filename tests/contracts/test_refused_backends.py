"""Backends that are asked for by name and cannot serve a transform: refused, with both names, before anything is done.

Without a name the fastest one that can is chosen, and "reference" serves all.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import grad, hessian, jacrev, jvp, vmap

import functional_optim as fo
from _lib.compare import Snapshot
from _lib.marks import INTERPRETER
from functional_optim.adapters import TransformOptimizer


pytestmark = INTERPRETER
KERNELS = ("c", "triton")
W = torch.tensor([1.0, -2.0, 0.5])


@fo.elementwise
def relative(u: Any) -> Any:
    return u / fo.leaf_amax(u)


def step(w: torch.Tensor, tx: fo.GradientTransformation | None = None) -> torch.Tensor:
    """The parameters behind one step, whose gradients are their squares."""
    tx = tx or fo.chain(fo.clip_by_global_norm(1.0), fo.sgd(0.1, momentum=0.9))
    after, _ = fo.apply_gradients(tx, {"w": w}, {"w": w**2}, tx.init({"w": w.detach()}))
    return after["w"]


def loss(w: torch.Tensor) -> torch.Tensor:
    return step(w).square().sum()


def leaf() -> torch.Tensor:
    return W.clone().requires_grad_()


def backward_twice() -> Any:
    w = leaf()
    (first,) = torch.autograd.grad(loss(w), w, create_graph=True)
    return torch.autograd.grad(first.sum(), w)


def many_at_once() -> Any:
    w = leaf()
    return torch.autograd.grad(step(w), w, torch.eye(3), is_grads_batched=True)


def of_an_optimizer() -> Any:
    w = leaf()
    p = w.clone()
    opt = TransformOptimizer([p], fo.sgd(0.1, momentum=0.9), differentiable=True)
    p.grad = w**2
    opt.step()
    return torch.autograd.grad(p.sum(), w)


def within_forward_mode() -> Any:
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(step(forward_ad.make_dual(W, torch.ones(3)))).tangent


CASES: dict[str, tuple[Callable[[], Any], tuple[str, ...], str]] = {
    "vmap": (lambda: vmap(step)(torch.stack([W, W])), ("foreach",), r"`torch\.func\.vmap`"),
    "grad": (lambda: grad(loss)(W), ("foreach",), r"`torch\.func\.grad`"),
    "autograd": (lambda: torch.autograd.grad(loss(w := leaf()), w), ("foreach",), "autograd"),
    "jvp": (lambda: jvp(step, (W,), (W,)), (*KERNELS, "foreach"), r"`torch\.func\.jvp`"),
    "forward mode": (within_forward_mode, (*KERNELS, "foreach"), "forward-mode AD"),
    "grad in vmap": (
        lambda: vmap(grad(loss))(torch.stack([W, W])),
        (*KERNELS, "foreach"),
        r"`torch\.func\.grad` within `torch\.func\.vmap`",
    ),
    "autograd around vmap": (
        lambda: vmap(step)(torch.stack([W, W]).requires_grad_()).sum().backward(),
        (*KERNELS, "foreach"),
        r"`torch\.func\.vmap`",
    ),
    "the Hessian": (lambda: hessian(loss)(W), (*KERNELS, "foreach"), r"`torch\.func\."),
    "the Jacobian": (lambda: jacrev(step)(W), (*KERNELS, "foreach"), r"autograd \(several cotangents|func\.grad"),
    "a second derivative": (backward_twice, (*KERNELS, "foreach"), r"autograd( \(the derivative of a derivative\))?,"),
    "several cotangents": (many_at_once, (*KERNELS, "foreach"), r"autograd( \(several cotangents at once\))?,"),
    "a maximum": (
        lambda: torch.autograd.grad(step(w := leaf(), relative()).sum(), w),
        (*KERNELS, "foreach"),
        r"autograd( \(kernels have no derivative of leaf_amax\))?,",
    ),
    "an optimizer": (of_an_optimizer, (*KERNELS, "foreach"), "autograd, in a step of an optimizer,"),
}
PAIRS = [(name, backend) for name, (_, refused, _) in CASES.items() for backend in refused]


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_a_backend_that_cannot_serve_is_refused(name: str, backend: str) -> None:
    run, _, follower = CASES[name]
    before = Snapshot(W)
    message = (
        rf"the backend '{backend}' is asked for, but cannot serve .*{follower}.* which follows operations of torch"
    )
    with fo.use_backend(backend), pytest.raises(RuntimeError, match=message):
        run()
    before.check()


@pytest.mark.parametrize("name", CASES)
def test_without_a_name_one_that_can_is_chosen(name: str) -> None:
    run, _, _ = CASES[name]
    found = run()
    with fo.use_backend("reference"):
        torch.testing.assert_close(found, run(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["vmap", "grad", "autograd"])
def test_kernels_serve_the_others(name: str, backend: str) -> None:
    run, _, _ = CASES[name]
    expected = run()
    with fo.use_backend(backend):
        torch.testing.assert_close(run(), expected, rtol=1e-5, atol=1e-6)
