"""Schedules beside the schedulers of torch: the same rates at every step, and configurations that mean the same."""

import functools
import inspect
import math
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

import functional_optim as fo
from _lib.records import use
from _lib.schedules import called
from functional_optim import adapters
from functional_optim._schedules.torch_table import SCHEDULERS


STEPS = 500
LR = 0.1
CLASSES = {**{name: getattr(lr_scheduler, name) for name in lr_scheduler.__all__}, "SWALR": swa_utils.SWALR}
# torch computes a rate from the one before with up to four roundings, each of 2**-53 of it
ROUNDINGS = 4 * STEPS
# a rate that has come down to an end is a difference of rates of order LR
ATOL = 4 * LR * 2.0**-53


class Case(NamedTuple):
    """A scheduler of torch and its keywords.

    Args:
      name: the class.
      keywords: what it is given; members of another are pairs of names and keywords.
      option: what is compared.
      steps: how many steps.
      more: further roundings.
    """

    name: str
    keywords: dict[str, Any]
    option: str = "lr"
    steps: int = STEPS
    more: float = 0.0

    @property
    def id(self) -> str:
        shown = ", ".join(f"{k}={x!r}" if isinstance(x, (int, float, str)) else k for k, x in self.keywords.items())
        return f"{self.name}({shown}){'.' * (self.option != 'lr')}{self.option * (self.option != 'lr')}"


def annealing(half_period: int) -> float:
    """Roundings in torch's CosineAnnealingLR besides.

    The argument pi t / T is off by 2**-53 of it, which counts most near the end of the way down, where 1 + cos is
    (pi k / T)**2 / 2: 2 t roundings. Behind each end the rate begins anew at 1 - cos(pi / T), and is then multiplied by
    (1 + cos ...) / (1 + cos(pi + pi / T)): both are about (pi / T)**2 / 2 and wrong by 2**-53, 4 (T / pi)**2 roundings.
    """
    return 2 * STEPS + half_period**2


def table(step: int) -> float:
    return [1.0, 0.5, 2.0][step % 3]


def falling(step: int) -> float:
    return 0.95**step


def nearly_one(step: int) -> float:
    return 0.999 - 0.001 * (step % 7)


def half(step: int) -> float:
    return 0.5


def smaller(x: float) -> float:
    return 1.0 / x


