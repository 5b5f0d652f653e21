"""Schedules at their corners: lengths of 0, 1 and 2, corners that coincide, steps past the end, joined functions."""

import math
from collections.abc import Callable
from itertools import chain, pairwise, product
from typing import Any, NamedTuple

import numpy as np
import optax
import pytest
import torch
from hypothesis import (
    given,
    settings,
    strategies as st,
)

import functional_optim as fo
from _lib.records import BACKENDS, double, use
from _lib.schedules import CLOSE, CLOSE_IN_KERNELS, called, in_kernel, in_one_kernel


class Case(NamedTuple):
    """A schedule, what it is compared with, and its length in steps."""

    ours: fo.Schedule
    theirs: Callable[[int], float]
    length: int


def of_optax(name: str, args: tuple[Any, ...], length: int) -> tuple[str, Case]:
    theirs = double(getattr(optax, name)(*args))
    return f"{name}{args}", Case(getattr(fo, name)(*args), lambda t: float(theirs(t)), length)


def of_formula(name: str, args: tuple[Any, ...], length: int, theirs: Callable[[int], float]) -> tuple[str, Case]:
    return f"{name}{args}", Case(getattr(fo, name)(*args), theirs, length)


def through(cosine: bool, *corners: tuple[int, float]) -> Callable[[int], float]:
    """From corner to corner along lines or half cosines, in NumPy; the last of those at a step counts from it."""

    def value(t: int) -> float:
        if t < corners[0][0]:
            return corners[0][1]
        if t >= corners[-1][0]:
            return corners[-1][1]
        (start, left), (end, right) = next((a, b) for a, b in pairwise(corners) if a[0] <= t < b[0])
        x = np.float64(t - start) / (end - start)
        return float(left + (right - left) * ((1 - np.cos(np.pi * x)) / 2 if cosine else x))

    return value


def stable(warmup: int, plateau: int, decay: int, down: Callable[[float], float]) -> Callable[[int], float]:
    """From 0.5 to 2, plateau, down to 0.25."""

    def value(t: int) -> float:
        if t < warmup:
            return 0.5 + 1.5 * t / warmup
        return 0.25 + 1.75 * down(min(max(t - warmup - plateau, 0) / decay, 1.0))

    return value


def inverse_sqrt(warmup: int) -> Callable[[int], float]:
    return lambda t: 0.5 + 1.5 * t / warmup if t < warmup else 2.0 * math.sqrt(warmup / t)


def triangle(up: int, down: int, mode: str) -> Callable[[int], float]:
    """From 0.5 to 2 in `up` steps, and down."""

    def value(t: int) -> float:
        cycle, since = divmod(t, up + down)
        side = since / up if since <= up else (up + down - since) / down
        return 0.5 + 1.5 * side * {"triangular": 1.0, "triangular2": 0.5**cycle, "exp_range": 0.75**t}[mode]

    return value


def restarts(period: int, mult: int) -> Callable[[int], float]:
    """From 2 towards 0.25, in cycles that are counted off one by one."""

    def value(t: int) -> float:
        length = period
        while t >= length:
            t, length = t - length, mult * length
        return 0.25 + 1.75 * (1 + math.cos(math.pi * t / length)) / 2

    return value


def onecycle(n: int, start: float, final: float | None) -> tuple[str, Case]:
    # optax keeps corners by step in a dict and loses one of two that coincide
    top = (int(start * n), 2.0)
    if final is None:
        formula = through(True, (0, 0.08), top, (n, 8e-6))
        return of_formula("cosine_onecycle_schedule", (n, 2.0, start), n, formula)
    formula = through(False, (0, 0.08), top, (int(final * n), 0.08), (n, 8e-6))
    return of_formula("linear_onecycle_schedule", (n, 2.0, start, final), n, formula)


