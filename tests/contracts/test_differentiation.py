"""Gradients through steps, and steps of many models at once with `torch.func.vmap`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.chains import Halve
from _lib.compare import DOUBLE
from _lib.trees import leaves


# --- gradients through steps


def unrolled(tx_of: Callable[..., Any], n: int = 3) -> Callable[..., torch.Tensor]:
    """A function of parameters and hyper-parameters: the loss after some steps of gradient descent on it."""

    def loss(w: torch.Tensor) -> torch.Tensor:
        return (w.sin() * torch.arange(1.0, 4.0, dtype=torch.float64)).sum() + w.prod()

    def run(w: torch.Tensor, *hypers: torch.Tensor) -> torch.Tensor:
        tx, params = tx_of(*hypers), {"w": w}
        state = tx.init(params)
        for _ in range(n):
            grads = torch.func.grad(lambda p: loss(p["w"]))(params)
            params, state = fo.apply_gradients(tx, params, grads, state)
        return loss(params["w"])

    return run


def weights() -> torch.Tensor:
    return torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)


def number(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64, requires_grad=True)


DIFFERENTIABLE: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "sgd": (lambda lr: fo.sgd(lr), (number(0.1),)),
    "momentum": (lambda lr, mu: fo.sgd(lr, mu, nesterov=True), (number(0.1), number(0.9))),
    "adam": (
        lambda lr, b1, b2, eps: fo.adam(lr, b1, b2, eps_root=eps),
        (number(0.1), number(0.9), number(0.99), number(1e-3)),
    ),
    "clip, decay and average": (
        lambda norm, wd, lr: fo.chain(fo.clip_by_global_norm(norm), fo.adamw(lr, weight_decay=wd), fo.params_ema(0.9)),
        (number(0.5), number(0.1), number(0.1)),
    ),
    "lamb": (lambda lr: fo.lamb(lr, weight_decay=0.1), (number(0.1),)),
    "where a state starts": (
        lambda start, lr: fo.chain(fo.scale_by_rss(initial_accumulator_value=start), fo.rprop(lr)),
        (number(0.2), number(0.1)),
    ),
    "mask and partition": (
        lambda lr: fo.masked(fo.partition({"a": fo.chain(fo.scale_by_rms(), fo.scale(-1.0 * lr))}, "a"), True),
        (number(0.1),),
    ),
    "schedule of a number": (lambda lr: fo.sgd(lambda count: lr * 0.5**count), (number(0.1),)),
    "barrier": (lambda lr: fo.chain(fo.trace(0.9), Halve(), fo.scale_by_learning_rate(lr)), (number(0.1),)),
}


# gradcheck's defaults compare with central differences of step 1e-6: in double precision their error is about
# eps / step = 1e-10 from rounding and step**2 = 1e-12 from truncation, far below its tolerances of 1e-5 and 1e-3
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_unrolled_steps(name: str) -> None:
    tx_of, hypers = DIFFERENTIABLE[name]

    assert torch.autograd.gradcheck(unrolled(tx_of), (weights(), *hypers))


# torch scripts some of its own forward derivatives when the first one is asked for
ignore_scripting = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@ignore_scripting
@pytest.mark.parametrize("name", ["momentum", "adam", "clip, decay and average"])
def test_forward_mode_of_unrolled_steps(name: str) -> None:
    tx_of, hypers = DIFFERENTIABLE[name]
    args = (weights().detach(), *(h.detach() for h in hypers))
    run = unrolled(tx_of)
    tangents = tuple(torch.ones_like(x) * k for k, x in enumerate(args, 1))
    gradients = torch.func.grad(run, argnums=tuple(range(len(args))))(*args)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))

    _, actual = torch.func.jvp(run, args, tangents)

    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)  # some hundred operations in another order


@ignore_scripting
def test_forward_mode_without_a_transformation() -> None:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones(2), torch.tensor([1.0, 2.0]))
        tx = fo.scale(-3.0)

        new, _ = fo.apply_gradients(tx, torch.zeros(2), dual, tx.init(torch.zeros(2)))
        tangent = torch.autograd.forward_ad.unpack_dual(new).tangent

    torch.testing.assert_close(tangent, torch.tensor([-3.0, -6.0]))


def test_the_gradient_of_a_learning_rate() -> None:
    """Hypergradient descent in one line: d loss / d lr = -g(w) . g(w - lr g(w)) for one step of plain descent."""
    w, lr = torch.tensor([1.0, -2.0], dtype=torch.float64), number(0.1)
    scale = torch.tensor([1.0, 3.0], dtype=torch.float64)  # loss = scale . w**2 / 2
    tx = fo.sgd(lr)

    params, _ = fo.apply_gradients(tx, {"w": w}, {"w": scale * w}, tx.init({"w": w}))
    (gradient,) = torch.autograd.grad((scale * params["w"] ** 2).sum() / 2, lr)

    torch.testing.assert_close(gradient, -(scale * w * scale * (w - 0.1 * scale * w)).sum(), **DOUBLE)


@pytest.mark.parametrize("backend", ["reference", "c", "triton"])
def test_parameters_that_require_gradients_are_differentiable(backend: str) -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    tx = fo.sgd(0.5)

    with fo.use_backend(backend):
        params, _ = fo.apply_gradients(tx, {"w": w}, {"w": w**2}, tx.init({"w": w}))
    (gradient,) = torch.autograd.grad(params["w"].sum(), w)

    torch.testing.assert_close(gradient, torch.tensor([0.0, -1.0]))  # d (w - w**2 / 2) / dw


def test_no_grad_means_no_gradient() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    tx = fo.sgd(torch.tensor(0.5, requires_grad=True), 0.9)

    with torch.no_grad():
        params, state = fo.apply_gradients(tx, {"w": w}, {"w": w}, tx.init({"w": w}))

    assert not any(x.requires_grad for x in leaves((params, state)))


def test_a_state_starts_without_a_gradient() -> None:
    params = {"w": torch.ones(2, requires_grad=True)}

    state = fo.chain(fo.scale_by_adam(), fo.zero_nans(), fo.params_ema(0.9)).init(params)

    assert not any(x.requires_grad for x in leaves(state))


# --- torch.func.vmap


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "clip, decay and average", "lamb"])
def test_an_ensemble_with_hyper_parameters_of_its_own(name: str) -> None:
    tx_of, hypers = DIFFERENTIABLE[name]
    members = [[h.detach() * (1 - 0.1 * k) for h in hypers] for k in range(4)]
    starts = torch.stack([weights().detach() + 0.1 * k for k in range(4)])
    run = unrolled(tx_of)
    expected = torch.stack([run(w, *hs) for w, hs in zip(starts, members, strict=True)])

    actual = torch.func.vmap(run)(starts, *map(torch.stack, zip(*members, strict=True)))

    torch.testing.assert_close(actual, expected, **DOUBLE)


def test_an_ensemble_with_states() -> None:
    """States are trees that vmap takes and returns."""
    tx = fo.chain(fo.clip_by_global_norm(0.5), fo.adam(0.1))
    params = {"w": torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    rates = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

    def step(rate: torch.Tensor, p: Any, state: Any) -> Any:
        return fo.apply_gradients(tx, p, {"w": rate * p["w"]}, state)

    states = torch.func.vmap(tx.init)(params)
    actual = params
    for _ in range(3):
        actual, states = torch.func.vmap(step)(rates, actual, states)

    for k in range(4):
        p = {"w": params["w"][k]}
        state = tx.init(p)
        for _ in range(3):
            p, state = step(rates[k], p, state)
        torch.testing.assert_close(actual["w"][k], p["w"], **DOUBLE)


def test_gradients_per_example() -> None:
    """vmap over grad over a step."""
    run = unrolled(lambda lr: fo.sgd(lr, 0.9))
    rates = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    w = weights().detach()
    expected = torch.stack([torch.func.grad(run, argnums=1)(w, rate) for rate in rates])

    actual = torch.func.vmap(torch.func.grad(run, argnums=1), (None, 0))(w, rates)

    torch.testing.assert_close(actual, expected, **DOUBLE)
