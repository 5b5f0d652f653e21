"""`differentiable=True`: derivatives of several steps with respect to the learning rate."""

from typing import Any

import pytest
import torch

import functional_optim as fo
from functional_optim import adapters
from functional_optim.adapters import TransformOptimizer


def chain(params: Any, lr: Any, differentiable: bool) -> TransformOptimizer:
    tx = fo.chain(fo.orthogonalize(), fo.add_decayed_weights(0.1), fo.scale_by_trust_ratio(), fo.sgd(lr, momentum=0.9))
    return TransformOptimizer(params, tx, differentiable=differentiable)


def named(name: str, **kwargs: Any) -> Any:
    def make(params: Any, lr: Any, differentiable: bool) -> Any:
        own = {} if name == "Rprop" else {"weight_decay": 0.1}
        return getattr(adapters, name)(params, lr=lr, differentiable=differentiable, **own, **kwargs)

    return make


MAKERS: dict[str, Any] = {
    "chain": chain,
    **{
        name: named(name)
        for name in ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "Rprop", "Lion", "LAMB")
    },
    "SGD": named("SGD", momentum=0.9, nesterov=True),
    "Adam, decoupled": named("Adam", decoupled_weight_decay=True),
    "AdamW, amsgrad": named("AdamW", amsgrad=True),
    "NAdam, decoupled": named("NAdam", decoupled_weight_decay=True),
    "RAdam, decoupled": named("RAdam", decoupled_weight_decay=True),
    "RMSprop": named("RMSprop", momentum=0.5, centered=True),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("case", MAKERS)
def test_the_derivative_of_the_rate_is_that_of_differences(case: str, dtype: torch.dtype) -> None:
    if case == "chain" and dtype.is_complex:
        dtype = torch.float64  # rules for whole tensors take real numbers
    generator = torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(5, 3, generator=generator, dtype=dtype) for _ in range(5))

    def loss(lr: Any, differentiable: bool) -> torch.Tensor:
        p = start.clone()
        if differentiable:
            p = p.requires_grad_().clone()
            p.retain_grad()
        opt = MAKERS[case]([p], lr, differentiable)
        for g in grads:
            p.grad = g.clone()
            opt.step()
        return p.abs().square().sum()

    rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    value = loss(rate, True)
    value.backward()
    assert rate.grad is not None
    # central differences: an error of the order of h**2, and of the rounding of losses over h
    h = 1e-5
    differences = (loss(0.05 + h, False) - loss(0.05 - h, False)) / (2 * h)
    torch.testing.assert_close(rate.grad, differences, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value, loss(0.05, False), rtol=1e-12, atol=0.0)


def test_the_derivative_of_the_rate_is_torchs() -> None:
    def rate_grad(module: Any) -> float:
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        p = torch.linspace(-1, 2, 6, dtype=torch.float64).requires_grad_().clone()
        p.retain_grad()
        opt = module.RAdam([p], lr=lr, weight_decay=0.1, decoupled_weight_decay=True, differentiable=True)
        for k in range(3):
            p.grad = torch.full((6,), k + 0.5, dtype=torch.float64)
            opt.step()
        p.square().sum().backward()
        assert lr.grad is not None
        return float(lr.grad)

    assert rate_grad(adapters) == pytest.approx(rate_grad(torch.optim), rel=1e-12)


def test_a_leaf_is_refused_before_another_parameter_is_written() -> None:
    leaf = torch.ones(3, requires_grad=True)
    computed = torch.ones(3, requires_grad=True).clone()
    computed.retain_grad()
    opt = adapters.AdamW([leaf], lr=0.1, differentiable=True)
    opt.param_groups[0]["params"] = [computed, leaf]
    computed.grad, leaf.grad = torch.ones(3), torch.ones(3)

    with pytest.raises(RuntimeError, match=r"params\[1\]' is a leaf Variable that requires grad"):
        opt.step()

    assert computed.tolist() == leaf.tolist() == [1.0] * 3
    assert not opt.state
