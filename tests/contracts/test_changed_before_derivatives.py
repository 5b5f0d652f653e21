"""Tensors that are changed in place between a step and its derivative: reported by name, or read before."""

from typing import Any

import pytest
import torch

import functional_optim as fo


F32, F64 = torch.float32, torch.float64


def test_a_tensor_that_is_needed_and_changed_in_place_is_reported() -> None:
    params = {"w": torch.ones(3, requires_grad=True)}
    tx = fo.sgd(0.1, momentum=0.9)
    state = tx.init(params)
    grads = {"w": torch.ones(3)}
    new, _ = fo.apply_gradients(tx, params, grads, state)
    state[0].trace["w"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        new["w"].sum().backward()


def changed_weight(tx: Any, rate: torch.Tensor) -> torch.Tensor:
    params = {"w": torch.ones(3, requires_grad=True), "b": torch.ones(2)}
    new, _ = fo.apply_gradients(tx, params, {k: x * x for k, x in params.items()}, tx.init(params))
    with torch.no_grad():
        params["w"].mul_(2)
    return new["w"]


def changed_rate(tx: Any, rate: torch.Tensor) -> torch.Tensor:
    params = {"w": torch.ones(3), "b": torch.ones(2)}
    new, _ = fo.apply_gradients(tx, params, params, tx.init(params))
    with torch.no_grad():
        rate.mul_(2)
    return new["w"]


def changed_buffer(tx: Any, rate: torch.Tensor) -> torch.Tensor:
    params = fo.pack({"w": torch.ones(3), "b": torch.ones(2)}).map(lambda x: x.requires_grad_())
    new, _ = fo.apply_gradients(tx, params, params.map(lambda x: x * x), tx.init(params))
    with torch.no_grad():
        params.buffers[0].mul_(2)
    return new.tree()["w"]


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("make", [fo.adam, fo.sgd, lambda rate: fo.chain(fo.clip_by_global_norm(1.0), fo.adam(rate))])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (changed_weight, "It is by its shape and dtype one of: updates at 'w', params at 'w'"),
        (changed_rate, "It is by its shape and dtype one of: scale_by_learning_rate.learning_rate. Take"),
        (changed_buffer, "It is one of: updates, .*params"),
    ],
)
def test_a_tensor_that_was_changed_is_one_of_those_that_are_named(
    change: Any, named: str, make: Any, dtype: torch.dtype
) -> None:
    rate = torch.tensor(0.1, dtype=dtype, requires_grad=True)
    x = change(make(rate), rate)
    with pytest.raises(RuntimeError, match=named):
        x.sum().backward()


def test_a_number_that_is_changed_before_the_derivative_is_computed() -> None:
    """The derivative is that of the step that was taken."""
    rate = torch.tensor(0.1, dtype=F64)
    params = {"w": torch.tensor([1.0, -2.0], dtype=F64, requires_grad=True)}
    tx = fo.sgd(rate)
    new, _ = fo.apply_gradients(tx, params, {"w": params["w"] ** 2}, tx.init(params))
    rate.mul_(2)
    (d,) = torch.autograd.grad(new["w"].sum(), params["w"])
    torch.testing.assert_close(d, 1 - 0.2 * params["w"].detach())
