"""Schedules: their values, as Python sees them and traced into kernels, and schedules as hyper-parameters."""

import functools
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax
import pytest
import torch

import functional_optim as fo
import functional_optim._schedules
from _lib.chains import RATES
from _lib.records import BACKENDS, double, normal, to_tensor, use
from _lib.schedules import CLOSE, CLOSE_IN_KERNELS, in_kernel, in_one_kernel
from _lib.trees import Tree
from functional_optim._schedules.schedule import ScheduleFactory
from functional_optim.adapters import TransformOptimizer


class Case(NamedTuple):
    """A schedule and what it is compared with.

    Args:
      id: its name, and what is special about this row.
      ours: the schedule.
      theirs: that of optax, or a formula.
      counts: where their values are compared.
    """

    id: str
    ours: fo.Schedule
    theirs: Callable[[Any], Any]
    counts: range = range(45)


def both(name: str, *args: Any, id: str = "", counts: range = range(45), **kwargs: Any) -> Case:
    """A row with the same arguments on both sides."""
    ours, theirs = (getattr(package, name)(*args, **kwargs) for package in (fo, optax))
    return Case(f"{name}-{id}" if id else name, ours, double(theirs), counts)


def stable(t: float, down: Callable[[float], float]) -> float:
    """From 0.1 to 2 in 5 steps, then 10 steps of plateau, then 20 steps down to 0.2."""
    if t < 5:
        return 0.1 + (2.0 - 0.1) * t / 5
    return 0.2 + (2.0 - 0.2) * down(min(max(t - 15, 0) / 20, 1.0))


def inverse_sqrt(t: float) -> float:
    return 0.1 + (2.0 - 0.1) * t / 9 if t < 9 else 2.0 * math.sqrt(9 / t)


def triangle(t: int) -> float:
    """Up from 0.5 to 2 in 4 steps, down in 3, each time half as high."""
    cycle, since = divmod(t, 7)
    return 0.5 + 1.5 * (since / 4 if since <= 4 else (7 - since) / 3) / 2**cycle


def restarts(t: int) -> float:
    """From 2 towards 0.5 along half a cosine of 3 steps, then 6, 12 and so on."""
    length = 3
    while t >= length:
        t, length = t - length, 2 * length
    return 0.5 + 1.5 * (1 + math.cos(math.pi * t / length)) / 2


CYCLES = [
    {"init_value": 0.1, "peak_value": 1.0, "warmup_steps": 4, "decay_steps": 10, "end_value": 0.2},
    {"init_value": 0.2, "peak_value": 2.0, "warmup_steps": 0, "decay_steps": 7, "exponent": 2.0},
    {"init_value": 0.0, "peak_value": 0.5, "warmup_steps": 3, "decay_steps": 20},
]
PIECES = [("linear_schedule", (0.0, 1.0, 8)), ("constant_schedule", (0.7,)), ("exponential_decay", (0.5, 3, 0.5))]

