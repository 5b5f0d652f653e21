"""Line searches as transformations, against optax, and where the objective is no number."""

import copy
import functools
import math
import pickle
from collections.abc import Callable
from typing import Any

import jax
import optax
import pytest
import torch

import functional_optim as fo
from _lib.compare import assert_same_bits
from _lib.objectives import ALL_SEARCHES, START, bumpy, each_search, flat, value_and_grad
from _lib.records import to_arrays, to_tensors
from _lib.trees import F64, Tree, tree_map


BACKTRACKING: dict[str, Any] = {
    "max_backtracking_steps": 15,
    "slope_rtol": 1e-4,
    "decrease_factor": 0.8,
    "increase_factor": 1.5,
    "max_learning_rate": 1.0,
    "atol": 0.0,
    "rtol": 0.0,
}


ZOOM: dict[str, Any] = {
    "max_linesearch_steps": 20,
    "max_learning_rate": math.inf,
    "tol": 0.0,
    "increase_factor": 2.0,
    "slope_rtol": 1e-4,
    "curv_rtol": 0.9,
    "approx_dec_rtol": 1e-6,
    "stepsize_precision": 1e-5,
}


KEPT = {"store_grad": True, "slope_rtol": 0.1, "decrease_factor": 0.5, "increase_factor": 2.0, "max_learning_rate": 3.0}


STRICT = {"approx_dec_rtol": None, "tol": 1e-9, "curv_rtol": 1e-3, "stepsize_precision": 1e-9}


SEARCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "backtracking": ("backtracking", BACKTRACKING),
    "backtracking, in vain": ("backtracking", {**BACKTRACKING, "max_backtracking_steps": 2}),
    "backtracking, kept": ("backtracking", {**BACKTRACKING, **KEPT, "atol": 1e-3, "rtol": 1e-3}),
    "zoom": ("zoom", ZOOM),
    "zoom, in vain": ("zoom", {**ZOOM, "max_linesearch_steps": 2}),
    "zoom, short": ("zoom", {**ZOOM, "max_learning_rate": 1e-2, "increase_factor": 3.0}),
    "zoom, coarse": ("zoom", {**ZOOM, "slope_rtol": 0.2, "curv_rtol": 0.3, "stepsize_precision": 0.5}),
    "zoom, strict": (
        "zoom",
        {**ZOOM, **STRICT, "initial_guess_strategy": "one", "max_linesearch_steps": 40},
    ),
}


