"""Schedulers of torch as schedules: the same rates, as functions of the step."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from .._compiler.rule import plain_number
from .exponential import exponential_decay
from .join import join_schedules
from .periodic import cosine_annealing_schedule, cosine_restarts_schedule, cyclic_schedule
from .piecewise import interpolate_schedule, piecewise_constant_schedule
from .polynomial import constant_schedule, linear_schedule, polynomial_schedule
from .product import cumulative_product_schedule, multiply_schedules
from .schedule import FACTOR, NUMBER, SOME_STEPS, STEPS, Schedule
from .torch_table import SCHEDULERS, make, scheduler


Schedulers = Sequence[tuple[str, Mapping[str, Any]]]


def from_torch_scheduler(
    name: str, *, lr: float | None = None, option: Literal["lr", "momentum"] = "lr", **keywords: Any
) -> Schedule:
    """The schedule that a scheduler of torch follows, of its name and its keywords.

    The value at step t is the learning rate of the update after t calls of `scheduler.step()`. The keywords are
    torch's, for one parameter group: a number where torch takes a list, too. Some choices are of torch's making:

    - `CyclicLR` and `OneCycleLR` bring rates of their own, so `lr` counts for nothing. They cycle the momentum too, the
      first of `betas` if there are any: `option="momentum"` gives that schedule.
    - `SequentialLR` and `ChainedScheduler` take `schedulers=[(name, keywords), ...]`. Chained factors are multiplied,
      which schedulers that set the rate anew at every step do not allow.
    - Past the end of `OneCycleLR` the last value stays; torch goes on along the curve for one step, then raises.

    Args:
      name: the class of `torch.optim.lr_scheduler`, or `"SWALR"`.
      lr: the learning rate that the optimizer would be given.
      option: the option of the parameter groups that is scheduled.
      **keywords: arguments of the class by name, without `optimizer`.

    Returns:
      The schedule.

    Raises:
      TypeError: a keyword is unknown or missing, or a value of the wrong kind.
      ValueError: the name is unknown, a value out of its range, or the scheduler no function of the step
        (`ReduceLROnPlateau`, which is `reduce_on_plateau`).

    Example:
      >>> from_torch_scheduler("StepLR", lr=0.1, step_size=7, gamma=0.5)
      exponential_decay(init_value=0.1, transition_steps=7, decay_rate=0.5, staircase=True)
      >>> warmup = ("LinearLR", {"start_factor": 0.5, "total_iters": 4})
      >>> decay = ("CosineAnnealingLR", {"T_max": 100})
      >>> from_torch_scheduler("SequentialLR", lr=0.1, schedulers=[warmup, decay], milestones=[4])(4)
      tensor(0.1000, dtype=torch.float64)

    Source: torch.optim.lr_scheduler, torch.optim.swa_utils.
    """
    return make(name, lr, option, keywords)


def _function(name: str, fn: Any) -> Callable[[Any], Any]:
    if isinstance(fn, (list, tuple)):
        raise TypeError(
            f"`lr_lambda` of {name} must be a function, got a list: make a schedule for each parameter group."
        )
    if not callable(fn):
        raise TypeError(f"`lr_lambda` of {name} must be a function of the step, got {fn!r:.60}.")
    function: Callable[[Any], Any] = fn
    return function


@scheduler("LambdaLR")
def _lambda(lr: float, lr_lambda: Callable[[Any], Any]) -> Schedule:
    return multiply_schedules([lr, _function("LambdaLR", lr_lambda)])


@scheduler("MultiplicativeLR")
def _multiplicative(lr: float, lr_lambda: Callable[[Any], Any]) -> Schedule:
    return cumulative_product_schedule(lr, _function("MultiplicativeLR", lr_lambda))


@scheduler("StepLR", step_size=SOME_STEPS, gamma=FACTOR)
def _step(lr: float, step_size: int, gamma: float = 0.1) -> Schedule:
    if gamma == 0:  # `exponential_decay` keeps its first value then, as optax's does
        return piecewise_constant_schedule(lr, {step_size: 0.0})
    return exponential_decay(lr, step_size, gamma, staircase=True)


@scheduler("MultiStepLR", gamma=FACTOR)
def _multi_step(lr: float, milestones: Sequence[int], gamma: float = 0.1) -> Schedule:
    steps = _milestones("MultiStepLR", milestones)
    return piecewise_constant_schedule(lr, {k: gamma ** steps.count(k) for k in sorted(steps)})


def _milestones(name: str, milestones: Any) -> list[int]:
    try:
        steps = [plain_number(k) for k in milestones]
    except TypeError:
        raise TypeError(f"`milestones` of {name} must be a list of steps, got {milestones!r:.60}.") from None
    for k in steps:
        if not isinstance(k, (int, float)) or not (0 <= k < math.inf and k == int(k)):
            raise ValueError(f"`milestones` of {name} must be whole numbers in [0, inf), got {k!r}.")
    return [int(k) for k in steps]


@scheduler("ConstantLR", factor="[0, 1]", total_iters=STEPS)
def _constant(lr: float, factor: float = 1.0 / 3, total_iters: int = 5) -> Schedule:
    first = constant_schedule(lr * factor)
    # torch takes the factor back when `total_iters` steps have been made, which is never if it is 0
    return join_schedules([first, constant_schedule(lr)], [total_iters]) if total_iters else first


@scheduler("LinearLR", start_factor="(0, 1]", end_factor="[0, 1]", total_iters=STEPS)
def _linear(lr: float, start_factor: float = 1.0 / 3, end_factor: float = 1.0, total_iters: int = 5) -> Schedule:
    return linear_schedule(lr * start_factor, lr * end_factor, total_iters)


@scheduler("ExponentialLR", gamma=FACTOR)
def _exponential(lr: float, gamma: float) -> Schedule:
    return exponential_decay(lr, 1, gamma) if gamma else piecewise_constant_schedule(lr, {1: 0.0})


@scheduler("PolynomialLR", total_iters=STEPS, power="[0, inf)")
def _polynomial(lr: float, total_iters: int = 5, power: float = 1.0) -> Schedule:
    return polynomial_schedule(lr, 0.0, power, total_iters)


@scheduler("CosineAnnealingLR", T_max=SOME_STEPS, eta_min=NUMBER)
def _cosine_annealing(lr: float, T_max: int, eta_min: float = 0.0) -> Schedule:
    return cosine_annealing_schedule(lr, T_max, eta_min)


@scheduler("CosineAnnealingWarmRestarts", T_0=SOME_STEPS, T_mult="[1, inf)", eta_min=NUMBER)
def _cosine_restarts(lr: float, T_0: int, T_mult: int = 1, eta_min: float = 0.0) -> Schedule:
    return cosine_restarts_schedule(lr, T_0, T_mult, eta_min)


@scheduler(
    "CyclicLR", base_lr=NUMBER, max_lr=NUMBER, step_size_up=SOME_STEPS, step_size_down=STEPS,
    mode=("triangular", "triangular2", "exp_range"), gamma=FACTOR, scale_mode=("cycle", "iterations"),
    base_momentum=NUMBER, max_momentum=NUMBER,
)  # fmt: skip
def _cyclic(
    lr: float | None,
    base_lr: float,
    max_lr: float,
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    mode: str = "triangular",
    gamma: float = 1.0,
    scale_fn: Callable[[Any], Any] | None = None,
    scale_mode: str = "cycle",
    cycle_momentum: bool = True,
    base_momentum: float = 0.8,
    max_momentum: float = 0.9,
    option: str = "lr",
) -> Schedule:
    base, top = (
        (base_lr, max_lr) if option == "lr" else _cycled("CyclicLR", cycle_momentum, max_momentum, base_momentum)
    )
    return cyclic_schedule(base, top, step_size_up, step_size_down, mode, gamma, scale_fn, scale_mode)


def _cycled(name: str, cycle_momentum: bool, *momenta: float) -> tuple[float, ...]:
    if not cycle_momentum:
        raise ValueError(f"{name} with cycle_momentum=False leaves the momentum as it is.")
    return momenta


@scheduler(
    "OneCycleLR", max_lr=NUMBER, total_steps=SOME_STEPS, epochs=SOME_STEPS, steps_per_epoch=SOME_STEPS,
    pct_start="[0, 1]", anneal_strategy=("cos", "linear"), base_momentum=NUMBER, max_momentum=NUMBER,
    div_factor="(0, inf)", final_div_factor="(0, inf)",
)  # fmt: skip
def _one_cycle(
    lr: float | None,
    max_lr: float,
    total_steps: int | None = None,
    epochs: int | None = None,
    steps_per_epoch: int | None = None,
    pct_start: float = 0.3,
    anneal_strategy: str = "cos",
    cycle_momentum: bool = True,
    base_momentum: float = 0.85,
    max_momentum: float = 0.95,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
    option: str = "lr",
) -> Schedule:
    if total_steps is None and (epochs is None or steps_per_epoch is None):
        raise ValueError("OneCycleLR needs `total_steps`, or `epochs` and `steps_per_epoch`.")
    n = total_steps or (epochs or 0) * (steps_per_epoch or 0)
    first = max_lr / div_factor
    values = [first, max_lr, *([first] if three_phase else []), first / final_div_factor]
    if option == "momentum":
        top, base = _cycled("OneCycleLR", cycle_momentum, max_momentum, base_momentum)
        values = [top, base, top, *([top] if three_phase else [])]
    ends = [pct_start * n - 1, *([2 * pct_start * n - 2] if three_phase else []), n - 1]
    return interpolate_schedule(_WAYS[anneal_strategy], _phases(ends, values))


_WAYS = {"cos": "cosine", "linear": "linear"}


def _phases(ends: Sequence[float], values: Sequence[float]) -> dict[float, float]:
    """Corners of a one-cycle schedule: steps and values.

    A step belongs to the first phase that does not end before it, and to the last one if all do. Phases that end
    before step 0, and those that begin when the last step has been made, are left out.

    Args:
      ends: where each phase ends.
      values: the value at the beginning of the first, then at the end of each.
    """
    last = ends[-1]
    skipped = next((k for k, end in enumerate(ends[:-1]) if end >= 0), len(ends) - 1)
    corners = {(ends[skipped - 1] if skipped else 0.0): values[skipped]}
    for end, value in zip(ends[skipped:], values[skipped + 1 :], strict=True):
        corners[end] = value
        if end >= last:
            break
    return corners


@scheduler("SWALR", swa_lr=NUMBER, anneal_epochs=STEPS, anneal_strategy=("cos", "linear"))
def _swa(lr: float, swa_lr: float, anneal_epochs: int = 10, anneal_strategy: str = "cos") -> Schedule:
    if anneal_epochs == 0:
        return constant_schedule(swa_lr)
    return interpolate_schedule(_WAYS[anneal_strategy], {0: lr, anneal_epochs: swa_lr})


def _members(name: str, schedulers: Any) -> list[tuple[str, dict[str, Any]]]:
    """The schedulers that another one is made of."""
    members = list(schedulers) if isinstance(schedulers, (list, tuple)) else []
    if not members:
        raise ValueError(f"`schedulers` of {name} must be a list of one or more pairs, got {schedulers!r:.60}.")
    for k, pair in enumerate(members):
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[1], Mapping)):
            raise TypeError(
                f"`schedulers` of {name} must be pairs (name, keywords), got {pair!r:.60} at {k}; schedules that you "
                f"have are joined by join_schedules and multiplied by `*`."
            )
    return [(member, dict(keywords)) for member, keywords in members]


# multiply the rate by a factor at every step, so that a chain of them is a product
_FACTORS = (
    "MultiplicativeLR", "StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR", "PolynomialLR",
    "CosineAnnealingLR",
)  # fmt: skip


@scheduler("ChainedScheduler")
def _chained(lr: float, schedulers: Schedulers) -> Schedule:
    members = _flat(schedulers)
    for member, keywords in members if len(members) > 1 else []:
        if member in SCHEDULERS and (member not in _FACTORS or keywords.get("eta_min")):
            condition = " unless `eta_min` is 0" if member == "CosineAnnealingLR" else ""
            raise ValueError(
                f"{member} in a ChainedScheduler sets the rate anew at every step{condition}, whatever the others have "
                f"made of it, so the chain is no product. Multiply schedules: "
                f"from_torch_scheduler(...) * from_torch_scheduler(..., lr=1.0)."
            )
    first, *others = [make(member, 1.0 if k else lr, "lr", keywords) for k, (member, keywords) in enumerate(members)]
    return multiply_schedules([first, *others]) if others else first


def _flat(schedulers: Any) -> list[tuple[str, dict[str, Any]]]:
    """The members of a chain, with those of chains among them."""
    flat = []
    for member, keywords in _members("ChainedScheduler", schedulers):
        nested = member == "ChainedScheduler" and keywords.keys() == {"schedulers"}
        flat += _flat(keywords["schedulers"]) if nested else [(member, keywords)]
    return flat


@scheduler("SequentialLR")
def _sequential(lr: float, schedulers: Schedulers, milestones: Sequence[int]) -> Schedule:
    members, steps = _members("SequentialLR", schedulers), _milestones("SequentialLR", milestones)
    if len(steps) != len(members) - 1:
        raise ValueError(
            f"SequentialLR takes one milestone fewer than schedulers, got {len(members)} schedulers and "
            f"{len(steps)} milestones."
        )
    if steps != sorted(steps):
        raise ValueError(f"`milestones` of SequentialLR must be in order, got {steps}.")
    made: list[Schedule] = []
    reached = lr  # by the members so far
    for k, (member, keywords) in enumerate(members):
        start = steps[k - 1] if k else 0
        _check_member(member, keywords, start)
        base = lr
        if start and member in ("SWALR", "MultiplicativeLR"):  # classes that go on from the rate that there is
            base = reached
            if member == "MultiplicativeLR":
                base *= float(_function(member, keywords.get("lr_lambda"))(0))
        made.append(make(member, base, "lr", keywords))
        if member == "CyclicLR" and not k:
            lr = keywords["base_lr"]  # a rate that replaces that of the optimizer before the others take theirs
        if k < len(steps) and steps[k] > start:
            reached = float(made[-1](steps[k] - start - 1))
    swa_rates = {float(keywords["swa_lr"]) for member, keywords in members if member == "SWALR"}
    if len(swa_rates) > 1:
        raise ValueError(
            f"SWALR with different `swa_lr` in one SequentialLR, got {sorted(swa_rates)}, have no rates of their own: "
            f"torch keeps one `swa_lr` in the parameter group, that of the last. Join schedules: "
            f"join_schedules([from_torch_scheduler(...), from_torch_scheduler(...)], milestones)."
        )
    return join_schedules(made, steps) if steps else made[0]


def _check_member(member: str, keywords: Mapping[str, Any], start: int) -> None:
    """Refuses a member of a SequentialLR that torch's own does not give a rate of its own."""
    if member in ("SequentialLR", "ChainedScheduler", "OneCycleLR"):
        reason = (
            "it replaces the rate that the others begin with" if member == "OneCycleLR" else "torch's own fails there"
        )
        raise ValueError(
            f"{member} in a SequentialLR has no meaning of its own ({reason}). Join schedules: "
            f"join_schedules([from_torch_scheduler(...), from_torch_scheduler(...)], milestones)."
        )
    if start and keywords.get("total_iters") == 0:
        raise ValueError(f"`total_iters` of {member} must be in (0, inf) behind a milestone of SequentialLR, got 0.")


