"""`torch.optim.swap_in_optimizer_params_and_state`: a step on other parameters and states, and a trace of one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import functional_optim as fo
from _lib.compare import EXACT
from _lib.training import fit, make_batches, make_model, values
from functional_optim import adapters


if not hasattr(torch.optim, "swap_in_optimizer_params_and_state"):
    pytest.skip("torch.optim of this version cannot swap parameters and states in", allow_module_level=True)
swap_in_optimizer_params_and_state = torch.optim.swap_in_optimizer_params_and_state


def chain(model: torch.nn.Module) -> Any:
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(fo.linear_schedule(0.1, 0.0, 10)), fo.params_ema(0.9))
    return adapters.TransformOptimizer(model.parameters(), tx)


OPTIMIZERS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "SGD": lambda m: adapters.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True),
    "AdamW": lambda m: adapters.AdamW(m.parameters(), lr=0.05),
    "LAMB": lambda m: adapters.LAMB(m.parameters(), lr=0.05, weight_decay=0.1),
    "chain": chain,
}
NAME = pytest.mark.parametrize("name", OPTIMIZERS)
# The step as torch operations and the kernel differ by the fused multiply-adds that torch's operations have none of,
# and by the order in which a norm is summed over 212 elements: some units of 2**-53 in each of some ten operations,
# in updates below one tenth of parameters of order one.
TRACED: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14}


def trained(name: str) -> tuple[torch.nn.Module, Any]:
    model = make_model()
    optimizer = OPTIMIZERS[name](model)
    fit(model, optimizer, make_batches(2))
    return model, optimizer


def with_grads(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a model's parameters, with copies of their gradients."""
    copies = {}
    for name, p in model.named_parameters():
        copies[name] = p.detach().clone().requires_grad_()
        assert p.grad is not None
        copies[name].grad = p.grad.clone()
    return copies


def state_copy(optimizer: Any) -> dict[str, Any]:
    return pytree.tree_map_only(torch.Tensor, torch.clone, optimizer.state_dict())  # type: ignore[no-any-return]


@NAME
def test_step_on_tensors_swapped_in(name: str) -> None:
    model, optimizer = trained(name)
    params, state = with_grads(model), state_copy(optimizer)
    live = values(list(model.parameters())), values(list(optimizer.state.values()))
    identity = optimizer.state, [g["params"] for g in optimizer.param_groups]
    with swap_in_optimizer_params_and_state(optimizer, params, state):
        optimizer.step()
    assert optimizer.state is identity[0]
    assert all(a is g["params"] for a, g in zip(identity[1], optimizer.param_groups, strict=True))
    torch.testing.assert_close(
        (values(list(model.parameters())), values(list(optimizer.state.values()))), live, **EXACT
    )

    optimizer.step()  # the same step, on the live ones
    torch.testing.assert_close(values(list(params.values())), values(list(model.parameters())), **EXACT)
    torch.testing.assert_close(values(list(state["state"].values())), values(list(optimizer.state.values())), **EXACT)


@NAME
def test_options_that_are_swapped_in(name: str) -> None:
    model, optimizer = trained(name)
    params, state = with_grads(model), state_copy(optimizer)
    state["param_groups"][0]["lr"] = 0.0
    lr = optimizer.param_groups[0]["lr"]
    with swap_in_optimizer_params_and_state(optimizer, params, state):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == lr
    torch.testing.assert_close(values(list(params.values())), values(list(model.parameters())), **EXACT)


def test_params_and_state_are_restored_after_an_exception() -> None:
    model, optimizer = trained("AdamW")
    state = optimizer.state
    with (
        pytest.raises(ZeroDivisionError),
        swap_in_optimizer_params_and_state(optimizer, with_grads(model), state_copy(optimizer)),
    ):
        raise ZeroDivisionError
    assert optimizer.state is state
    assert optimizer.param_groups[0]["params"] == list(model.parameters())


@NAME
def test_trace_of_a_step(name: str) -> None:
    """Traced with fake tensors, as torch's documentation has it; the graph then runs on real ones."""
    from torch._subclasses import FakeTensorMode  # each takes a second to import
    from torch.fx.experimental.proxy_tensor import make_fx

    model, optimizer = trained(name)
    live = values(list(model.parameters())), values(list(optimizer.state.values()))
    real = {n: p.detach() for n, p in with_grads(model).items()}
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    state = state_copy(optimizer)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = [pytree.tree_map_only(torch.Tensor, mode.from_tensor, x) for x in (real, grads, state)]

    def step(params: dict[str, Any], grads: dict[str, Any], state: dict[str, Any]) -> Any:
        for k, p in params.items():
            p.grad = grads[k]
        with swap_in_optimizer_params_and_state(optimizer, params, state):
            optimizer.step()
        return params, state

    graph = make_fx(step)(*fake)
    torch.testing.assert_close(
        (values(list(model.parameters())), values(list(optimizer.state.values()))), live, **EXACT
    )
    params, state = graph(real, grads, state)
    optimizer.step()
    torch.testing.assert_close(values(list(params.values())), values(list(model.parameters())), **TRACED)
    torch.testing.assert_close(values(list(state["state"].values())), values(list(optimizer.state.values())), **TRACED)
    # a number that was read while tracing would be a constant: a second run continues like a second step
    params, state = graph(params, grads, state)
    optimizer.step()
    torch.testing.assert_close(values(list(params.values())), values(list(model.parameters())), **TRACED)
