"""The algorithms of torch.optim that are functions of one element, against their papers' formulas in NumPy, in float64.

Neither optax nor torch is asked; where optax is wrong, ours is seen to differ from it.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import optax
import pytest
import torch

import functional_optim as fo
from functional_optim import adapters


STEPS = 25
Array = Any
# A formula takes the parameters and the gradients of all steps, and yields the parameters after each.
Formula = Callable[[Array, Array], Iterator[Array]]


def adadelta(x: Array, gradients: Array, rate: float = 1.0, rho: float = 0.9, eps: float = 1e-6) -> Iterator[Array]:
    squares, steps = np.zeros_like(x), np.zeros_like(x)
    for g in gradients:
        squares = rho * squares + (1 - rho) * g**2
        step = np.sqrt(steps + eps) / np.sqrt(squares + eps) * g
        steps = rho * steps + (1 - rho) * step**2
        x = x - rate * step
        yield x


def adagrad(x: Array, gradients: Array, rate: float = 0.1, decay: float = 0.5, first: float = 0.1) -> Iterator[Array]:
    for t, g in enumerate(gradients):
        x = x - rate / (1 + t * decay) * g / (np.sqrt(first + np.sum(gradients[: t + 1] ** 2, axis=0)) + 1e-10)
        yield x


def adamax(x: Array, gradients: Array, rate: float = 0.01, b1: float = 0.9, b2: float = 0.95) -> Iterator[Array]:
    for t in range(1, len(gradients) + 1):
        past = np.arange(t - 1, -1, -1).reshape(-1, 1)
        mean = np.sum((1 - b1) * b1**past * gradients[:t], axis=0) / (1 - b1**t)
        largest = np.max(b2**past * (np.abs(gradients[:t]) + 1e-8), axis=0)
        x = x - rate * mean / largest
        yield x


def moments(gradients: Array, t: int, b1: float, b2: float) -> tuple[Array, Array]:
    past = np.arange(t - 1, -1, -1).reshape(-1, 1)
    first = np.sum((1 - b1) * b1**past * gradients[:t], axis=0)
    return first, np.sum((1 - b2) * b2**past * gradients[:t] ** 2, axis=0)


def nadam(x: Array, gradients: Array, rate: float = 0.01, decay: float = 0.1) -> Iterator[Array]:
    b1, b2 = 0.9, 0.95
    momentum = [b1 * (1 - 0.5 * 0.96 ** (t * decay)) for t in range(len(gradients) + 2)]
    for t, g in enumerate(gradients, 1):
        m, v = moments(gradients, t, b1, b2)
        ahead = momentum[t + 1] * m / (1 - np.prod(momentum[1 : t + 2]))
        ahead = ahead + (1 - momentum[t]) * g / (1 - np.prod(momentum[1 : t + 1]))
        x = x - rate * ahead / (np.sqrt(v / (1 - b2**t)) + 1e-8)
        yield x


def radam(x: Array, gradients: Array, rate: float = 0.01) -> Iterator[Array]:
    b1, b2 = 0.9, 0.95
    most = 2 / (1 - b2) - 1
    for t in range(1, len(gradients) + 1):
        m, v = moments(gradients, t, b1, b2)
        m, v = m / (1 - b1**t), v / (1 - b2**t)
        length = most - 2 * t * b2**t / (1 - b2**t)
        if length > 5:
            above, below = (length - 4) * (length - 2) * most, (most - 4) * (most - 2) * length
            x = x - rate * np.sqrt(above / below) * m / np.sqrt(v)
        else:
            x = x - rate * m
        yield x


def rprop(x: Array, gradients: Array, rate: float = 0.1) -> Iterator[Array]:
    sizes, before = np.full_like(x, rate), np.zeros_like(x)
    for g in gradients:
        x, g = x.copy(), g.copy()
        for i in range(len(x)):
            if g[i] * before[i] > 0:
                sizes[i] = min(sizes[i] * 1.2, 50.0)
            elif g[i] * before[i] < 0:
                sizes[i] = max(sizes[i] * 0.5, 1e-6)
                g[i] = 0.0
            x[i] -= sizes[i] * np.sign(g[i])
        before = g
        yield x


def asgd(x: Array, gradients: Array, rate: float = 0.1, lambd: float = 0.5, alpha: float = 0.6) -> Iterator[Array]:
    for t, g in enumerate(gradients):
        eta = rate / (1 + lambd * rate * t) ** alpha
        x = x - eta * (g + lambd * x)
        yield x


class Case(NamedTuple):
    """An algorithm.

    Args:
      formula: its formula.
      pure: the transformation.
      drop_in: the class of torch, with its arguments.
    """

    formula: Formula
    pure: fo.GradientTransformation
    drop_in: Callable[[Any], torch.optim.Optimizer]


CASES = {
    "adadelta": Case(adadelta, fo.adadelta(), lambda ps: adapters.Adadelta(ps)),
    "adagrad": Case(
        adagrad,
        fo.chain(fo.scale_by_rss(0.1, 1e-10, eps_in_sqrt=False), fo.scale_by_schedule(lambda t: -0.1 / (1 + t * 0.5))),
        lambda ps: adapters.Adagrad(ps, 0.1, 0.5, initial_accumulator_value=0.1),
    ),
    "adamax": Case(adamax, fo.adamax(0.01, b2=0.95), lambda ps: adapters.Adamax(ps, 0.01, (0.9, 0.95))),
    "nadam": Case(
        nadam,
        fo.nadam(0.01, b2=0.95, momentum_decay=0.1),
        lambda ps: adapters.NAdam(ps, 0.01, (0.9, 0.95), momentum_decay=0.1),
    ),
    "radam": Case(radam, fo.radam(0.01, b2=0.95, eps=0.0), lambda ps: adapters.RAdam(ps, 0.01, (0.9, 0.95), eps=0.0)),
    "rprop": Case(rprop, fo.rprop(0.1), lambda ps: adapters.Rprop(ps, 0.1)),
    "asgd": Case(asgd, fo.asgd(0.1, 0.5, 0.6), lambda ps: adapters.ASGD(ps, 0.1, 0.5, 0.6)),
}
# Sums in another order, a few units of 2**-53 in each of 25 steps, and what 1 - 0.95**t loses at t = 1: a factor of 20
TOLERANCE = {"rtol": 1e-12, "atol": 1e-14}


@pytest.fixture
def numbers() -> Iterator[None]:
    """torch keeps the products and rates of NAdam and ASGD in the default dtype, and so do the drop-in classes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def problem() -> tuple[Array, Array]:
    generator = np.random.default_rng(0)
    return generator.normal(size=32), generator.normal(size=(STEPS, 32))