@scheduler(
    "ReduceLROnPlateau", mode=("min", "max"), factor="[0, 1)", patience=STEPS, threshold=FACTOR,
    threshold_mode=("rel", "abs"), cooldown=STEPS, min_lr=FACTOR, eps=FACTOR,
)  # fmt: skip
def _plateau(
    lr: float | None,
    mode: str = "min",
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: str = "rel",
    cooldown: int = 0,
    min_lr: float = 0.0,
    eps: float = 1e-8,
) -> Schedule:
    """Refuses, and says which transformation it is."""
    rtol, atol = (threshold, 0.0) if threshold_mode == "rel" else (0.0, threshold)
    rate = lr or 1.0
    raise ValueError(
        f"ReduceLROnPlateau follows a metric, not the step, so it is no schedule but a transformation: put "
        f"reduce_on_plateau(factor={factor!r}, patience={patience + 1}, rtol={rtol!r}, atol={atol!r}, "
        f"cooldown={cooldown}, min_scale={min(min_lr / rate, 1.0)!r}, mode={mode!r}, eps={eps / rate!r}) "
        f"behind the learning rate in the chain, and pass the metric to every update as `value`. Its `patience` "
        f"counts the bad value that it acts on, so it is torch's plus one; `min_scale` and `eps` are fractions of the "
        f"learning rate."
    )
