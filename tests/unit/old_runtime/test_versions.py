"""Versions of tensors that kernels have written to."""

from array import array
from typing import Any

import pytest
import torch

import functional_optim as fo
from functional_optim.adapters import AdamW
from functional_optim.kernels import Column
from functional_optim.kernels.guard import Guard
from functional_optim.kernels.versions import count_up


def column(tensors: list[torch.Tensor]) -> Column:
    """A column that has been looked at, in C where there is a compiler."""
    fo.apply_gradients(fo.sgd(0.1), [torch.ones(1)], [torch.ones(1)], fo.sgd(0.1).init([torch.ones(1)]))
    made = Column(tensors)
    guard = Guard(made)
    for _ in range(2):
        assert guard.holds(made)
    return made


def test_every_tensor_is_counted() -> None:
    whole, own = torch.ones(6), torch.ones(2)
    for k in range(1, 4):
        count_up(column([whole[:2], whole[2:4], own]), array("q", range(3)))

        assert (whole._version, own._version) == (2 * k, k)


def test_only_what_is_named_is_counted() -> None:
    a, b = torch.ones(2), torch.ones(2)

    count_up(column([a, b]), array("q", [1]))

    assert (a._version, b._version) == (0, 1)


def test_a_column_that_nobody_has_looked_at() -> None:
    a, b = torch.ones(2), torch.ones(2)

    count_up(Column([a, b]), array("q", [0, 1]))

    assert (a._version, b._version) == (1, 1)


def test_memory_with_a_version_of_its_own() -> None:
    """`x.data` has the memory of `x`, but counts for itself."""
    whole = torch.ones(4)

    count_up(column([whole[:2], whole[2:].data]), array("q", [0]))
    count_up(column([whole[:2], apart := whole[2:].data]), array("q", [1]))

    assert (whole._version, apart._version) == (1, 1)


def test_inference_tensors_are_passed_over() -> None:
    with torch.inference_mode():
        x = torch.ones(2)
    y = torch.ones(2)

    count_up(column([x, y]), array("q", [0, 1]))

    assert y._version == 1


@pytest.mark.parametrize("first", [True, False])
def test_tensors_made_in_inference_mode_come_and_go(first: bool) -> None:
    tx = fo.chain(fo.trace(0.9), fo.scale(-0.1))

    def tensors() -> tuple[Any, Any]:
        return [torch.ones(3) for _ in range(20)], [torch.ones(3) for _ in range(20)]

    def steps(params: Any, grads: Any, state: Any, n: int) -> None:
        for _ in range(n):
            fo.apply_gradients(tx, params, grads, state, donate=True)

    params, grads = tensors()
    if not first:
        steps(params, grads, tx.init(params), 1)
    with torch.inference_mode():
        others = tensors()
        steps(*others, tx.init(others[0]), 1 if first else 3)
    start = params[7]._version
    x = torch.ones(3, requires_grad=True)
    saved = x * params[7]
    state = tx.init(params)

    steps(params, grads, state, 3)
    before = state[0].trace[7]._version
    steps(params, grads, state, 2)

    assert params[7]._version == start + 5
    assert state[0].trace[7]._version == before + 2 * 20  # which all parts of the state share
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_state_loaded_in_inference_mode_does_not_keep_parameters_from_being_counted() -> None:
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(20)]
    opt = AdamW(params)
    for p in params:
        p.grad = torch.ones(4)
    opt.step()
    saved = opt.state_dict()
    with torch.inference_mode():
        opt.load_state_dict(saved)
    start = params[3]._version

    for _ in range(3):
        opt.step()

    assert params[3]._version == start + 3


def test_state_that_is_replaced_by_its_data_is_counted() -> None:
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(40)]
    opt = AdamW(params)
    for p in params:
        p.grad = torch.ones(4)
    for _ in range(3):
        opt.step()
    state = opt.state[params[7]]
    for _ in range(2):
        state["exp_avg"] = state["exp_avg"].data
    start = state["exp_avg"]._version

    opt.step()

    assert state["exp_avg"]._version == start + 1
