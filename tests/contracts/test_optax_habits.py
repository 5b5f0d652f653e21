"""Habits of people who come from optax: numbers and arrays of NumPy and JAX, unpacked transformations."""

import copy
import inspect
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import torch

import functional_optim as fo
from _lib.records import BACKENDS, use
from functional_optim.adapters import TransformOptimizer


NUMBERS: dict[str, Callable[[float], Any]] = {
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "longdouble": np.longdouble,
    "0-d array": np.array,
    "0-d float32 array": lambda x: np.array(x, dtype=np.float32),
    "JAX": jnp.float32,
    "fraction": Fraction,
}
numbers = pytest.mark.parametrize("kind", NUMBERS)

CHAINS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda x: fo.sgd(x, momentum=x),
    "adamw": lambda x: fo.adamw(x, b1=x, b2=x, eps=x, weight_decay=x),
    "lion": lambda x: fo.lion(x, b1=x),
    "scale": fo.scale,
    "clip": lambda x: fo.chain(fo.clip_by_global_norm(x), fo.clip(x)),
    "params_ema": fo.params_ema,
    "masked": lambda x: fo.masked(fo.trace(x), True),
    "schedule": lambda x: fo.sgd(fo.exponential_decay(x, 3, x, end_value=x)),
    "piecewise": lambda x: fo.sgd(fo.piecewise_constant_schedule(x, {2: x})),
    "sgdr": lambda x: fo.sgd(
        fo.sgdr_schedule([{"init_value": x, "peak_value": x, "warmup_steps": 1, "decay_steps": 3}])
    ),
}


@numbers
@pytest.mark.parametrize("chain", CHAINS)
def test_a_number_of_any_library_is_that_number(chain: str, kind: str) -> None:
    make = CHAINS[chain]
    tx, same = make(NUMBERS[kind](0.5)), make(0.5)  # exact in every format
    assert tx == same
    assert repr(tx) == repr(same)
    assert pickle.loads(pickle.dumps(tx)) == copy.deepcopy(tx) == same


@numbers
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_with_a_number_of_any_library(kind: str, backend: str) -> None:
    tx, params = fo.sgd(NUMBERS[kind](0.5)), torch.ones(3)
    with use(backend):
        after, _ = fo.apply_gradients(tx, params, torch.ones(3), tx.init(params))
    torch.testing.assert_close(after, torch.full((3,), 0.5), rtol=0, atol=0)


@numbers
def test_a_group_with_a_number_of_any_library(kind: str) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    TransformOptimizer([{"params": [p], "lr": NUMBERS[kind](0.5)}], fo.sgd(0.25)).step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.5), rtol=0, atol=0)


@pytest.mark.parametrize("integer", [np.int8, np.int64, np.uint16, jnp.int32, np.array])
def test_whole_numbers_stay_whole(integer: Callable[[int], Any]) -> None:
    assert repr(fo.scale(integer(3))) == "scale(step_size=3)"
    assert fo.linear_schedule(0.0, 1.0, integer(4)) == fo.linear_schedule(0.0, 1.0, 4)


def test_switches_of_numpy_are_switches() -> None:
    assert fo.trace(0.5, nesterov=np.bool_(True)) == fo.trace(0.5, nesterov=True)
    assert fo.exponential_decay(1.0, 3, 0.5, staircase=np.bool_(True)) == fo.exponential_decay(1.0, 3, 0.5, 0, True)


@numbers
def test_ranges_hold_for_numbers_of_any_library(kind: str) -> None:
    with pytest.raises(ValueError, match=r"`b1` of scale_by_adam must be in \[0, 1\).*got 1.5"):
        fo.adam(0.1, b1=NUMBERS[kind](1.5))
    with pytest.raises(ValueError, match=r"`decay_rate` of exponential_decay .* got -0.5"):
        fo.exponential_decay(1.0, 3, NUMBERS[kind](-0.5))


@pytest.mark.parametrize("value", ["1e-3", 1j, [0.1], np.array([0.1]), np.array(["0.1"]), ...], ids=repr)
def test_what_is_no_number_is_refused_with_its_name(value: Any) -> None:
    with pytest.raises(TypeError, match="`learning_rate` of scale_by_learning_rate must be a number"):
        fo.sgd(value)


