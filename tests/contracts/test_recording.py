"""Steps that autograd records: derivatives that are asked for, and a warning where nobody asks for any."""

import functools
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


def in_one(tx: Any, params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
    return fo.apply_gradients(tx, params, grads, state)


def in_two(tx: Any, params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
    updates, state = tx.update(grads, state, params)
    return fo.apply_updates(params, updates), state


forms = pytest.mark.parametrize("step", [in_one, in_two])


@forms
@pytest.mark.parametrize("chain", CHAINS)
def test_the_warning_names_the_line_of_the_caller(chain: str, step: Any) -> None:
    tx = CHAINS[chain]()
    params: dict[str, Any] = dict(model().named_parameters())
    state, grads = tx.init(params), {k: torch.ones_like(p) for k, p in params.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            params, state = step(tx, params, grads, state)
    assert {w.filename for w in caught} == {__file__}


def warned(body: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        body()
    return [str(w.message) for w in caught]


@forms
@pytest.mark.parametrize("chain", CHAINS)
def test_a_loop_over_parameters_of_a_module_warns_once_with_both_ways_out(chain: str, step: Any) -> None:
    def loop() -> None:
        tx, params = CHAINS[chain](), dict(model().named_parameters())
        state: Any = tx.init(params)
        for _ in range(STEPS):
            grads = {k: torch.ones_like(p) for k, p in params.items()}
            params, state = step(tx, params, grads, state)

    found = warned(loop)
    assert len(found) == 1
    assert "no_grad" in found[0]
    assert "detach" in found[0]


@forms
@pytest.mark.parametrize("way", ["detach", "no_grad", "one step", "donation"])
@pytest.mark.parametrize("chain", CHAINS)
def test_no_warning_where_nothing_grows(chain: str, way: str, step: Any) -> None:
    def loop() -> None:
        tx, params = CHAINS[chain](), dict(model().named_parameters())
        if way == "detach":
            params = {k: p.detach() for k, p in params.items()}  # type: ignore[misc]
        with torch.set_grad_enabled(way in ("detach", "one step")):
            state: Any = tx.init(params)
            for _ in range(1 if way == "one step" else STEPS):
                grads = {k: torch.ones_like(p) for k, p in params.items()}
                donated = functools.partial(fo.apply_gradients, donate=True)
                params, state = (donated if way == "donation" else step)(tx, params, grads, state)

    assert warned(loop) == []


@forms
@pytest.mark.parametrize("asks", ["a learning rate", "gradients"])
def test_no_warning_where_a_derivative_is_asked_for(asks: str, step: Any) -> None:
    """As in learning to learn, whose graph is meant to grow."""

    def loop() -> None:
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=asks == "a learning rate")
        tx, params = fo.sgd(lr), {"w": torch.ones(3, dtype=torch.float64, requires_grad=True)}
        state = tx.init(params)
        for _ in range(STEPS):
            grads = {"w": params["w"] ** 2 if asks == "gradients" else torch.ones(3, dtype=torch.float64)}
            params, state = step(tx, params, grads, state)
        params["w"].sum().backward()

    assert warned(loop) == []


# -- slots that start at the parameters -------------------------------------------------------------------------------


@fo.elementwise(state={"first": fo.slot("param")})
def pull(u: Any, p: Any, first: Any) -> Any:
    return u + 0.3 * (p - first), first


@fo.leafwise(state={"first": fo.slot(lambda p: p.sin())})
def pull_to_sine(u: Any, p: Any, first: Any) -> Any:
    return u + 0.3 * (p - first), first


def averaged(w: torch.Tensor) -> torch.Tensor:
    return result(fo.chain(fo.sgd(0.1), fo.params_ema(0.9)), w)


def pulled(w: torch.Tensor) -> torch.Tensor:
    return result(fo.chain(pull(), fo.sgd(0.1)), w)


def pulled_to_sine(w: torch.Tensor) -> torch.Tensor:
    return result(fo.chain(pull_to_sine(), fo.sgd(0.1)), w)


def result(tx: Any, w: torch.Tensor) -> torch.Tensor:
    """The average, or the parameters, after some steps."""
    params = {"w": w}
    state = tx.init(params)
    for _ in range(STEPS):
        params, state = fo.apply_gradients(tx, params, {"w": params["w"] ** 3}, state)
    return (fo.eval_params(state, params) if "params_ema" in repr(tx) else params)["w"].sum()


def by_hand(w: torch.Tensor, pull_to: Any = None) -> torch.Tensor:
    y, mean = w, w
    for _ in range(STEPS):
        y = y - 0.1 * (y**3 + (0 if pull_to is None else 0.3 * (y - pull_to)))
        mean = 0.9 * mean + (1 - 0.9) * y
    return (mean if pull_to is None else y).sum()


STARTS: dict[str, tuple[Any, Any]] = {
    "an average": (averaged, by_hand),
    "a slot": (pulled, lambda w: by_hand(w, w)),
    "a slot that a function makes": (pulled_to_sine, lambda w: by_hand(w, w.sin())),
}
W = torch.tensor([0.5, -1.0, 1.5], dtype=torch.float64)


def dual(f: Any, w: torch.Tensor) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(w, w))).tangent


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, w: torch.func.grad(f)(w),
    "jvp": lambda f, w: torch.func.jvp(f, (w,), (w,))[1],
    "forward mode": dual,
    "vmap of grad": lambda f, w: torch.func.vmap(torch.func.grad(f))(torch.stack([w, 2 * w])),
    "autograd, of what is no leaf": lambda f, w: torch.autograd.grad(f(1.0 * w.requires_grad_()), w),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("start", STARTS)
def test_derivatives_have_the_term_of_slots_that_start_at_the_parameters(start: str, transform: str) -> None:
    found, expected = (TRANSFORMS[transform](f, W.clone()) for f in STARTS[start])
    torch.testing.assert_close(found, expected, **DOUBLE)


def test_members_of_vmap_start_without_a_gradient_as_single_models_do() -> None:
    params = {"w": torch.ones(4, 2, requires_grad=True)}
    assert not torch.func.vmap(fo.params_ema(0.9).init)(params).ema["w"].requires_grad