@functools.cache
def their_update(kind: str, switches: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """A step of a line search of optax, compiled once for all numbers."""
    factory = getattr(optax, f"scale_by_{kind}_linesearch")

    def update(numbers: dict[str, Any], updates: Any, state: Any, params: Any, value: Any, grad: Any) -> Any:
        tx = factory(**numbers, **dict(switches))
        return tx.update(updates, state, params, value=value, grad=grad, value_fn=bumpy)

    return jax.jit(update)


def directions(step: int, grad: Tree) -> Tree:
    """Minus the gradient with noise, between a hundredth and a hundred times as long; ascent in every seventh step."""
    sign = 1.0 if step % 7 == 6 else -1.0
    generator = torch.Generator().manual_seed(step)
    length = 10.0 ** (4 * torch.rand((), generator=generator, dtype=F64) - 2)
    return tree_map(
        lambda g: sign * length * g * (0.5 + torch.rand(g.shape, generator=generator, dtype=F64)) / (1 + g.abs()), grad
    )


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_take_the_steps_of_optax(name: str) -> None:
    """In 40 directions from points all over the valley: as many evaluations, and the same step.

    A step is a quotient of differences of values, of which at least a part of 1e-5 is left where the search goes on
    (`stepsize_precision`, or the decrease that it asks for), so that rounding errors of 2**-53 become 1e-11 at most;
    the values of two libraries differ by a few of them.
    """
    kind, arguments = SEARCHES[name]
    switches = tuple((k, x) for k, x in arguments.items() if not isinstance(x, (int, float)) or isinstance(x, bool))
    numbers = {k: x for k, x in arguments.items() if k not in dict(switches)}
    ours = getattr(fo, f"scale_by_{kind}_linesearch")(**arguments)
    theirs = getattr(optax, f"scale_by_{kind}_linesearch")(**arguments)
    params = START
    state, their_state = ours.init(params), theirs.init(to_arrays(params))
    evaluations = set()
    for step in range(40):
        value, grad = value_and_grad(bumpy, params)
        updates = directions(step, grad)
        found, state = ours.update(updates, state, params, value=value, grad=grad, value_fn=bumpy)
        given = map(to_arrays, (params, value, grad))
        expected, their_state = their_update(kind, switches)(numbers, to_arrays(updates), their_state, *given)
        count = int(their_state.info.num_linesearch_steps)
        assert int(state.info.num_linesearch_steps) == count, step
        close = {"rtol": 1e-10, "atol": 1e-10}
        for field in ("learning_rate", "value"):
            torch.testing.assert_close(getattr(state, field), to_tensors(getattr(their_state, field)), **close)
        torch.testing.assert_close(flat(found), flat(to_tensors(expected)), **close)
        if state.grad is not None:
            wide = {"rtol": 1e-9, "atol": 1e-9 * float(flat(grad).abs().max())}
            torch.testing.assert_close(flat(state.grad), flat(to_tensors(their_state.grad)), **wide)
        evaluations.add(count)
        noise = torch.Generator().manual_seed(step)
        params = tree_map(lambda p: 1 + torch.randn(p.shape, generator=noise, dtype=F64), params)
    assert len(evaluations) > 1


STRONG = {"slope_rtol": 1e-4, "curv_rtol": 0.5}


def test_strong_wolfe_finds_steps_of_both_conditions() -> None:
    """In 40 directions, checked by the definition; an ascent direction has no such step."""
    tx = fo.scale_by_strong_wolfe_linesearch(**STRONG)
    params, evaluations = START, set()
    for step in range(40):
        value, grad = value_and_grad(bumpy, params)
        updates = directions(step, grad)
        scaled, state = tx.update(updates, tx.init(params), params, value=value, grad=grad, value_fn=bumpy)
        rate = state.learning_rate.item()
        new, new_grad = value_and_grad(bumpy, tree_map(torch.add, params, scaled))
        slope, new_slope = (flat(updates).dot(flat(g)).item() for g in (grad, new_grad))
        assert_same_bits([state.value, state.grad], [new, new_grad])
        assert new <= value
        if slope < 0:
            assert rate > 0
            assert new - value <= STRONG["slope_rtol"] * rate * slope
            assert abs(new_slope) <= STRONG["curv_rtol"] * abs(slope)
            assert state.info.decrease_error == state.info.curvature_error == 0
        evaluations.add(int(state.info.num_linesearch_steps))
        noise = torch.Generator().manual_seed(step)
        params = tree_map(lambda p: 1 + torch.randn(p.shape, generator=noise, dtype=F64), params)
    assert max(evaluations) > 3


class Cliff:
    """A parabola with its minimum at 3 that is no number beyond 1."""

    def __init__(self, bad: float = math.nan) -> None:
        self.bad, self.edge, self.calls = bad, 1.0, 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        value = ((x - 3) ** 2).sum()
        return value if x.max() <= self.edge else value * self.bad


@each_search
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_parameters_stay_where_the_objective_is_a_number(search: Any, bad: float) -> None:
    f, tx = Cliff(bad), fo.lbfgs(linesearch=search)
    params = torch.zeros(2, dtype=F64)
    state, find = tx.init(params), fo.value_and_grad_from_state(f)
    for _ in range(6):
        value, grad = find(params, state=state)
        before = f.calls
        params, state = fo.apply_gradients(tx, params, grad, state, value=value, grad=grad, value_fn=f)
        assert f.calls > before
        assert params.max() <= 1.0
        assert f(params) <= value
    assert params.min() > 0.5
    f.edge = math.inf  # and goes on when the objective does
    for _ in range(40):  # backtracking has short steps that grow by half each time
        value, grad = value_and_grad(f, params)
        params, state = fo.apply_gradients(tx, params, grad, state, value=value, grad=grad, value_fn=f)
    torch.testing.assert_close(params, torch.full((2,), 3.0, dtype=F64))


@each_search
def test_nothing_moves_where_all_is_nan(search: Any) -> None:
    """Neither with a gradient that is a number, nor with one that is none."""
    tx, params = fo.lbfgs(linesearch=search), torch.ones(3)
    state = tx.init(params)
    for grad in (torch.ones(3), torch.full((3,), math.nan)):
        for value in (1.0, math.nan):
            arguments = {"value": value, "grad": grad, "value_fn": lambda x: (x * math.nan).sum()}
            updates, state = tx.update(grad, state, params, **arguments)
            assert torch.equal(updates, torch.zeros(3))
    assert (state[0].weights_memory == 0).all()
    updates, _ = tx.update(2 * params, state, params, value_fn=lambda x: (x * x).sum())
    assert (updates < 0).all()


@each_search
def test_searches_are_values(search: Any) -> None:
    """Printed as the call that makes them, compared by it, pickled and copied."""
    for same in (eval(f"fo.{search!r}", {"fo": fo}), pickle.loads(pickle.dumps(search)), copy.deepcopy(search)):
        assert same == search
        assert hash(same) == hash(search)
        assert repr(same) == repr(search)
    assert [other for other in ALL_SEARCHES.values() if other == search] == [search]
    assert fo.scale_by_zoom_linesearch(20) != fo.scale_by_zoom_linesearch(21)