LENGTHS = (0, 1, 2)
PIECES = ({}, {0: 0.5}, {0: 0.5, 1: 3.0}, {1: 0.5, 2: 3.0}, {0: 0.0, 2: 3.0})
DOWN: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}
CASES: dict[str, Case] = dict(
    [
        of_optax("constant_schedule", (0.5,), 1),
        *[of_optax("linear_schedule", (0.5, 2.0, n, b), n + b) for n, b in product(LENGTHS, LENGTHS)],
        *[of_optax("polynomial_schedule", (0.5, 2.0, 2, n, b), n + b) for n, b in product(LENGTHS, LENGTHS)],
        *[of_optax("polynomial_schedule", (0.5, 2.0, p, 1), 1) for p in (0, 0.0, 0.5, 1.0)],
        *[
            of_optax("exponential_decay", (0.5, n, rate, b, stairs, end), n + b)
            for n, b, rate, stairs, end in product(LENGTHS, LENGTHS, (0.0, 0.5, 1.0, 2.0), (False, True), (None, 0.375))
        ],
        *[of_optax("cosine_decay_schedule", (0.5, n, 0.1, p), n) for n in (1, 2) for p in (0.0, 1.0, 2.0)],
        # optax stays at the first value if there is no way up
        of_formula("warmup_constant_schedule", (0.5, 2.0, 0), 0, lambda t: 2.0),
        *[of_optax("warmup_constant_schedule", (0.5, 2.0, n), n) for n in (1, 2)],
        *[
            of_optax("warmup_cosine_decay_schedule", (0.5, 2.0, n, n + m, 0.25, p), n + m)
            for n, m, p in product(LENGTHS, (1, 2), (1.0, 2.0))
        ],
        *[
            of_optax("warmup_exponential_decay_schedule", (0.5, 2.0, w, n, 0.5, b), w + n + b)
            for w, n, b in product(LENGTHS, LENGTHS, LENGTHS)
        ],
        *[
            of_formula(
                "warmup_stable_decay_schedule", (0.5, 2.0, w, s, d, 0.25, kind), w + s + d, stable(w, s, d, DOWN[kind])
            )
            for w, s, d, kind in product(LENGTHS, LENGTHS, (1, 2), DOWN)
        ],
        *[of_formula("inverse_sqrt_schedule", (2.0, n, 0.5), n, inverse_sqrt(n)) for n in (1, 2)],
        *[of_optax("piecewise_constant_schedule", (2.0, pieces), 2) for pieces in PIECES],
        *[of_optax("piecewise_interpolate_schedule", (k, 2.0, p), 2) for k in ("linear", "cosine") for p in PIECES],
        *[
            of_formula("interpolate_schedule", (kind, dict(corners)), 2, through(kind == "cosine", *corners))
            for kind in ("linear", "cosine")
            for corners in (
                [(0, 2.0)],
                [(1, 2.0)],
                [(0, 2.0), (1, 0.5)],
                [(-1.5, 0.5), (-0.5, 2.0), (2, 0.0)],
                [(0.5, 2.0), (0.75, 1.0), (1.25, 0.5)],
            )
        ],
        *[
            of_formula(
                "cosine_annealing_schedule",
                (2.0, n, 0.25),
                2 * n,
                lambda t, n=n: 0.25 + 1.75 * (1 + math.cos(math.pi * (t % (2 * n)) / n)) / 2,
            )
            for n in (1, 2, 3)
        ],
        *[
            of_formula("cosine_restarts_schedule", (2.0, n, m, 0.25), 4 * n, restarts(n, m))
            for n, m in product((1, 2, 7), (1, 2, 3))
        ],
        *[
            of_formula("cyclic_schedule", (0.5, 2.0, up, down, mode, 0.75), 3 * (up + down), triangle(up, down, mode))
            for up, down, mode in product((1, 2), LENGTHS, ("triangular", "triangular2", "exp_range"))
        ],
        of_formula("cyclic_schedule", (0.5, 2.0, 2), 12, triangle(2, 2, "triangular")),
        *[onecycle(n, start, None) for n, start in product((1, 2, 3, 7), (0.0, 0.3, 1.0))],
        *[
            onecycle(n, start, final)
            for n, start, final in product((1, 2, 3, 7), (0.0, 0.3, 0.85, 1.0), (0.0, 0.3, 0.85, 1.0))
            if start <= final
        ],
    ]
)
cases = pytest.mark.parametrize("name", CASES)


def counts(case: Case) -> range:
    return range(3 * case.length + 3)


def expected(case: Case) -> torch.Tensor:
    return torch.tensor([case.theirs(t) for t in counts(case)], dtype=torch.float64)


# ---- values