CASES = [
    both("constant_schedule", 0.3),
    both("linear_schedule", 0.1, 2.0, 30),
    both("linear_schedule", 2.0, 0.1, 20, 7, id="begin"),
    both("linear_schedule", 2.0, 0.1, 0, id="no_steps"),
    # counts that single precision cannot tell apart
    both("linear_schedule", 0.0, 1.0, 10**8, id="long", counts=range(10**8 - 30, 10**8 + 15)),
    both("polynomial_schedule", 2.0, 0.1, 3, 20, 7),
    both("polynomial_schedule", 0.1, 2.0, 0.5, 30, id="root"),
    both("polynomial_schedule", 2.0, 0.1, 2, 0, id="no_steps"),
    both("exponential_decay", 2.0, 7, 0.5),
    both("exponential_decay", 2.0, 7, 0.5, 3, True, id="staircase"),
    both("exponential_decay", 2.0, 7, 0.5, 3, False, 0.3, id="end_value"),
    both("exponential_decay", 0.1, 7, 2.0, 3, True, 0.7, id="growth"),
    both("exponential_decay", 2.0, 7, 0.0, id="rate_0"),
    both("exponential_decay", 0.1, 7, 0.0, 3, False, 0.7, id="rate_0-end_value"),
    both("warmup_exponential_decay_schedule", 0.0, 0.1, 5, 7, 0.0, 3, False, 0.7, id="rate_0-end_value"),
    both("exponential_decay", 2.0, 0, 0.5, id="no_steps"),
    both("cosine_decay_schedule", 2.0, 30),
    both("cosine_decay_schedule", 2.0, 30, 0.1, 1.5, id="arguments"),
    both("warmup_constant_schedule", 0.1, 2.0, 9),
    both("warmup_cosine_decay_schedule", 0.1, 2.0, 9, 30, 0.2, 1.5),
    both("warmup_cosine_decay_schedule", 0.1, 2.0, 0, 30, id="no_warmup"),
    both("warmup_cosine_decay_schedule", 0.1, 0.0, 9, 30, id="peak_0"),
    both("warmup_exponential_decay_schedule", 0.1, 2.0, 9, 5, 0.5),
    both("warmup_exponential_decay_schedule", 0.1, 2.0, 9, 5, 0.5, 3, True, 0.3, id="arguments"),
    both("warmup_exponential_decay_schedule", 0.1, 2.0, 0, 5, 0.5, id="no_warmup"),
    both("piecewise_constant_schedule", 2.0, {10: 0.5, 20: 0.1, 15: 3.0}),
    both("piecewise_constant_schedule", 2.0, id="no_boundaries"),
    both("piecewise_interpolate_schedule", "linear", 2.0, {10: 0.5, 20: 0.1, 15: 3.0}, id="linear"),
    both("piecewise_interpolate_schedule", "cosine", 2.0, {10: 0.5, 20: 0.1, 15: 3.0}, id="cosine"),
    both("piecewise_interpolate_schedule", "linear", 2.0, {0: 0.5, 20: 0.1}, id="from_0"),
    both("piecewise_interpolate_schedule", "cosine", 2.0, id="no_boundaries"),
    both("linear_onecycle_schedule", 40, 2.0),
    both("linear_onecycle_schedule", 37, 2.0, 0.2, 0.7, 10.0, 100.0, id="arguments"),
    both("cosine_onecycle_schedule", 40, 2.0),
    both("cosine_onecycle_schedule", 37, 2.0, 0.2, 10.0, 100.0, id="arguments"),
    both("sgdr_schedule", CYCLES),
    Case(
        "join_schedules",
        fo.join_schedules([getattr(fo, name)(*args) for name, args in PIECES], [10, 20]),
        double(optax.join_schedules([getattr(optax, name)(*args) for name, args in PIECES], [10, 20])),
    ),
    Case(
        "warmup_stable_decay_schedule",
        fo.warmup_stable_decay_schedule(0.1, 2.0, 5, 10, 20, 0.2),
        lambda t: stable(t, lambda x: 1 - x),
    ),
    Case(
        "warmup_stable_decay_schedule-sqrt",
        fo.warmup_stable_decay_schedule(0.1, 2.0, 5, 10, 20, 0.2, "sqrt"),
        lambda t: stable(t, lambda x: 1 - math.sqrt(x)),
    ),
    Case(
        "warmup_stable_decay_schedule-cosine",
        fo.warmup_stable_decay_schedule(0.1, 2.0, 5, 10, 20, 0.2, "cosine"),
        lambda t: stable(t, lambda x: (1 + math.cos(math.pi * x)) / 2),
    ),
    Case("ema_debias_schedule", fo.ema_debias_schedule(0.9), lambda t: 1 - (1 - 0.9) / (1 - 0.9 ** (t + 1))),
    Case("ema_debias_schedule-0", fo.ema_debias_schedule(0.0), lambda t: 0.0),
    Case("ema_warmup_schedule", fo.ema_warmup_schedule(0.7), lambda t: min(0.7, (1 + t) / (10 + t))),
    Case("ema_warmup_schedule-offset", fo.ema_warmup_schedule(1.0, 2.0), lambda t: 1 - 1 / (2 + t)),
    Case("inverse_sqrt_schedule", fo.inverse_sqrt_schedule(2.0, 9, 0.1), inverse_sqrt, range(0, 900, 20)),
    Case(
        "interpolate_schedule",
        fo.interpolate_schedule("linear", {3: 2.0, 8.5: 0.0, 20: 1.0}),
        lambda t: float(np.interp(t, [3, 8.5, 20], [2.0, 0.0, 1.0])),
    ),
    Case(
        "interpolate_schedule-cosine",
        fo.interpolate_schedule("cosine", {20: 1.0, 3: 2.0}),
        lambda t: 1.5 + math.cos(math.pi * min(max(t - 3, 0) / 17, 1)) / 2,
    ),
    Case(
        "cosine_annealing_schedule",
        fo.cosine_annealing_schedule(2.0, 7, 0.5),
        lambda t: 0.5 + 1.5 * (1 + math.cos(math.pi * (t % 14) / 7)) / 2,
    ),
    Case(
        "cosine_restarts_schedule",
        fo.cosine_restarts_schedule(2.0, 10),
        lambda t: 1 + math.cos(math.pi * (t % 10) / 10),
    ),
    Case("cosine_restarts_schedule-growing", fo.cosine_restarts_schedule(2.0, 3, 2, 0.5), restarts),
    # starts of cycles, 2**k - 1, and the steps before, where a logarithm is a whole number or just not
    *(
        Case(
            f"cosine_restarts_schedule-late{k}",
            fo.cosine_restarts_schedule(low + 2.0, 1, 2, low),
            lambda t, low=low: low + 1 + math.cos(math.pi * ((t + 1) / 2 ** ((t + 1).bit_length() - 1) - 1)),
            range(2**k - 20, 2**k + 25),
        )
        for k, low in ((10, 0.5), (29, 0.25))
    ),
    Case("cyclic_schedule", fo.cyclic_schedule(0.5, 2.0, 4, 3, "triangular2"), triangle),
    Case(
        "cyclic_schedule-down",
        fo.cyclic_schedule(0.9, 0.8, 5, mode="exp_range", gamma=0.9),
        lambda t: 0.9 - 0.1 * (1 - abs(t % 10 - 5) / 5) * 0.9**t,
    ),
    Case(
        "cyclic_schedule-scale_fn",
        fo.cyclic_schedule(0.0, 2.0, 5, scale_fn=fo.exponential_decay(1.0, 1, 0.5)),
        lambda t: 2 * (1 - abs(t % 10 - 5) / 5) / 2 ** (t // 10 + 1),
    ),
    Case(
        "cumulative_product_schedule",
        fo.cumulative_product_schedule(2.0, fo.constant_schedule(0.9)),
        lambda t: 2 * 0.9**t,
    ),
    Case(
        "multiply_schedules",
        fo.linear_schedule(0.5, 2.0, 10) * fo.exponential_decay(1.0, 4, 0.5) * 0.75,
        lambda t: 0.75 * (0.5 + 1.5 * min(t / 10, 1)) * 0.5 ** (t / 4),
    ),
]
IDS = [case.id for case in CASES]
cases = pytest.mark.parametrize("case", CASES, ids=IDS)
rows = pytest.mark.parametrize("row", range(len(CASES)), ids=IDS)

# Triton's interpreter takes 10 ms for a value, so it gets a few counts, the corners of most schedules among them.
INTERPRETED = (0, 3, 5, 9, 15, 20, 37, 44)


@functools.cache
def expected(row: int) -> torch.Tensor:
    return torch.stack([to_tensor(np.float64(CASES[row].theirs(t))) for t in CASES[row].counts])


# ---- values


@pytest.mark.parametrize(
    "count",
    [int, float, lambda t: torch.tensor(t), lambda t: torch.tensor(t, dtype=torch.int32)],
    ids=["int", "float", "int64", "int32"],
)
@rows
def test_schedule_values_at_one_count(row: int, count: Callable[[int], Any]) -> None:
    case = CASES[row]
    actual = torch.stack([case.ours(count(t)) for t in case.counts])
    torch.testing.assert_close(actual, expected(row), **CLOSE)


@rows
def test_schedule_values_at_a_tensor_of_counts(row: int) -> None:
    case = CASES[row]
    actual = case.ours(torch.tensor(case.counts))
    torch.testing.assert_close(actual, expected(row), **CLOSE)


@functools.cache
def from_kernel(backend: str, counts: range, places: Sequence[int]) -> dict[int, torch.Tensor]:
    """Values of all rows with the same counts, by eights."""
    own = [row for row, case in enumerate(CASES) if case.counts == counts]
    found: dict[int, torch.Tensor] = {}
    for chunk in (own[k : k + 8] for k in range(0, len(own), 8)):
        values = in_one_kernel([CASES[row].ours for row in chunk], [counts[k] for k in places], backend)
        found |= dict(zip(chunk, values.unbind(1), strict=True))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@rows
def test_schedule_values_in_kernels(row: int, backend: str) -> None:
    counts = CASES[row].counts
    places = INTERPRETED if backend == "triton" else range(len(counts))
    actual = from_kernel(backend, counts, places)[row]
    torch.testing.assert_close(actual, expected(row)[list(places)], **CLOSE_IN_KERNELS)


@cases
def test_every_schedule_is_traced(case: Case) -> None:
    notes = fo.explain(fo.scale_by_schedule(case.ours), torch.zeros(1)).notes
    assert not [note for note in notes if "cannot be traced" in note]


def test_every_schedule_has_a_row() -> None:

    public = {name for name, x in vars(fo).items() if isinstance(x, ScheduleFactory)}
    assert {case.id.partition("-")[0] for case in CASES} == public | {"sgdr_schedule"}


# ---- specifications


@cases
def test_repr_makes_an_equal_schedule(case: Case) -> None:
    again = eval(repr(case.ours), vars(fo))
    assert again == case.ours
    assert hash(again) == hash(case.ours)


@cases
def test_pickling_makes_an_equal_schedule(case: Case) -> None:
    again = pickle.loads(pickle.dumps(case.ours))
    assert again == case.ours
    assert hash(again) == hash(case.ours)


def test_different_schedules_are_not_equal() -> None:
    assert len({case.ours for case in CASES}) == len(CASES)


def test_transformations_with_equal_schedules_are_equal() -> None:
    assert fo.adamw(fo.linear_schedule(1.0, 0.0, 5)) == fo.adamw(fo.linear_schedule(1.0, 0.0, 5))
    assert fo.adamw(fo.linear_schedule(1.0, 0.0, 5)) != fo.adamw(fo.linear_schedule(1.0, 0.0, 6))


BAD = [
    (lambda: fo.linear_schedule(0.0, 1.0, -3), "`transition_steps` of linear_schedule .* got -3"),
    (lambda: fo.linear_schedule(0.0, 1.0, 3, -2), "`transition_begin` of linear_schedule .* got -2"),
    (lambda: fo.polynomial_schedule(0.0, 1.0, 2, -3), "`transition_steps` of polynomial_schedule .* got -3"),
    (lambda: fo.polynomial_schedule(0.0, 1.0, 2, 3, -2), "`transition_begin` of polynomial_schedule .* got -2"),
    (lambda: fo.exponential_decay(1.0, -3, 0.5), "`transition_steps` of exponential_decay .* got -3"),
    (lambda: fo.exponential_decay(1.0, 3, -0.5), "`decay_rate` of exponential_decay .* got -0.5"),
    (lambda: fo.cosine_decay_schedule(1.0, 0), "`decay_steps` of cosine_decay_schedule .* got 0"),
    (lambda: fo.warmup_constant_schedule(0.0, 1.0, -3), "`warmup_steps` of warmup_constant_schedule .* got -3"),
    (lambda: fo.warmup_cosine_decay_schedule(0.0, 1.0, -3, 9), "`warmup_steps` of warmup_cosine.* got -3"),
    (lambda: fo.warmup_cosine_decay_schedule(0.0, 1.0, 9, 9), "`decay_steps` of warmup_cosine.* got 9"),
    (lambda: fo.warmup_exponential_decay_schedule(0.0, 1.0, -3, 5, 0.5), "`warmup_steps` of warmup_exp.* got -3"),
    (lambda: fo.warmup_exponential_decay_schedule(0.0, 1.0, 3, 5, -0.5), "`decay_rate` of warmup_exp.* got -0.5"),
    (lambda: fo.warmup_stable_decay_schedule(0.0, 1.0, -3, 5, 5), "`warmup_steps` of warmup_stable.* got -3"),
    (lambda: fo.warmup_stable_decay_schedule(0.0, 1.0, 3, -5, 5), "`stable_steps` of warmup_stable.* got -5"),
    (lambda: fo.warmup_stable_decay_schedule(0.0, 1.0, 3, 5, 0), "`decay_steps` of warmup_stable.* got 0"),
    (lambda: fo.warmup_stable_decay_schedule(0.0, 1.0, 3, 5, 5, decay="exp"), "`decay` of warmup_stable.* got 'exp'"),
    (lambda: fo.inverse_sqrt_schedule(1.0, 0), "`warmup_steps` of inverse_sqrt_schedule .* got 0"),
    (lambda: fo.piecewise_constant_schedule(1.0, {3: -0.5}), "`boundaries_and_scales` .* got -0.5 at 3"),
    (lambda: fo.piecewise_interpolate_schedule("linear", 1.0, {3: -0.5}), "`boundaries_and_scales` .* -0.5 at 3"),
    (lambda: fo.piecewise_interpolate_schedule("cubic", 1.0), "`interpolate_type` .* got 'cubic'"),
    (lambda: fo.linear_onecycle_schedule(0, 1.0), "`transition_steps` of linear_onecycle_schedule .* got 0"),
    (lambda: fo.cosine_onecycle_schedule(0, 1.0), "`transition_steps` of cosine_onecycle_schedule .* got 0"),
    (lambda: fo.cosine_annealing_schedule(1.0, 0), "`half_period` of cosine_annealing_schedule .* got 0"),
    (lambda: fo.cosine_restarts_schedule(1.0, -1), "`period` of cosine_restarts_schedule .* got -1"),
    (lambda: fo.cosine_restarts_schedule(1.0, 3, 0), "`period_mult` of cosine_restarts_schedule .* got 0"),
    (lambda: fo.cosine_restarts_schedule(1.0, 3, 1.5), "`period_mult` of cosine_restarts_schedule .* got 1.5"),
    (lambda: fo.cyclic_schedule(0.0, 1.0, 0), "`step_size_up` of cyclic_schedule .* got 0"),
    (lambda: fo.cyclic_schedule(0.0, 1.0, 3, -1), "`step_size_down` of cyclic_schedule .* got -1"),
    (lambda: fo.cyclic_schedule(0.0, 1.0, 3, mode="square"), "`mode` of cyclic_schedule .* got 'square'"),
    (lambda: fo.cyclic_schedule(0.0, 1.0, 3, gamma=-0.5), "`gamma` of cyclic_schedule .* got -0.5"),
    (lambda: fo.interpolate_schedule("cubic", {0: 1.0}), "`interpolate_type` of interpolate_schedule .* got 'cubic'"),
    (lambda: fo.interpolate_schedule("linear", {}), "`boundaries_and_values` of interpolate_schedule .* got none"),
    (lambda: fo.multiply_schedules([]), "multiply_schedules takes at least one factor"),
    (lambda: fo.constant_schedule(1.0) * math.nan, "`factors` of multiply_schedules .* got nan at 1"),
    (lambda: fo.constant_schedule(1.0) * torch.ones(2), r"`factors` of multiply_schedules .*shape \(2,\) at 1"),
    (lambda: fo.join_schedules([fo.constant_schedule(1.0)] * 2, [3, 4]), "one boundary fewer .* got 2 schedules and 2"),
    (
        lambda: fo.sgdr_schedule([{"init_value": 0.0, "peak_value": 1.0, "warmup_steps": 2, "decay_steps": -4}]),
        "`decay_steps` of warmup_cosine.* got -4",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_named_with_their_values(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_and_missing_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"linear_schedule: .*'steps'; .*transition_steps: int"):
        fo.linear_schedule(0.0, 1.0, 3, steps=3)
    with pytest.raises(TypeError, match=r"linear_schedule: .*'transition_steps'; .*transition_steps: int"):
        fo.linear_schedule(0.0, 1.0)


# ---- schedules as hyper-parameters

TABLE = (0.5, 0.25, 2.0, 1.0)
FUNCTIONS = {
    "table": lambda count: TABLE[int(count) % 4],
    "math": lambda count: math.cos(count),
    "branch": lambda count: 1.0 if count < 10 else 0.1,
    "numpy": lambda count: np.float32(1.0) / (1 + np.asarray(int(count))),
    "0-d tensor": lambda count: torch.tensor(TABLE)[int(count) % 4],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_cannot_be_traced_is_called(name: str, backend: str) -> None:
    function, counts = FUNCTIONS[name], range(0, 20, 3)
    actual = in_kernel(fo.scale_by_schedule(function), counts, backend)
    expected = torch.tensor([float(function(t)) for t in counts], dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_explain_says_that_a_function_cannot_be_traced(name: str) -> None:
    notes = fo.explain(fo.scale_by_schedule(FUNCTIONS[name]), torch.zeros(1)).notes
    assert [note for note in notes if "scale_by_schedule.step_size_fn cannot be traced" in note]


def two_rates() -> tuple[fo.GradientTransformation, Callable[[int], tuple[float, float]]]:
    """A rule that is the second of its name for one leaf and the only one for another, and the factors of both."""
    inner, outer = FUNCTIONS["table"], FUNCTIONS["math"]
    tx = fo.chain(fo.masked(fo.scale_by_schedule(inner), {"a": True, "b": False}), fo.scale_by_schedule(outer))
    return tx, lambda count: (float(inner(count) * outer(count)), float(outer(count)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_functions_that_are_called_belong_to_one_rule_each(backend: str) -> None:
    tx, factors = two_rates()
    ones = {name: torch.ones((), dtype=torch.float64) for name in "ab"}
    state = tx.init(ones)
    with use(backend):
        for count in range(3):
            updates, state = tx.update(ones, state)
            assert (float(updates["a"]), float(updates["b"])) == pytest.approx(factors(count), rel=1e-12)


def test_in_an_optimizer_functions_that_are_called_belong_to_one_rule_each() -> None:
    tx, factors = two_rates()
    params = {name: torch.zeros((), dtype=torch.float64, requires_grad=True) for name in "ab"}
    opt = TransformOptimizer(params.items(), tx)
    for count in range(3):
        before = [p.item() for p in params.values()]
        for p in params.values():
            p.grad = torch.ones_like(p)
        opt.step()
        steps = [p.item() - x for p, x in zip(params.values(), before, strict=True)]
        assert steps == pytest.approx(factors(count), rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_schedule_that_returns_a_vector_is_refused(backend: str) -> None:
    tx = fo.scale_by_schedule(lambda count: torch.ones(2) * int(count))
    with use(backend), pytest.raises(ValueError, match=r"step_size_fn .*shape \(2,\)"):
        tx.update(torch.ones(3), tx.init(torch.ones(3)))


HYPERS: list[tuple[str, Callable[[Any], Any], Any]] = [
    ("scale_by_adam.b1", lambda x: fo.scale_by_adam(b1=x), fo.linear_schedule(0.9, 0.5, 4)),
    ("scale_by_adam.eps", lambda x: fo.scale_by_adam(eps=x), fo.exponential_decay(1e-2, 1, 0.1)),
    ("add_decayed_weights.weight_decay", fo.add_decayed_weights, fo.cosine_decay_schedule(0.3, 4)),
    ("clip_by_global_norm.max_norm", fo.clip_by_global_norm, fo.piecewise_constant_schedule(1.0, {2: 30.0})),
    ("clip.max_delta", fo.clip, lambda count: TABLE[int(count) % 4]),
    ("params_ema.decay", fo.params_ema, fo.warmup_constant_schedule(0.0, 0.9, 4)),
    ("trace.decay", fo.trace, lambda count: 1 - 1 / (1 + count)),
    ("scale_by_trust_ratio.min_norm", fo.scale_by_trust_ratio, fo.linear_schedule(0.0, 5.0, 4)),
]


def slots(state: Any) -> dict[str, Tree]:
    return {k: v for k, v in state._asdict().items() if k != "count"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "make", "schedule"), HYPERS, ids=[name for name, _, _ in HYPERS])
def test_any_hyper_parameter_may_be_a_schedule(
    name: str, make: Callable[[Any], Any], schedule: Callable[[Any], Any], backend: str
) -> None:
    scheduled = make(schedule)
    state = scheduled.init(normal(100))
    for step in range(5):
        constant = make(float(schedule(step)))
        now = constant.init(normal(100))._replace(**slots(state))
        now = now._replace(count=state.count) if "count" in now._fields else now
        with use("reference"):
            updates, after = constant.update(normal(step), now, normal(100 + step))
        with use(backend):
            actual, state = scheduled.update(normal(step), state, normal(100 + step))
        # the schedule's value is known to 1e-13, see above
        torch.testing.assert_close((actual, slots(state)), (updates, slots(after)), rtol=1e-12, atol=2.0**-50)
        assert state.count == step + 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_0d_tensor_is_read_at_every_step(backend: str) -> None:
    rate, decay = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.0)
    tx = fo.chain(fo.trace(decay), fo.scale_by_learning_rate(rate))
    update = torch.ones(3, dtype=torch.float64)
    state = tx.init(update)
    actual = []
    with use(backend):
        for new_rate, new_decay in ((0.5, 0.0), (0.25, 0.0), (0.25, 0.5), (2.0, 1.0)):
            rate.fill_(new_rate)
            decay.fill_(new_decay)
            updates, state = tx.update(update, state)
            actual.append(updates)
    # traces are 1, 1, 1.5, 2.5: powers of two, exact
    expected = torch.tensor([-0.5, -0.25, -0.375, -5.0], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(actual), expected[:, None].expand(4, 3), rtol=0, atol=0)


# ---- nothing is baked in


@pytest.mark.parametrize("backend", ["c", "triton"])
@pytest.mark.parametrize(("kind", "rates"), RATES, ids=[kind for kind, _ in RATES])
def test_sources_do_not_depend_on_the_learning_rate(kind: str, rates: list[Any], backend: str) -> None:
    with use(backend):
        explanations = [fo.explain(fo.lamb(rate), normal(0)) for rate in rates]
    assert len({e.kernels[0].source for e in explanations}) == 1


FAMILIES: dict[str, Callable[[float], Any]] = {
    "constant": fo.constant_schedule,
    "linear": lambda x: fo.linear_schedule(x, 0.5 * x, 9),
    "polynomial": lambda x: fo.polynomial_schedule(x, 0.5 * x, 1 + x, 9),
    "exponential": lambda x: fo.exponential_decay(x, 3, x, end_value=0.1 * x),
    "cosine": lambda x: fo.cosine_decay_schedule(x, 9, 0.1 * x),
    "warmup_constant": lambda x: fo.warmup_constant_schedule(0.5 * x, x, 9),
    "warmup_cosine": lambda x: fo.warmup_cosine_decay_schedule(0.5 * x, x, 2, 9),
    "warmup_exponential": lambda x: fo.warmup_exponential_decay_schedule(0.5 * x, x, 2, 9, x),
    "warmup_stable": lambda x: fo.warmup_stable_decay_schedule(0.5 * x, x, 2, 3, 4),
    "inverse_sqrt": lambda x: fo.inverse_sqrt_schedule(x, 9),
    "piecewise_constant": lambda x: fo.piecewise_constant_schedule(x, {3: x}),
    "piecewise_interpolate": lambda x: fo.piecewise_interpolate_schedule("cosine", x, {3: x}),
    "linear_onecycle": lambda x: fo.linear_onecycle_schedule(9, x, 0.3 * x),
    "cosine_onecycle": lambda x: fo.cosine_onecycle_schedule(9, x, 0.3 * x),
    "join": lambda x: fo.join_schedules([fo.linear_schedule(0.0, x, 3), fo.cosine_decay_schedule(x, 9)], [3]),
    "sgdr": lambda x: fo.sgdr_schedule([{"init_value": 0.0, "peak_value": x, "warmup_steps": 1, "decay_steps": 4}] * 2),
    "interpolate": lambda x: fo.interpolate_schedule("cosine", {0: x, 9: 0.5 * x}),
    "annealing": lambda x: fo.cosine_annealing_schedule(x, 9, 0.1 * x),
    "restarts": lambda x: fo.cosine_restarts_schedule(x, 9, 2, 0.1 * x),
    "cyclic": lambda x: fo.cyclic_schedule(0.1 * x, x, 9, mode="exp_range", gamma=x),
    "cumulative_product": lambda x: fo.cumulative_product_schedule(x, fo.constant_schedule(x)),
    "product": lambda x: fo.cosine_decay_schedule(x, 9) * fo.linear_schedule(0.0, x, 3) * x,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_sources_do_not_depend_on_the_values_of_a_schedule(name: str) -> None:
    with use("c"):
        first, second = (fo.explain(fo.sgd(FAMILIES[name](x)), normal(0)).kernels[0].source for x in (0.75, 0.875))
    assert first == second