# ---- counts

SCHEDULES: dict[str, fo.Schedule] = {
    "constant": fo.constant_schedule(0.5),
    "warmup_constant": fo.warmup_constant_schedule(0.0, 0.5, 0),
    "linear": fo.linear_schedule(0.0, 1.0, 8),
    "exponential": fo.exponential_decay(1.0, 2, 0.5, 1, end_value=0.1),
    "warmup_cosine": fo.warmup_cosine_decay_schedule(0.0, 1.0, 2, 8),
    "piecewise": fo.piecewise_constant_schedule(1.0, {2: 0.5}),
    "onecycle": fo.linear_onecycle_schedule(8, 1.0),
    "join": fo.join_schedules([fo.linear_schedule(0.0, 1.0, 4), lambda t: [0.5, 0.25][t % 2]], [3]),
}
ARRAYS: dict[str, Callable[[int], Any]] = {
    "NumPy": np.arange,
    "NumPy int32": lambda n: np.arange(n, dtype=np.int32),
    "NumPy float32": lambda n: np.arange(n, dtype=np.float32),
    "NumPy reversed twice": lambda n: np.arange(n)[::-1].copy()[::-1],
    "NumPy read-only": lambda n: np.broadcast_to(np.arange(n), (n,)),
    "JAX": jnp.arange,
    "torch": torch.arange,
    "torch int32": lambda n: torch.arange(n, dtype=torch.int32),
    "torch float32": lambda n: torch.arange(n, dtype=torch.float32),
    "range": range,
    "list": lambda n: list(range(n)),
}


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_an_array_of_counts_has_the_values_of_its_counts(name: str, kind: str) -> None:
    schedule = SCHEDULES[name]
    actual = schedule(ARRAYS[kind](12))
    torch.testing.assert_close(actual, torch.stack([schedule(t) for t in range(12)]), rtol=1e-15, atol=0)
    assert actual.is_contiguous()


@pytest.mark.parametrize("name", SCHEDULES)
def test_arrays_of_any_shape(name: str) -> None:
    schedule = SCHEDULES[name]
    torch.testing.assert_close(schedule(np.arange(12).reshape(3, 4)), schedule(np.arange(12)).reshape(3, 4))
    assert schedule(torch.arange(0)).shape == (0,)