@pytest.mark.parametrize("name", CASES)
def test_the_pure_form_follows_the_formula(name: str) -> None:
    x, gradients = problem()
    tx = CASES[name].pure
    params, state = torch.from_numpy(x), tx.init(torch.from_numpy(x))
    for expected, g in zip(CASES[name].formula(x, gradients), gradients, strict=True):
        params, state = fo.apply_gradients(tx, params, torch.from_numpy(g), state)
        torch.testing.assert_close(params, torch.from_numpy(expected), **TOLERANCE)


@pytest.mark.usefixtures("numbers")
@pytest.mark.parametrize("name", CASES)
def test_the_drop_in_class_follows_the_formula(name: str) -> None:
    x, gradients = problem()
    p = torch.nn.Parameter(torch.from_numpy(x.copy()))
    opt = CASES[name].drop_in([p])
    for expected, g in zip(CASES[name].formula(x, gradients), gradients, strict=True):
        p.grad = torch.from_numpy(g)
        opt.step()
        torch.testing.assert_close(p.detach(), torch.from_numpy(expected), **TOLERANCE)


@pytest.mark.parametrize(
    ("ours", "theirs", "formula"),
    [(fo.adadelta(), optax.adadelta(), adadelta), (fo.rprop(0.1), optax.rprop(0.1), rprop)],
    ids=["adadelta", "rprop"],
)
def test_the_first_step_goes_down_where_that_of_optax_does_not(ours: Any, theirs: Any, formula: Formula) -> None:
    """With no learning rate, optax's Adadelta climbs; its Rprop takes each step one step later."""
    x, gradients = problem()
    expected = torch.from_numpy(next(formula(x, gradients)) - x)
    updates, _ = ours.update(torch.from_numpy(gradients[0]), ours.init(torch.from_numpy(x)), torch.from_numpy(x))
    wrong, _ = theirs.update(gradients[0], theirs.init(x), x)

    torch.testing.assert_close(updates, expected, rtol=1e-12, atol=1e-15)  # a difference of parameters of order one
    assert (updates * torch.from_numpy(gradients[0]) < 0).all()
    assert (np.asarray(wrong) * gradients[0] >= 0).all()


@pytest.mark.usefixtures("numbers")
def test_averages_are_means_of_the_parameters_from_a_step_on() -> None:
    """Those after steps `t0 + 2` and later; in the class as in the pure form, where `eval_params` reads them."""
    x, gradients = problem()
    path, t0 = list(asgd(x, gradients)), 6
    expected = torch.from_numpy(np.mean(path[t0 + 1 :], axis=0))
    tx = fo.asgd(0.1, 0.5, 0.6, t0)
    params, state = torch.from_numpy(x), tx.init(torch.from_numpy(x))
    p = torch.nn.Parameter(torch.from_numpy(x.copy()))
    opt = adapters.ASGD([p], 0.1, 0.5, 0.6, t0)
    for g in gradients:
        params, state = fo.apply_gradients(tx, params, torch.from_numpy(g), state)
        p.grad = torch.from_numpy(g)
        opt.step()

    torch.testing.assert_close(fo.eval_params(state, params), expected, **TOLERANCE)
    with opt.averaged_params():
        torch.testing.assert_close(p.detach(), expected, **TOLERANCE)
    torch.testing.assert_close(p.detach(), torch.from_numpy(path[-1]), **TOLERANCE)
