"""Tensors that a function of `torch.func` has let out, or that a step within it may not write to."""

from typing import Any

import pytest
import torch

import functional_optim as fo


def escaped(transform: Any, x: torch.Tensor) -> torch.Tensor:
    """A wrapper of a transformation, which the function has stored elsewhere."""
    kept: list[torch.Tensor] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x.sum()

    transform(function)(x)
    return kept[0]


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("bound", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize("which", ["params", "updates", "state scale_by_adam.mu", "a hyper-parameter"])
def test_a_member_that_has_escaped_from_vmap(which: str, bound: bool, donate: bool) -> None:
    x = escaped(torch.vmap, torch.ones(3) if which == "a hyper-parameter" else torch.ones(3, 2))
    tx = fo.adam(x if which == "a hyper-parameter" else 0.1)
    trees = {name: {"w": torch.ones(2)} for name in ("params", "updates")}
    state = tx.init(trees["params"])
    if bound and which != "a hyper-parameter":
        fo.apply_gradients(tx, trees["params"], trees["updates"], state, donate=donate)
    if which in trees:
        trees[which] = {"w": x}
    elif which != "a hyper-parameter":
        state = (state[0]._replace(mu={"w": x}), *state[1:])
    count = int(state[0].count)
    with pytest.raises(ValueError, match=f"{which}.* has escaped from a function that `torch.vmap` maps"):
        fo.apply_gradients(tx, trees["params"], trees["updates"], state, donate=donate)
    assert int(state[0].count) == count


def test_a_tensor_that_has_escaped_from_grad_is_its_value() -> None:
    """As for operations of torch."""
    tx, params = fo.adam(0.1), {"w": torch.ones(2)}
    grads = {"w": torch.tensor([1.0, -2.0])}
    new, _ = fo.apply_gradients(tx, params, {"w": escaped(torch.func.grad, grads["w"])}, tx.init(params))
    expected, _ = fo.apply_gradients(tx, params, grads, tx.init(params))
    assert torch.equal(new["w"].detach(), expected["w"])


def test_donating_within_a_transformation_names_what_follows() -> None:
    tx, params = fo.sgd(0.1), {"w": torch.ones(2)}
    step = torch.vmap(lambda g: fo.apply_gradients(tx, params, {"w": g}, tx.init(params), donate=True)[0]["w"])
    with pytest.raises(
        RuntimeError, match=r"which a torch\.func transformation cannot follow.*take the step outside"
    ) as e:
        step(torch.ones(3, 2))
    assert "torch.compile" not in str(e.value)
