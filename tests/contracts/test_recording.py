"""Steps that autograd records: derivatives that are asked for, and a warning where nobody asks for any."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import functional_optim as fo
from _lib.compare import DOUBLE


STEPS = 20
CHAINS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: fo.sgd(0.1),
    "AdamW": lambda: fo.adamw(0.1),
    "clip and average": lambda: fo.chain(fo.clip_by_global_norm(1.0), fo.adam(0.1), fo.params_ema(0.9)),
    "an opaque transformation": lambda: fo.chain(
        fo.stateless(lambda updates, params: {k: 2 * u for k, u in updates.items()}), fo.sgd(0.1)
    ),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2, dtype=torch.float64)


def warned(body: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        body()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("chain", CHAINS)
def test_the_warning_names_the_line_of_the_caller(chain: str) -> None:
    tx = CHAINS[chain]()
    params: dict[str, Any] = dict(model().named_parameters())
    state, grads = tx.init(params), {k: torch.ones_like(p) for k, p in params.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            params, state = fo.apply_gradients(tx, params, grads, state)
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize("chain", CHAINS)
def test_a_loop_over_parameters_of_a_module_warns_once_with_both_ways_out(chain: str) -> None:
    def loop() -> None:
        tx, params = CHAINS[chain](), dict(model().named_parameters())
        state: Any = tx.init(params)
        for _ in range(STEPS):
            grads = {k: torch.ones_like(p) for k, p in params.items()}
            params, state = fo.apply_gradients(tx, params, grads, state)

    found = warned(loop)
    assert len(found) == 1
    assert "no_grad" in found[0]
    assert "detach" in found[0]


@pytest.mark.parametrize("way", ["detach", "no_grad", "one step", "donation"])
@pytest.mark.parametrize("chain", CHAINS)
def test_no_warning_where_nothing_grows(chain: str, way: str) -> None:
    def loop() -> None:
        tx, params = CHAINS[chain](), dict(model().named_parameters())
        if way == "detach":
            params = {k: p.detach() for k, p in params.items()}  # type: ignore[misc]
        with torch.set_grad_enabled(way in ("detach", "one step")):
            state: Any = tx.init(params)
            for _ in range(1 if way == "one step" else STEPS):
                grads = {k: torch.ones_like(p) for k, p in params.items()}
                params, state = fo.apply_gradients(tx, params, grads, state, donate=way == "donation")

    assert warned(loop) == []


@pytest.mark.parametrize("asks", ["a learning rate", "gradients"])
def test_no_warning_where_a_derivative_is_asked_for(asks: str) -> None:
    """As in learning to learn, whose graph is meant to grow."""

    def loop() -> None:
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=asks == "a learning rate")
        tx, params = fo.sgd(lr), {"w": torch.ones(3, dtype=torch.float64, requires_grad=True)}
        state = tx.init(params)
        for _ in range(STEPS):
            grads = {"w": params["w"] ** 2 if asks == "gradients" else torch.ones(3, dtype=torch.float64)}
            params, state = fo.apply_gradients(tx, params, grads, state)
        params["w"].sum().backward()

    assert warned(loop) == []


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_the_derivative_of_an_average_has_the_parameters_that_it_starts_at(decay: float) -> None:
    """The average of n steps is its start times decay**n and more; a derivative without that term would be wrong."""
    tx = fo.chain(fo.sgd(0.1), fo.params_ema(decay))

    def average(w: torch.Tensor) -> torch.Tensor:
        params = {"w": 1.0 * w}  # a state starts without the graph of leaves, which training begins with
        state = tx.init(params)
        for _ in range(STEPS):
            params, state = fo.apply_gradients(tx, params, {"w": params["w"] ** 3}, state)
        return fo.eval_params(state, params)["w"].sum()

    w = torch.tensor([0.5, -1.0, 1.5], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(average(w), w)
    start = w.detach().requires_grad_()
    y, e = start, start
    for _ in range(STEPS):
        y = y - 0.1 * y**3
        e = decay * e + (1 - decay) * y
    (expected,) = torch.autograd.grad(e.sum(), start)
    torch.testing.assert_close(found, expected, **DOUBLE)
    torch.testing.assert_close(torch.func.grad(average)(w.detach()), expected, **DOUBLE)