CYCLE = {"base_lr": 0.01, "max_lr": 0.3, "step_size_up": 7, "step_size_down": 4}
MOMENTA = {"base_momentum": 0.8, "max_momentum": 0.97}
WARMUP = ("LinearLR", {"start_factor": 0.25, "total_iters": 20})
CASES = [
    Case("LambdaLR", {"lr_lambda": falling}),
    Case("LambdaLR", {"lr_lambda": table}),
    Case("MultiplicativeLR", {"lr_lambda": lambda step: 0.97}),
    Case("MultiplicativeLR", {"lr_lambda": nearly_one}),
    Case("StepLR", {"step_size": 7, "gamma": 0.5}),
    Case("StepLR", {"step_size": 30}),
    Case("StepLR", {"step_size": 1, "gamma": 1.01}),
    Case("StepLR", {"step_size": 5, "gamma": 0}),
    Case("MultiStepLR", {"milestones": [30, 80, 80, 200], "gamma": 0.5}),
    Case("MultiStepLR", {"milestones": [200, 0, 30]}),
    Case("MultiStepLR", {"milestones": []}),
    Case("ConstantLR", {}),
    Case("ConstantLR", {"factor": 0.1, "total_iters": 40}),
    Case("ConstantLR", {"factor": 0.5, "total_iters": 0}),
    Case("ConstantLR", {"factor": 0.0, "total_iters": 600}),
    Case("LinearLR", {}),
    Case("LinearLR", {"start_factor": 0.01, "total_iters": 450}),
    Case("LinearLR", {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 100}),
    Case("LinearLR", {"start_factor": 0.3, "total_iters": 0}),
    Case("LinearLR", {"start_factor": 0.3, "total_iters": 1}),
    Case("ExponentialLR", {"gamma": 0.99}),
    Case("ExponentialLR", {"gamma": 0}),
    Case("PolynomialLR", {}),
    Case("PolynomialLR", {"total_iters": 400, "power": 2.0}),
    Case("PolynomialLR", {"total_iters": 600, "power": 0.5}),
    Case("PolynomialLR", {"total_iters": 0}),
    Case("PolynomialLR", {"total_iters": 3, "power": 0}),
    *(
        Case("CosineAnnealingLR", {"T_max": n, **more}, more=annealing(n))
        for n, more in ((1, {}), (2, {"eta_min": 0.05}), (7, {}), (50, {"eta_min": 1e-3}), (400, {}), (1000, {}))
    ),
    Case("CosineAnnealingWarmRestarts", {"T_0": 10}),
    Case("CosineAnnealingWarmRestarts", {"T_0": 1, "T_mult": 2, "eta_min": 0.01}),
    Case("CosineAnnealingWarmRestarts", {"T_0": 3, "T_mult": 3}),
    Case("CosineAnnealingWarmRestarts", {"T_0": 1}),
    Case("CosineAnnealingWarmRestarts", {"T_0": 7, "T_mult": 5, "eta_min": 0.2}),
    Case("CyclicLR", {**CYCLE}),
    Case("CyclicLR", {"base_lr": 0.01, "max_lr": 0.3, "step_size_up": 60, "mode": "triangular2"}),
    Case("CyclicLR", {**CYCLE, "mode": "exp_range", "gamma": 0.99}),
    Case("CyclicLR", {**CYCLE, "step_size_down": 0}),
    Case("CyclicLR", {**CYCLE, "scale_fn": smaller, "scale_mode": "cycle"}),
    Case("CyclicLR", {**CYCLE, "scale_fn": falling, "scale_mode": "iterations"}),
    Case("CyclicLR", {**CYCLE, "mode": "triangular2", **MOMENTA}, option="momentum"),
    Case("OneCycleLR", {"max_lr": 0.4, "total_steps": STEPS}),
    Case("OneCycleLR", {"max_lr": 0.4, "epochs": 20, "steps_per_epoch": 30, "anneal_strategy": "linear"}),
    Case("OneCycleLR", {"max_lr": 0.4, "total_steps": STEPS, "three_phase": True, "div_factor": 10.0}),
    Case("OneCycleLR", {"max_lr": 0.4, "total_steps": STEPS, "three_phase": True, "pct_start": 0.6}),
    Case("OneCycleLR", {"max_lr": 0.4, "total_steps": STEPS, "pct_start": 0.0, "final_div_factor": 10.0}),
    Case("OneCycleLR", {"max_lr": 0.4, "total_steps": STEPS, "pct_start": 1.0}),
    Case("OneCycleLR", {"max_lr": 0.4, "total_steps": STEPS, **MOMENTA}, option="momentum"),
    Case("OneCycleLR", {"max_lr": 0.4, "total_steps": STEPS, "three_phase": True, **MOMENTA}, option="momentum"),
    *(
        Case("OneCycleLR", {"max_lr": 0.4, "total_steps": n, "pct_start": p, "three_phase": three}, steps=n)
        for n in (1, 2, 3, 7)
        for p in (0.0, 0.3, 0.6, 1.0)
        for three in (False, True)
        if (n, p) != (1, 1.0)  # where torch divides by zero
    ),
    *(
        Case("SWALR", {"swa_lr": x, "anneal_epochs": n, "anneal_strategy": s})
        for x, n, s in (
            (0.02, 10, "cos"),
            (0.3, 400, "cos"),
            (0.02, 100, "linear"),
            (0.02, 1, "cos"),
            (0.05, 0, "linear"),
        )
    ),
    # lengths of one and two steps, and corners that coincide
    Case("MultiStepLR", {"milestones": [1, 0, 1, 2], "gamma": 0.5}),
    Case("ConstantLR", {"factor": 0.5, "total_iters": 1}),
    Case("LinearLR", {"start_factor": 0.5, "end_factor": 0.0, "total_iters": 2}),
    Case("LinearLR", {"start_factor": 1.0, "end_factor": 1.0, "total_iters": 2}),
    Case("PolynomialLR", {"total_iters": 1}),
    Case("PolynomialLR", {"total_iters": 2, "power": 3.0}),
    Case("CosineAnnealingWarmRestarts", {"T_0": 2, "T_mult": 2}),
    *(
        Case("CyclicLR", {**CYCLE, "step_size_up": up, "step_size_down": down, "mode": mode, "gamma": 0.99})
        for up, down, mode in ((1, 0, "triangular"), (1, 1, "triangular2"), (1, 2, "exp_range"), (2, 1, "triangular"))
    ),
    Case("SWALR", {"swa_lr": 0.02, "anneal_epochs": 2}),
    Case("ChainedScheduler", {"schedulers": [WARMUP, ("ExponentialLR", {"gamma": 0.99})]}),
    Case("ChainedScheduler", {"schedulers": [("LambdaLR", {"lr_lambda": falling})]}),
    Case(
        "ChainedScheduler",
        {
            "schedulers": [
                ("ConstantLR", {"factor": 0.5, "total_iters": 40}),
                ("ChainedScheduler", {"schedulers": [("StepLR", {"step_size": 60}), WARMUP]}),
                ("MultiplicativeLR", {"lr_lambda": nearly_one}),
                ("MultiStepLR", {"milestones": [3, 300], "gamma": 2.0}),
                ("PolynomialLR", {"total_iters": 450}),
            ]
        },
    ),
    Case(
        "ChainedScheduler",
        {"schedulers": [WARMUP, ("CosineAnnealingLR", {"T_max": 100})]},
        steps=101,  # up to T_max, where torch forgets what the others have made of the rate
        more=annealing(100),
    ),
    Case(
        "SequentialLR",
        {"schedulers": [WARMUP, ("CosineAnnealingLR", {"T_max": 90})], "milestones": [20]},
        more=annealing(90),
    ),
    Case(
        "SequentialLR",
        {
            "schedulers": [
                ("ConstantLR", {"factor": 0.1, "total_iters": 20}),
                ("CosineAnnealingWarmRestarts", {"T_0": 5, "T_mult": 2}),
                ("LambdaLR", {"lr_lambda": table}),
                ("StepLR", {"step_size": 9}),
                ("MultiStepLR", {"milestones": [0, 30], "gamma": 0.5}),
                ("ExponentialLR", {"gamma": 0.99}),
                ("MultiplicativeLR", {"lr_lambda": nearly_one}),
                ("CyclicLR", CYCLE),
                ("LinearLR", {}),
                ("PolynomialLR", {"total_iters": 30}),
                ("SWALR", {"swa_lr": 0.3, "anneal_epochs": 5}),
            ],
            "milestones": [20, 60, 110, 120, 150, 200, 250, 300, 330, 340],
        },
    ),
    Case(
        "SequentialLR",
        {
            "schedulers": [("SWALR", {"swa_lr": 0.3, "anneal_epochs": n}) for n in (5, 40)],
            "milestones": [20],
        },
    ),
    Case("SequentialLR", {"schedulers": [("CyclicLR", CYCLE), ("ExponentialLR", {"gamma": 0.9})], "milestones": [50]}),
    Case(
        "SequentialLR",
        {
            "schedulers": [WARMUP, ("StepLR", {"step_size": 3}), ("MultiplicativeLR", {"lr_lambda": half})],
            "milestones": [0, 0],
        },
    ),
    Case("SequentialLR", {"schedulers": [("ExponentialLR", {"gamma": 0.9})], "milestones": []}),
]
IDS = [case.id for case in CASES]
rows = pytest.mark.parametrize("row", range(len(CASES)), ids=IDS)


