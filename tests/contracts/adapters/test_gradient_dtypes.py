"""Gradients of another dtype than their parameters: state is stored as torch stores it, and steps are torch's."""

from typing import Any

import pytest
import torch
from torch import nn

import functional_optim as fo
from _lib.optimizers import NAMES
from functional_optim import adapters
from functional_optim.adapters import TransformOptimizer


DTYPES = {
    "narrower": (torch.float64, torch.float32),
    "half": (torch.float32, torch.bfloat16),
    "wider": (torch.bfloat16, torch.float32),
    "wide": (torch.float32, torch.float64),
    "another": (torch.bfloat16, torch.float16),
}
# torch's other classes refuse such gradients
TAKEN = ("SGD", "RMSprop", "Adagrad", "Adadelta", "ASGD", "Rprop", "Muon", "Adafactor")
MORE: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}}
LOOPS = {"Muon": {}, "Adafactor": {"foreach": False}}


def stepped(module: Any, name: str, dtypes: tuple[torch.dtype, torch.dtype], steps: int, **kwargs: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(8, 16, generator=generator, dtype=torch.float64).to(dtypes[0]))
    p.grad_dtype = dtypes[1]
    opt = getattr(module, name)([p], **MORE.get(name, {}), **kwargs)
    for _ in range(steps):
        # also gradients that are small beside the machine epsilon of half types, which Adafactor bounds squares by
        scale = torch.logspace(-4, 0, 16, dtype=torch.float64)
        p.grad = (torch.randn(8, 16, generator=generator, dtype=torch.float64) * scale).to(dtypes[1])
        opt.step()
    return p, opt


@pytest.mark.parametrize("case", DTYPES)
@pytest.mark.parametrize("name", TAKEN)
def test_state_is_stored_and_steps_are_taken_as_by_torch(name: str, case: str) -> None:
    dtypes = DTYPES[case]
    p, ours = stepped(adapters, name, dtypes, 1)
    q, theirs = stepped(torch.optim, name, dtypes, 1, **LOOPS.get(name, {"foreach": False}))

    assert {k: x.dtype for k, x in ours.state[p].items()} == {k: x.dtype for k, x in theirs.state[q].items()}
    # a step of a few operations, each of which torch rounds to the narrowest dtype that takes part
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    torch.testing.assert_close(p, q, rtol=4 * eps, atol=4 * eps * float(ours.param_groups[0]["lr"]))
    for k, x in ours.state[p].items():
        least = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
        torch.testing.assert_close(x, theirs.state[q][k], rtol=16 * eps, atol=2 * least)


@pytest.mark.parametrize("name", [*NAMES, "Muon", "Adafactor"])
@pytest.mark.parametrize("case", DTYPES)
def test_training_goes_on_after_loading(case: str, name: str) -> None:
    """torch casts state to the parameter's dtype, and some of its classes then refuse their own gradients."""
    p, opt = stepped(adapters, name, DTYPES[case], 2)
    q, other = stepped(adapters, name, DTYPES[case], 0)
    with torch.no_grad():
        q.copy_(p)
    other.load_state_dict(opt.state_dict())
    assert {k: x.dtype for k, x in other.state[q].items()} == {k: x.dtype for k, x in opt.state[p].items()}
    for x in (p, q):
        x.grad = torch.full((8, 16), 0.5).to(DTYPES[case][1])
    opt.step()
    other.step()
    assert torch.equal(p, q)


@fo.leafwise(
    state={
        "left": fo.slot(shape=lambda p: (p.shape[0], p.shape[0])),
        "kept": fo.slot("first_update"),
        "number": fo.slot(1.0, per="leaf"),
        "half": fo.slot(dtype=torch.bfloat16),
    }
)
def together(
    u: Any, p: Any, left: Any, kept: Any, number: Any, half: Any, *, decay: float = 0.9
) -> tuple[Any, Any, Any, Any, Any]:
    """A rule that torch refuses if its tensors are of several dtypes."""
    wide = torch.promote_types(u.dtype, p.dtype)
    assert {x.dtype for x in (u, p, left, kept)} == {wide}
    assert half.dtype is torch.bfloat16  # asked for
    assert number.dtype in (torch.float32, torch.float64)
    left = torch.lerp(left, u @ u.T, 1 - decay)
    return left @ u + 0.1 * p, left, kept, number + 1, half


@pytest.mark.parametrize("case", DTYPES)
def test_a_rule_for_whole_tensors_is_given_one_dtype(case: str) -> None:
    own, of_grads = DTYPES[case]
    generator = torch.Generator().manual_seed(0)

    def tree(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {k: torch.randn(3, 5, generator=generator, dtype=torch.float64).to(dtype) for k in "ab"}

    params, grads, tx = tree(own), tree(of_grads), together()
    wide = torch.promote_types(own, of_grads)
    u, p = grads["a"].to(wide), params["a"].to(wide)
    left = torch.lerp(torch.zeros(3, 3, dtype=wide), u @ u.T, 1 - 0.9)

    updates, state = tx.update(grads, tx.init(params), params)

    torch.testing.assert_close(updates["a"], (left @ u + 0.1 * p).to(of_grads).to(wide), rtol=0.0, atol=0.0)
    assert state.left["a"].dtype is own
    torch.testing.assert_close(state.left["a"], left.to(own), rtol=0.0, atol=0.0)
    torch.testing.assert_close(state.kept["a"], grads["a"].to(own), rtol=0.0, atol=0.0)
    assert state.number["a"] == 2.0

    leaves = [nn.Parameter(p.clone()) for p in params.values()]
    opt = TransformOptimizer(leaves, fo.chain(together(), fo.scale(-0.5)))
    for x, g in zip(leaves, grads.values(), strict=True):
        x.grad_dtype, x.grad = of_grads, g
    opt.step()
    torch.testing.assert_close(opt.state[leaves[0]]["left"], left.to(own), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("tx", [fo.lbfgs(), fo.lbfgs(0.1, linesearch=None)], ids=["searched", "plain"])
@pytest.mark.parametrize("case", DTYPES)
def test_lbfgs_takes_gradients_of_another_dtype(case: str, tx: Any) -> None:
    own, of_grads = DTYPES[case]
    params = {"w": torch.linspace(-1, 2, 12).reshape(4, 3).to(own)}

    def objective(tree: dict[str, torch.Tensor]) -> torch.Tensor:
        return (tree["w"].double() ** 4).sum() + (tree["w"].double() ** 2).sum()

    first, state = objective(params), tx.init(params)
    for _ in range(4):
        grads = {k: g.to(of_grads) for k, g in torch.func.grad(objective)(params).items()}
        extra = {"value": objective(params), "grad": grads, "value_fn": objective}
        params, state = fo.apply_gradients(tx, params, grads, state, **extra)
    assert params["w"].dtype is own
    assert objective(params) < first


@pytest.mark.parametrize("make", [lambda: fo.scale(-0.5), lambda: fo.orthogonalize(), lambda: fo.trace(0.5)])
def test_the_dtype_of_updates_follows_from_the_tensors_of_this_step(make: Any) -> None:
    """Not from those of an earlier step of the same transformation."""
    tx = make()
    for own in (torch.float64, torch.float32, torch.bfloat16, torch.float64):
        for of_grads in (torch.float32, torch.bfloat16):
            params, grads = {"w": torch.ones(2, 2, dtype=own)}, {"w": torch.eye(2, dtype=of_grads)}
            updates, _ = tx.update(grads, tx.init(params), params)
            assert updates["w"].dtype is torch.promote_types(own, of_grads)
            assert tx.update(grads, tx.init(params))[0]["w"].dtype is of_grads