@cases
def test_values_at_and_past_the_corners(name: str) -> None:
    case = CASES[name]
    torch.testing.assert_close(called(case.ours, counts(case)), expected(case), **CLOSE)
    torch.testing.assert_close(case.ours(torch.tensor(counts(case))), expected(case), **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_have_the_same_values(backend: str) -> None:
    # the C kernel gets every schedule and step; Triton's interpreter takes 10 ms for a step
    every = {"c": 1, "triton": 7}.get(backend, 3)
    names = sorted(list(CASES)[::every], key=lambda name: CASES[name].length)
    for chunk in (names[k : k + 8] for k in range(0, len(names), 8)):
        at = counts(CASES[chunk[-1]])[:: 3 if backend == "triton" else 1]
        actual = in_one_kernel([CASES[name].ours for name in chunk], at, backend)
        for name, values in zip(chunk, actual.unbind(1), strict=True):
            torch.testing.assert_close(
                values, called(CASES[name].ours, at), **CLOSE_IN_KERNELS, msg=lambda m, n=name: f"{n}: {m}"
            )


LONGER: dict[str, fo.Schedule] = {
    "linear": fo.linear_schedule(1.0, 0.25, 7, 2),
    "polynomial": fo.polynomial_schedule(1.0, 0.25, 0.5, 7),
    "exponential": fo.exponential_decay(1.0, 3, 0.5, 2, end_value=0.25),
    "cosine": fo.cosine_decay_schedule(1.0, 8, 0.1, 1.5),
    "warmup_constant": fo.warmup_constant_schedule(0.25, 1.0, 0),
    "warmup_cosine": fo.warmup_cosine_decay_schedule(0.25, 1.0, 2, 8, 0.1),
    "warmup_exponential": fo.warmup_exponential_decay_schedule(0.25, 1.0, 2, 3, 0.5, 1, True, 0.1),
    "warmup_stable": fo.warmup_stable_decay_schedule(0.25, 1.0, 2, 2, 4, 0.1, "sqrt"),
    "inverse_sqrt": fo.inverse_sqrt_schedule(1.0, 3),
    "piecewise_constant": fo.piecewise_constant_schedule(1.0, {2: 0.5, 6: 0.1}),
    "piecewise_interpolate": fo.piecewise_interpolate_schedule("cosine", 1.0, {2: 0.5, 6: 0.1}),
    "linear_onecycle": fo.linear_onecycle_schedule(8, 1.0),
    "cosine_onecycle": fo.cosine_onecycle_schedule(8, 1.0),
    "sgdr": fo.sgdr_schedule([{"init_value": 0.1, "peak_value": 1.0, "warmup_steps": 1, "decay_steps": 4}] * 2),
    "interpolate": fo.interpolate_schedule("cosine", {1: 1.0, 3.5: 0.25, 8: 0.5}),
    "annealing": fo.cosine_annealing_schedule(1.0, 4, 0.25),
    "restarts": fo.cosine_restarts_schedule(1.0, 2, 2, 0.25),
    "cyclic": fo.cyclic_schedule(0.25, 1.0, 2, 3, "triangular2"),
    "cumulative_product": fo.cumulative_product_schedule(1.0, lambda t: 1 - 0.05 * (t % 3)),
    "product": fo.linear_schedule(0.5, 1.0, 4) * fo.cosine_decay_schedule(1.0, 8, 0.5) * (lambda t: 0.5),
    "join": fo.join_schedules([fo.linear_schedule(0.0, 1.0, 3), lambda t: [3.0, 2.0, 1.0][t], lambda t: 0.5], [3, 6]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LONGER)
def test_training_with_a_schedule_takes_its_values(name: str, backend: str) -> None:
    schedule, steps = LONGER[name], 20
    tx = fo.sgd(schedule)
    params = torch.zeros(3, dtype=torch.float64)
    state, moves = tx.init(params), []
    for step in range(steps):
        with use("c" if backend == "triton" and step % 6 else backend):
            after, state = fo.apply_gradients(tx, torch.zeros_like(params), torch.ones_like(params), state)
        moves.append(-after)
    torch.testing.assert_close(
        torch.stack(moves), called(schedule, range(steps))[:, None].expand(-1, 3), **CLOSE_IN_KERNELS
    )


@pytest.mark.parametrize("name", LONGER)
def test_derivatives_are_finite_past_the_end(name: str) -> None:
    count = torch.arange(25, dtype=torch.float64, requires_grad=True)
    value = LONGER[name](count) + 0 * count
    (derivative,) = torch.autograd.grad(value.sum(), count)
    assert torch.isfinite(value).all()
    # of a root at its end the derivative is infinite by nature
    assert name in ("polynomial", "warmup_stable") or torch.isfinite(derivative).all()


BEYOND: dict[str, Callable[[Any], fo.Schedule]] = {
    "linear": lambda n: fo.linear_schedule(1.0, 0.0, n),
    "linear, late": lambda n: fo.linear_schedule(1.0, 0.0, 4, transition_begin=n),
    "polynomial": lambda n: fo.polynomial_schedule(1.0, 0.0, 2, n),
    "cosine": lambda n: fo.cosine_decay_schedule(1.0, n),
    "exponential": lambda n: fo.exponential_decay(1.0, n, 0.5),
    "pieces": lambda n: fo.piecewise_constant_schedule(1.0, {4: 0.5, n: 0.5}),
    "lines": lambda n: fo.interpolate_schedule("linear", {0: 1.0, n: 0.5}),
    "joined": lambda n: fo.join_schedules([fo.constant_schedule(1.0), fo.constant_schedule(2.0)], [n]),
    "StepLR": lambda n: fo.from_torch_scheduler("StepLR", lr=1.0, step_size=n),
}


@pytest.mark.parametrize("name", BEYOND)
def test_steps_that_no_counter_reaches(name: str) -> None:
    """Integers beyond those of torch are numbers of steps like any other."""
    expected = BEYOND[name](2.0**60)(range(9))
    for n in (2**63, 2**70, 2**1000):
        torch.testing.assert_close(BEYOND[name](n)(range(9)), expected, rtol=1e-15, atol=0)


def test_growth_from_zero_stays_zero() -> None:
    assert fo.exponential_decay(0.0, 1, 2.0)(5000) == 0


# ---- products


def test_products_are_one_product_whatever_their_order() -> None:
    line, rate, table = fo.linear_schedule(0.0, 1.0, 4), torch.tensor(2.0), [1.0, 0.5, 0.25]
    made = 3 * line * (rate * line) * np.float64(0.5) * (lambda t: table[t])
    assert [type(x).__name__ for x in made.arguments["factors"]] == [
        "int", "Schedule", "Tensor", "Schedule", "float", "function",
    ]  # fmt: skip
    assert called(made, range(3)).tolist() == [3 * (t / 4) ** 2 * table[t] for t in range(3)]
    assert np.float64(0.5) * line == 0.5 * line == fo.multiply_schedules([0.5, line])
    assert line * (line * 2.0) == (line * line) * 2.0 != line * 2.0


@pytest.mark.parametrize("other", ["0.5", None, [0.5]], ids=repr)
def test_what_is_no_number_is_no_factor(other: Any) -> None:
    for multiply in (lambda: fo.constant_schedule(1.0) * other, lambda: other * fo.constant_schedule(1.0)):
        with pytest.raises(TypeError):
            multiply()
    with pytest.raises(TypeError, match=r"`factors` of multiply_schedules must be schedules or numbers, got .* at 0"):
        fo.multiply_schedules([other])


def test_a_factor_that_is_a_function_gets_whole_steps_and_an_array_of_them() -> None:
    asked: list[Any] = []
    made = fo.constant_schedule(1.0) * (lambda t: asked.append(t) or 1.0)
    assert made(torch.tensor([[1, 2], [3, 4]])).tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert asked == [0, 1, 2, 3, 4]  # 0 when it was made
    assert all(isinstance(t, int) for t in asked)


# ---- running products


def test_running_products_at_any_steps_in_any_order() -> None:
    made = fo.cumulative_product_schedule(2.0, lambda t: t / (t + 1))
    for steps in ([3, 0, 50, 49], range(0, 200, 7), [199], [-1, 0]):
        expected = torch.tensor([2 / (max(t, 0) + 1) for t in steps], dtype=torch.float64)
        torch.testing.assert_close(made(list(steps)), expected, rtol=400 * 2.0**-53, atol=0)


@pytest.mark.parametrize("factor", [0.0, 1.0, -0.5, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_running_products_of_one_number(factor: Any, backend: str) -> None:
    made = fo.cumulative_product_schedule(2.0, lambda t: factor)
    assert not fo.explain(fo.scale_by_schedule(made), torch.zeros(1)).notes
    actual = in_kernel(fo.scale_by_schedule(made), range(4), backend)
    assert actual.tolist() == [2 * factor**t for t in range(4)]


def test_products_of_functions_without_hash_are_not_kept() -> None:
    class Factor:
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            return self is other

        def __call__(self, t: int) -> float:
            return 0.5

    assert fo.cumulative_product_schedule(1.0, Factor())(3) == 0.125


# ---- joining


@given(
    lengths=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    traced=st.lists(st.booleans(), min_size=5, max_size=5),
)
@settings(max_examples=40, deadline=None)
def test_no_member_is_asked_for_a_step_outside_its_time(lengths: list[int], traced: list[bool]) -> None:
    """Each member is a table of as many values as it has steps, or a schedule; the last has no end."""
    values = [[10.0 * k + t for t in range(n)] for k, n in enumerate(lengths)]
    members: list[Any] = []
    for k, table in enumerate(values):
        members.append(fo.linear_schedule(10.0 * k, 10.0 * k + 5, 5) if traced[k] else lambda t, table=table: table[t])
    joined = fo.join_schedules([*members, fo.constant_schedule(-1.0)], np.cumsum(lengths))
    total = sum(lengths) * 3 + 2
    right = torch.tensor([*chain(*values), *[-1.0] * (total - sum(lengths))], dtype=torch.float64)

    torch.testing.assert_close(called(joined, range(total)), right, rtol=1e-15, atol=1e-14)
    torch.testing.assert_close(joined(torch.arange(total)), right, rtol=1e-15, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_joined_table_in_a_chain_past_its_end(backend: str) -> None:
    table = [1.0, 0.5, 0.25]
    for members, boundaries in (
        ([lambda t: table[t], fo.constant_schedule(2.0)], [3]),
        ([fo.constant_schedule(2.0), lambda t: table[t], lambda t: 4.0], [2, 5]),
        ([fo.join_schedules([lambda t: table[t], lambda t: table[t]], [3]), fo.constant_schedule(0.0)], [6]),
    ):
        joined = fo.join_schedules(members, boundaries)
        actual = in_kernel(fo.scale_by_schedule(joined), range(10), backend)
        torch.testing.assert_close(actual, called(joined, range(10)), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_traced_member_that_is_nan_outside_its_time(backend: str) -> None:
    joined = fo.join_schedules([lambda t: (4.0 - t) ** 0.5, lambda t: (1.0 + t) ** 0.5], [4])
    assert not fo.explain(fo.scale_by_schedule(joined), torch.zeros(1)).notes
    actual = in_kernel(fo.scale_by_schedule(joined), range(9), backend)
    right = [2.0, math.sqrt(3), math.sqrt(2), 1.0, 1.0, *[math.sqrt(1 + t) for t in range(1, 5)]]
    torch.testing.assert_close(actual, torch.tensor(right, dtype=torch.float64), **CLOSE_IN_KERNELS)


def test_a_fraction_of_a_step_belongs_to_the_member_that_it_lies_in() -> None:
    joined = fo.join_schedules([fo.linear_schedule(0.0, 4.0, 4), fo.linear_schedule(10.0, 14.0, 4)], [3])
    assert [joined(t).item() for t in (2.5, 2.75, 3.0, 3.5)] == [2.5, 2.75, 10.0, 10.5]


def test_members_of_optax_can_be_joined() -> None:
    members = [optax.linear_schedule(0.0, 1.0, 4), optax.constant_schedule(0.25)]
    ours, theirs = fo.join_schedules(members, [4]), optax.join_schedules(members, [4])
    torch.testing.assert_close(called(ours, range(12)), called(theirs, range(12)), rtol=1e-6, atol=0)


# ---- refusals

BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: fo.join_schedules([], []), ValueError, "got 0 schedules and 0 boundaries"),
    (lambda: fo.join_schedules([math.cos] * 3, [4, 2]), ValueError, r"`boundaries` .* in order, got \[4, 2\]"),
    (lambda: fo.join_schedules([0.1, 0.2], [4]), TypeError, "`schedules` .* got 0.1 at 0"),
    (lambda: fo.join_schedules([math.cos] * 2, ["4"]), TypeError, "`boundaries` .* got '4' at 0"),
    (lambda: fo.cumulative_product_schedule(1.0, 0.9), TypeError, "`factor_fn` .* got 0.9"),
    (lambda: fo.cyclic_schedule(0.0, 1.0, 3, scale_fn=0.5), TypeError, "`scale_fn` .* got 0.5"),
    (lambda: fo.cyclic_schedule(0.0, 1.0, torch.tensor(3)), TypeError, r"`step_size_up` .*int\(step_size_up\)"),
    (lambda: fo.interpolate_schedule("linear", {0: "1"}), TypeError, "`boundaries_and_values` .* '1' at 0"),
    (lambda: fo.interpolate_schedule("linear", {"0": 1.0}), TypeError, "`boundaries_and_values` .* got '0'"),
    (lambda: fo.interpolate_schedule("linear", {math.nan: 1.0}), ValueError, "`boundaries_and_values` .* got nan"),
    (lambda: fo.sgdr_schedule([{"peak_value": 1.0}]), TypeError, "warmup_cosine_decay_schedule: .*'init_value'"),
    (lambda: fo.cosine_decay_schedule(1.0, 0), ValueError, "`decay_steps` .* got 0"),
    (
        lambda: fo.warmup_cosine_decay_schedule(0.0, 1.0, 5, 5),
        ValueError,
        r"\(warmup_steps, inf\), here \(5, inf\), got 5",
    ),
    (lambda: fo.warmup_stable_decay_schedule(0.0, 1.0, 5, 5, 0), ValueError, "`decay_steps` .* got 0"),
    (lambda: fo.exponential_decay(1.0, 5, 0.5, -1), ValueError, "`transition_begin` .* got -1"),
    (lambda: fo.linear_onecycle_schedule(9, 1.0, 0.5, 0.3), ValueError, "`pct_final` .* got 0.3"),
    (lambda: fo.linear_onecycle_schedule(9, 1.0, 1.5), ValueError, "`pct_start` .* got 1.5"),
    (lambda: fo.cosine_onecycle_schedule(9, 1.0, -0.5), ValueError, "`pct_start` .* got -0.5"),
    (lambda: fo.cosine_onecycle_schedule(9, 1.0, div_factor=0), ValueError, "`div_factor` .* got 0"),
    (lambda: fo.linear_schedule("0.1", 0.0, 5), TypeError, "`init_value` .* got '0.1'"),
    (lambda: fo.linear_schedule(0.1, 0.0, "5"), TypeError, "`transition_steps` .* got '5'"),
    (lambda: fo.linear_schedule(0.1, math.nan, 5), ValueError, "`end_value` .* got nan"),
    (lambda: fo.linear_schedule(0.1, torch.ones(2), 5), ValueError, r"`end_value` .*shape \(2,\)"),
    (lambda: fo.linear_schedule(0.1, 0.0, torch.tensor(5)), TypeError, r"`transition_steps` .*int\(transition_steps\)"),
    (lambda: fo.piecewise_constant_schedule(1.0, {3: "0.5"}), TypeError, "`boundaries_and_scales` .* '0.5' at 3"),
    (lambda: fo.schedule(rates="[0, 1]")(lambda count, rate: rate), TypeError, r"name \['rates'\].*: rate"),
    (lambda: fo.schedule(rate="[0, top]")(lambda count, rate: rate), TypeError, r"name \['top'\].*: rate"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_arguments_are_named(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_formula_without_ranges_needs_no_parentheses() -> None:
    @fo.schedule
    def falling(count: Any, value: float, rate: float = 0.5) -> Any:
        return value * rate**count

    assert falling(8.0)(2) == 2.0
    assert repr(falling(8.0)) == "falling(value=8.0)"
    assert fo.schedule(formula="[0, 1]")(lambda count, formula: formula)(0.5)(0) == 0.5


def test_bounds_of_a_range_may_be_numbers_of_any_form() -> None:
    made = fo.schedule(rate="[1e-3, 1e0]")(lambda count, rate: rate)
    assert made(0.5)(3) == 0.5
    with pytest.raises(ValueError, match=r"got 0\.0001"):
        made(1e-4)