def build(name: str, keywords: dict[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    """The scheduler of torch."""
    if "schedulers" not in keywords:
        return CLASSES[name](optimizer, **keywords)
    members = [build(member, more, optimizer) for member, more in keywords["schedulers"]]
    if name == "ChainedScheduler":
        return lr_scheduler.ChainedScheduler(members)
    return lr_scheduler.SequentialLR(optimizer, members, keywords["milestones"])


@functools.cache
def expected(row: int) -> torch.Tensor:
    """The option of torch's optimizer at each step."""
    case = CASES[row]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR, momentum=0.5)
    scheduler, values = build(case.name, case.keywords, optimizer), []
    for step in range(case.steps):
        if step:
            optimizer.step()
            scheduler.step()
        values.append(float(optimizer.param_groups[0][case.option]))
    return torch.tensor(values, dtype=torch.float64)


@functools.cache
def ours(row: int) -> fo.Schedule:
    case = CASES[row]
    option: Any = case.option
    return fo.from_torch_scheduler(case.name, lr=LR, option=option, **case.keywords)


def bounds(case: Case) -> dict[str, float]:
    return {"rtol": (ROUNDINGS + case.more) * 2.0**-53, "atol": ATOL}


@rows
def test_rates_are_those_of_torch(row: int) -> None:
    case = CASES[row]
    if 0 in case.keywords.get("milestones", ()) and torch.__version__ < (2, 12):
        pytest.skip("SequentialLR of this version of torch begins with its first member, whatever the milestones")
    torch.testing.assert_close(ours(row)(torch.arange(case.steps)), expected(row), **bounds(case))


def test_the_bounds_tell_neighbouring_settings_apart() -> None:
    """The loosest of them is far below what a rate changes by in a step."""
    assert max(bounds(case)["rtol"] for case in CASES) < 1e-9


@fo.elementwise
def place(u: torch.Tensor, p: torch.Tensor, *, index: Any, value: Any) -> torch.Tensor:
    """A number at one place of the update."""
    return torch.where(p == index, value, u)


FIRST = {case.name: row for row, case in reversed(list(enumerate(CASES)))}
LAST = {case.name: row for row, case in enumerate(CASES)}


@pytest.mark.parametrize("chosen", [FIRST, LAST], ids=["first", "last"])
def test_kernels_compute_the_rates_of_torch(chosen: dict[str, int]) -> None:
    """One chain, one kernel, with a schedule of each kind."""
    at = list(chosen.values())
    tx = fo.chain(*[place(k, ours(row)) for k, row in enumerate(at)])
    params, updates = torch.arange(len(at), dtype=torch.float64), torch.zeros(len(at), dtype=torch.float64)
    state, steps = tx.init(params), []
    with use("c"):
        assert len(fo.explain(tx, params).kernels) == 1
        for _ in range(20):
            values, state = tx.update(updates, state, params)
            steps.append(values)
    for k, row in enumerate(at):
        length = min(20, CASES[row].steps)
        actual, right = torch.stack(steps)[:length, k], expected(row)[:length]
        torch.testing.assert_close(actual, right, **bounds(CASES[row]), msg=lambda m, row=row: f"{IDS[row]}: {m}")


# functions of the user's that Python must compute: a list is read, or every factor depends on the step
HOSTS = ("table", "nearly_one", "half")


@rows
def test_only_functions_of_the_user_are_called_by_python(row: int) -> None:
    notes = fo.explain(fo.scale_by_schedule(ours(row)), torch.zeros(1)).notes
    assert bool(notes) == any(name in repr(CASES[row].keywords) for name in HOSTS[:2])


@rows
def test_schedules_print_pickle_and_compare(row: int) -> None:
    schedule = ours(row)
    case = CASES[row]
    option: Any = case.option
    assert schedule == fo.from_torch_scheduler(case.name, lr=LR, option=option, **case.keywords)
    assert schedule != fo.from_torch_scheduler(case.name, lr=LR, option=option, **case.keywords) * 1.0
    if "<function" not in repr(schedule):
        assert eval(repr(schedule), vars(fo)) == schedule
    if "<lambda>" not in repr(schedule):
        assert pickle.loads(pickle.dumps(schedule)) == schedule


def test_no_scheduler_of_torch_is_missing() -> None:
    assert set(CLASSES) - {"LRScheduler"} == {case.name for case in CASES} | {"ReduceLROnPlateau"}


def test_rates_that_a_scheduler_brings_need_no_other() -> None:
    for name, keywords in (("CyclicLR", CYCLE), ("OneCycleLR", {"max_lr": 0.4, "total_steps": 9})):
        assert fo.from_torch_scheduler(name, **keywords) == fo.from_torch_scheduler(name, lr=3.0, **keywords)


def test_a_tensor_as_the_rate_is_a_factor() -> None:
    rate = torch.tensor(0.5, dtype=torch.float64)
    schedule = fo.from_torch_scheduler("StepLR", lr=1.0, step_size=1, gamma=0.5) * rate
    assert schedule(1) == 0.25
    rate.fill_(4.0)
    assert schedule(1) == 2.0


def test_the_keywords_and_defaults_are_torchs() -> None:
    for name, scheduler in SCHEDULERS.items():
        theirs = dict(inspect.signature(CLASSES[name]).parameters)
        ignored = {"optimizer", "last_epoch"}
        assert {k: p.default for k, p in theirs.items() if k not in ignored} == {
            k: p.default for k, p in scheduler.keywords.items() if k != "option"
        }, name


def test_a_function_is_asked_for_each_factor_once() -> None:
    asked: list[int] = []

    def factor(step: int) -> float:
        asked.append(step)
        return 0.5

    schedule = fo.from_torch_scheduler("MultiplicativeLR", lr=1.0, lr_lambda=factor)
    assert called(schedule, range(60)).tolist() == [0.5**t for t in range(60)]
    assert asked == list(range(1, 60))
    assert called(schedule, [58, 3, 59]).tolist() == [0.5**58, 0.5**3, 0.5**59]


# ---- the page

PAGE = (Path(__file__).parents[2] / "docs" / "schedules.md").read_text()


def test_the_page_has_every_scheduler_of_torch() -> None:
    named = set(re.findall(r"^\| `(\w+)` \| `", PAGE, re.MULTILINE))
    assert named >= set(CLASSES) - {"LRScheduler"}
    assert set(re.findall(r'torchs\("(\w+)"', PAGE)) == {case.name for case in CASES}


def test_the_examples_of_the_page_are_calls_of_optax_too() -> None:
    """test_schedules.py compares the values; here, that the table is whole and its arguments are optax's."""
    examples = dict(re.findall(r"^\| `(\w+)` \| `(fo\..*)` \|$", PAGE, re.MULTILINE))
    public = {name for name in vars(optax.schedules) if name[0] != "_"}
    assert examples.keys() == {name for name in public if name.endswith(("schedule", "schedules", "decay"))}
    for name, example in examples.items():
        schedule = eval(example, {"fo": fo})
        assert callable(eval(example, {"fo": optax})), name
        assert 0.0 <= schedule(0) <= schedule(9) <= 0.1 or 0.1 >= schedule(0) >= schedule(9) >= 0.0, name


# ---- refusals

F = fo.from_torch_scheduler
PAIR = ("StepLR", {"step_size": 3})
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: F("StpLR", lr=0.1), ValueError, "no scheduler 'StpLR'; there are LambdaLR, .*ReduceLROnPlateau"),
    (lambda: F("StepLR", lr=0.1, stepsize=3), TypeError, "StepLR has no keyword 'stepsize'; it takes step_size, gamma"),
    (lambda: F("StepLR", lr=0.1), TypeError, "StepLR needs 'step_size'"),
    (lambda: F("StepLR", step_size=3), TypeError, "`lr` of StepLR .* got None"),
    (lambda: F("StepLR", lr=[0.1], step_size=3), TypeError, "`lr` of StepLR .*for each parameter group"),
    (lambda: F("StepLR", lr=torch.tensor(0.1), step_size=3), TypeError, "`lr` of StepLR .*multiply it by the tensor"),
    (lambda: F("StepLR", lr=math.nan, step_size=3), ValueError, "`lr` of StepLR .* got nan"),
    (
        lambda: F("StepLR", lr=0.1, step_size=0),
        ValueError,
        r"`step_size` of StepLR .*whole number in \(0, inf\), got 0",
    ),
    (lambda: F("StepLR", lr=0.1, step_size=2.5), ValueError, "`step_size` .* got 2.5"),
    (lambda: F("StepLR", lr=0.1, step_size="7"), TypeError, "`step_size` .* got '7'"),
    (lambda: F("StepLR", lr=0.1, step_size=7, gamma=-1.0), ValueError, "`gamma` .* got -1.0"),
    (lambda: F("StepLR", lr=0.1, step_size=7, last_epoch=3), ValueError, "`last_epoch` of StepLR"),
    (lambda: F("StepLR", lr=0.1, step_size=7, option="momentum"), ValueError, "StepLR leaves the momentum"),
    (lambda: F("StepLR", lr=0.1, step_size=7, option="beta"), ValueError, "`option` .* got 'beta'"),  # type: ignore[arg-type]
    (lambda: F("MultiStepLR", lr=0.1, milestones=[-3]), ValueError, "`milestones` of MultiStepLR .* got -3"),
    (lambda: F("MultiStepLR", lr=0.1, milestones=7), TypeError, "`milestones` of MultiStepLR .* got 7"),
    (lambda: F("MultiStepLR", lr=0.1, milestones=["7"]), ValueError, "`milestones` of MultiStepLR .* got '7'"),
    (lambda: F("ConstantLR", lr=0.1, factor=1.5), ValueError, r"`factor` .*\[0, 1\], got 1.5"),
    (lambda: F("ConstantLR", lr=0.1, total_iters=-1), ValueError, "`total_iters` .* got -1"),
    (lambda: F("LinearLR", lr=0.1, start_factor=0.0), ValueError, r"`start_factor` .*\(0, 1\], got 0.0"),
    (lambda: F("LinearLR", lr=0.1, end_factor=1.1), ValueError, "`end_factor` .* got 1.1"),
    (lambda: F("PolynomialLR", lr=0.1, power=-1.0), ValueError, "`power` .* got -1.0"),
    (lambda: F("CosineAnnealingLR", lr=0.1, T_max=0), ValueError, "`T_max` .* got 0"),
    (lambda: F("CosineAnnealingWarmRestarts", lr=0.1, T_0=0), ValueError, "`T_0` .* got 0"),
    (lambda: F("CosineAnnealingWarmRestarts", lr=0.1, T_0=5, T_mult=0), ValueError, "`T_mult` .* got 0"),
    (lambda: F("CosineAnnealingWarmRestarts", lr=0.1, T_0=5, T_mult=1.5), ValueError, "`T_mult` .* got 1.5"),
    (lambda: F("CyclicLR", **{**CYCLE, "mode": "square"}), ValueError, "`mode` of CyclicLR .* got 'square'"),
    (
        lambda: F("CyclicLR", **{**CYCLE, "base_lr": [0.1, 0.2]}),
        TypeError,
        "`base_lr` of CyclicLR .*each parameter group",
    ),
    (lambda: F("CyclicLR", **{**CYCLE, "step_size_up": 0}), ValueError, "`step_size_up` .* got 0"),
    (
        lambda: F("CyclicLR", **CYCLE, cycle_momentum=False, option="momentum"),
        ValueError,
        "CyclicLR with cycle_momentum",
    ),
    (lambda: F("OneCycleLR", max_lr=0.1), ValueError, "OneCycleLR needs `total_steps`, or"),
    (lambda: F("OneCycleLR", max_lr=0.1, total_steps=0), ValueError, "`total_steps` .* got 0"),
    (lambda: F("OneCycleLR", max_lr=0.1, total_steps=9, pct_start=1.1), ValueError, "`pct_start` .* got 1.1"),
    (
        lambda: F("OneCycleLR", max_lr=0.1, total_steps=9, anneal_strategy="sin"),
        ValueError,
        "`anneal_strategy` .*'sin'",
    ),
    (lambda: F("SWALR", lr=0.1, swa_lr=0.1, anneal_epochs=-1), ValueError, "`anneal_epochs` .* got -1"),
    (lambda: F("LambdaLR", lr=0.1, lr_lambda=[half]), TypeError, "`lr_lambda` of LambdaLR .*each parameter group"),
    (lambda: F("LambdaLR", lr=0.1, lr_lambda=0.5), TypeError, "`lr_lambda` of LambdaLR .* got 0.5"),
    (lambda: F("MultiplicativeLR", lr=0.1, lr_lambda=0.5), TypeError, "`lr_lambda` of MultiplicativeLR .* got 0.5"),
    (
        lambda: F("ChainedScheduler", lr=0.1, schedulers=[]),
        ValueError,
        "`schedulers` of ChainedScheduler .*one or more",
    ),
    (lambda: F("ChainedScheduler", lr=0.1, schedulers=[fo.constant_schedule(1.0)]), TypeError, "must be pairs .* at 0"),
    (
        lambda: F("ChainedScheduler", lr=0.1, schedulers=[PAIR, ("LambdaLR", {"lr_lambda": half})]),
        ValueError,
        "LambdaLR in a ChainedScheduler sets the rate anew",
    ),
    (
        lambda: F("ChainedScheduler", lr=0.1, schedulers=[PAIR, ("CosineAnnealingLR", {"T_max": 9, "eta_min": 0.01})]),
        ValueError,
        "CosineAnnealingLR in a ChainedScheduler .* unless `eta_min` is 0",
    ),
    (lambda: F("ChainedScheduler", lr=0.1, schedulers=[PAIR, ("StpLR", {})]), ValueError, "no scheduler 'StpLR'"),
    (
        lambda: F("SequentialLR", lr=0.1, schedulers=[PAIR, PAIR], milestones=[]),
        ValueError,
        "2 schedulers and 0 milest",
    ),
    (
        lambda: F("SequentialLR", lr=0.1, schedulers=[PAIR] * 3, milestones=[5, 3]),
        ValueError,
        r"`milestones` of SequentialLR must be in order, got \[5, 3\]",
    ),
    (
        lambda: F(
            "SequentialLR", lr=0.1, schedulers=[PAIR, ("ChainedScheduler", {"schedulers": [PAIR]})], milestones=[5]
        ),
        ValueError,
        "ChainedScheduler in a SequentialLR has no meaning",
    ),
    (
        lambda: F("SequentialLR", lr=0.1, schedulers=[PAIR, ("LinearLR", {"total_iters": 0})], milestones=[5]),
        ValueError,
        "`total_iters` of LinearLR .* behind a milestone",
    ),
    (
        lambda: F("SequentialLR", lr=0.1, schedulers=[("SWALR", {"swa_lr": x}) for x in (0.2, 0.1)], milestones=[5]),
        ValueError,
        r"SWALR with different `swa_lr` .* got \[0.1, 0.2\]",
    ),
    (
        lambda: F("SequentialLR", lr=0.1, schedulers=[PAIR, ("ReduceLROnPlateau", {})], milestones=[5]),
        ValueError,
        "ReduceLROnPlateau follows a metric",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_refusals_name_the_argument(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# ---- ReduceLROnPlateau

PLATEAUS: list[dict[str, Any]] = [
    {},
    {"factor": 0.5, "patience": 1},
    {"factor": 0.5, "patience": 0, "cooldown": 2},
    {"factor": 0.3, "patience": 2, "cooldown": 3, "threshold": 0.1, "min_lr": 0.01},
    {"mode": "max", "factor": 0.5, "patience": 2, "threshold": 0.05},
    {"mode": "max", "factor": 0.5, "patience": 1, "threshold": 0.05, "threshold_mode": "abs"},
    {"factor": 0.5, "patience": 1, "threshold": 0.2, "threshold_mode": "abs", "eps": 0.01},
    {"factor": 0.5, "patience": 1, "min_lr": 0.5},
]


def metrics(kind: str) -> list[float]:
    """A metric that falls, stalls and is at times not a number, or one that wanders about zero."""
    noise = torch.rand(500, generator=torch.Generator().manual_seed(3), dtype=torch.float64).tolist()
    if kind == "wandering":
        return [x - 0.5 for x in noise]
    return [math.nan if t % 37 == 5 else max(2.0 - 0.05 * t, 0.9) + 0.1 * noise[t] for t in range(500)]


def named(keywords: dict[str, Any]) -> fo.GradientTransformation:
    """The transformation that the refusal names."""
    with pytest.raises(ValueError, match="no schedule but a transformation") as refused:
        fo.from_torch_scheduler("ReduceLROnPlateau", lr=LR, **keywords)
    (call,) = re.findall(r"reduce_on_plateau\(.*?\)", str(refused.value))
    made: fo.GradientTransformation = eval(call, vars(fo))
    return made


@pytest.mark.parametrize("kind", ["falling", "wandering"])
@pytest.mark.parametrize("keywords", PLATEAUS, ids=str)
def test_the_transformation_that_is_named_follows_torchs_plateau(keywords: dict[str, Any], kind: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler, tx = lr_scheduler.ReduceLROnPlateau(optimizer, **keywords), named(keywords)
    state: Any = tx.init(torch.zeros(1, dtype=torch.float64))
    theirs, scales = [], []
    for value in metrics(kind):
        scheduler.step(value)  # torch's next rate; here the value counts for its own update
        theirs.append(optimizer.param_groups[0]["lr"])
        with use("c"):
            update, state = tx.update(torch.full((1,), LR, dtype=torch.float64), state, value=value)
        scales.append(update)
    torch.testing.assert_close(torch.cat(scales), torch.tensor(theirs, dtype=torch.float64), rtol=1e-14, atol=0)
    assert scales[-1] < LR or keywords.get("min_lr", 0.0) > LR


OPTAX: list[dict[str, Any]] = [
    {"factor": 0.5, "patience": 3},
    {"factor": 0.5, "patience": 2, "rtol": 0.0, "atol": 0.05, "cooldown": 4},
    {"factor": 0.9, "patience": 2, "accumulation_size": 3, "min_scale": 0.3},
]


@functools.cache
def of_optax(row: int) -> list[tuple[float, dict[str, float]]]:
    """The scale and the state after each value, as optax has them."""
    other = optax.contrib.reduce_on_plateau(**OPTAX[row])
    update, state, records = jax.jit(other.update), other.init(jnp.zeros(1)), []
    for value in metrics("falling"):
        scaled, state = update(jnp.ones(1), state, value=value)
        fields = {"value_count" if k == "count" else k: float(x) for k, x in state._asdict().items()}
        records.append((float(scaled[0]), fields))
    return records


@pytest.mark.parametrize("backend", ["reference", "foreach", "c"])
@pytest.mark.parametrize("row", range(len(OPTAX)), ids=map(str, OPTAX))
def test_the_plateau_is_that_of_optax(row: int, backend: str) -> None:
    tx, params = fo.reduce_on_plateau(**OPTAX[row]), torch.zeros(2, dtype=torch.float64)
    state: Any = tx.init(params)
    for value, (scale, expected) in zip(metrics("falling"), of_optax(row), strict=True):
        with use(backend):
            update, state = tx.update(torch.ones_like(params), state, value=value)
        fields = {k: float(x) for k, x in state._asdict().items()}
        assert update.tolist() == pytest.approx([scale] * 2, rel=1e-14)
        assert fields == pytest.approx(expected, rel=1e-14, nan_ok=True)
    assert state.scale < 1


def test_an_optimizer_takes_its_loss_as_the_metric() -> None:
    """One number for all leaves, however they are stored; the closure's loss is the value."""
    params = [torch.nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    tx = fo.chain(fo.sgd(1.0), fo.reduce_on_plateau(factor=0.5, patience=2, min_scale=0.2))
    optimizer = adapters.TransformOptimizer(params, tx)
    moves = []
    for loss in (2.0, 1.0, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step(lambda loss=loss: torch.tensor(loss))
        moves.append([float((b - p.detach())[0]) for b, p in zip(before, params, strict=True)])
    assert [move[0] for move in moves] == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.2], rel=1e-6)
    # a bfloat16 below 8 is a multiple of 1 / 32
    assert [move[1] for move in moves] == pytest.approx([move[0] for move in moves], abs=1 / 32)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_leaf_that_comes_late_has_seen_no_value(mode: Any) -> None:
    tx = fo.reduce_on_plateau(factor=0.5, patience=1, accumulation_size=2, mode=mode)
    params = {"early": torch.zeros(1), "late": torch.zeros(1)}
    state: Any = tx.init(params)
    scales: dict[str, list[float]] = {"early": [], "late": []}
    for step, value in enumerate((1.0, 2.0, 3.0, 4.0, 5.0, 6.0)):
        signed = value if mode == "max" else -value
        updates = {"early": torch.ones(1), "late": torch.ones(1) if step > 2 else None}
        _, state = tx.update(updates, state, value=signed)
        for name in params:
            scales[name].append(float(state.scale[name]))
    assert scales == {"early": [1.0] * 6, "late": [1.0] * 6}
    assert float(state.best_value["early"]) == (5.5 if mode == "max" else -5.5)
    assert float(state.best_value["late"]) == (4.5 if mode == "max" else -4.5)


@pytest.mark.triton
def test_the_plateau_in_triton() -> None:
    tx, params = fo.reduce_on_plateau(factor=0.5, patience=1, mode="max", accumulation_size=2), torch.zeros(2)
    state: Any = tx.init(params)
    scales = []
    for value in (1.0, 3.0, 2.0, 1.0, 5.0, 4.0):  # means of two: 2, 1.5, 4.5
        with use("triton"):
            update, state = tx.update(torch.ones(2), state, value=value)
        scales.append(float(update[0]))
    assert scales == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    assert (float(state.best_value), float(state.plateau_count)) == (4.5, 0.0)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("rtol", [0.0, 1e-4])
def test_plateaus_of_infinite_metrics(mode: str, rtol: float) -> None:
    """A best value of infinity is one, such as the ratio of an exact image to its noise."""
    draw, sign = random.Random(0), 1 if mode == "max" else -1
    for _ in range(50):
        opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        other = torch.optim.lr_scheduler.ReduceLROnPlateau(
            opt,
            mode=mode,
            factor=0.5,
            patience=1,
            threshold=rtol,
            threshold_mode="rel",
            eps=0.0,  # type: ignore[arg-type]
        )
        tx, params = fo.reduce_on_plateau(factor=0.5, patience=2, rtol=rtol, mode=mode), torch.zeros(1)
        state = tx.init(params)
        for _ in range(20):
            value = draw.choice([1.0, 2.0, 5.0, math.inf, -math.inf, sign * math.inf])
            other.step(value)
            updates, state = tx.update(torch.ones(1), state, params, value=torch.tensor(value, dtype=torch.float64))
            assert float(updates) == opt.param_groups[0]["lr"]