@pytest.mark.parametrize("count", [np.int64(3), np.int32(3), np.float32(3), np.array(3), jnp.int32(3), torch.tensor(3)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_single_count_of_any_library(name: str, count: Any) -> None:
    schedule = SCHEDULES[name]
    torch.testing.assert_close(schedule(count), schedule(3), rtol=0, atol=0)
    assert schedule(count).shape == ()
    assert schedule(count).dtype == torch.float64


@pytest.mark.parametrize("count", ["3", None, 3j, ..., [[1], [1, 2]]], ids=repr)
def test_what_is_no_count_is_refused(count: Any) -> None:
    with pytest.raises(TypeError, match=r"linear_schedule takes the number of steps, or an array .* got "):
        SCHEDULES["linear"](count)


# ---- arguments belong to the schedule


def test_containers_that_change_later_do_not_change_a_schedule() -> None:
    pieces, members, boundaries = {2: 0.5}, [fo.constant_schedule(1.0), fo.constant_schedule(2.0)], [2]
    cycles = [{"init_value": 0.0, "peak_value": 1.0, "warmup_steps": 1, "decay_steps": 4}]
    made = [
        fo.piecewise_constant_schedule(1.0, pieces),
        fo.piecewise_interpolate_schedule("linear", 1.0, pieces),
        fo.join_schedules(members, boundaries),
        fo.sgdr_schedule(cycles),
    ]
    before = [(repr(x), hash(x), x(torch.arange(9)).tolist()) for x in made]

    pieces[2], members[1], boundaries[0] = 0.25, fo.constant_schedule(3.0), 3
    cycles[0]["peak_value"] = 2.0

    assert [(repr(x), hash(x), x(torch.arange(9)).tolist()) for x in made] == before
    with pytest.raises(TypeError):
        made[0].arguments["init_value"] = 2.0  # type: ignore[index]


def test_iterators_are_read_once() -> None:
    cycle = {"init_value": 0.0, "peak_value": 1.0, "warmup_steps": 1, "decay_steps": 4}
    assert fo.sgdr_schedule(cycle for _ in range(2)) == fo.sgdr_schedule([cycle, cycle])
    members = [fo.constant_schedule(1.0), fo.constant_schedule(2.0)]
    assert fo.join_schedules(iter(members), iter([3]))(5) == 2.0


def test_families_of_one_name_are_not_equal() -> None:
    """A cell of a notebook that runs again defines a family anew."""

    def make(rate: float) -> fo.Schedule:
        @fo.schedule()
        def family(count: Any, value: float) -> Any:
            return value * rate**count

        return family(1.0)

    half, third = make(0.5), make(1 / 3)
    assert half != third
    params = torch.ones(1, dtype=torch.float64)
    for schedule in (half, third):
        tx = fo.scale_by_schedule(schedule)
        _, state = tx.update(params, tx.init(params))
        torch.testing.assert_close(tx.update(params, state)[0], schedule(1)[None], rtol=1e-15, atol=0)


# ---- transformations as pairs

PAIRS: dict[str, Callable[[], Any]] = {
    "rule": lambda: fo.trace(0.5),
    "chain": lambda: fo.adamw(0.5, weight_decay=0.25),
    "named_chain": lambda: fo.named_chain(("a", fo.trace(0.5)), ("b", fo.scale(-0.5))),
    "masked": lambda: fo.masked(fo.trace(0.5), "w"),
    "partition": lambda: fo.partition({"a": fo.sgd(0.5), "b": fo.set_to_zero()}, {"w": "a", "b": "b"}),
    "stateless": lambda: fo.stateless(lambda updates, params: updates),
    "a pair of functions": lambda: fo.GradientTransformation(
        lambda params: 0, lambda updates, state, params=None: (updates, state + 1)
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_a_transformation_unpacks_into_its_two_functions(kind: str) -> None:
    tx = PAIRS[kind]()
    params = {"w": torch.ones(2), "b": torch.ones(1)}
    init, update = tx
    state, same = init(params), tx.init(params)
    for step in range(3):
        grads = {k: p + step for k, p in params.items()}
        updates, state = update(grads, state, params)
        expected, same = tx.update(grads, same, params)
        torch.testing.assert_close(updates, expected, rtol=0, atol=0)
    again = fo.GradientTransformation(*tx)
    torch.testing.assert_close(again.update(grads, state, params)[0], tx.update(grads, same, params)[0])


THEIRS = {**vars(optax.contrib), **vars(optax)}
SHARED = sorted(name for name in fo.__all__ if inspect.isfunction(THEIRS.get(name)))
# optax's own name of its coefficients, and its line search as a transformation of this package
SAME: dict[tuple[str, str], Any] = {
    ("muon", "ns_coeffs"): "standard",
    ("scale_by_muon", "ns_coeffs"): "standard",
    ("lbfgs", "linesearch"): fo.scale_by_zoom_linesearch(20, initial_guess_strategy="one"),
}


def defaults(make: Callable[..., Any]) -> dict[str, Any]:
    """The default of each argument, in order; dtypes by their names."""
    found = {k: x.default for k, x in inspect.signature(make).parameters.items()}
    dtypes = {jnp.float32: "float32", torch.float32: "float32"}
    return {k: dtypes.get(x, x) if isinstance(x, (type, torch.dtype)) else x for k, x in found.items()}


@pytest.mark.parametrize("name", SHARED)
def test_arguments_are_those_of_optax_in_order_and_with_their_defaults(name: str) -> None:
    ours, theirs = defaults(getattr(fo, name)), defaults(THEIRS[name])
    theirs |= {k: x for (owner, k), x in SAME.items() if owner == name}
    expected = {k: x for k, x in theirs.items() if k in ours}
    assert list(expected.items()) == [(k, x) for k, x in ours.items() if k in theirs]
