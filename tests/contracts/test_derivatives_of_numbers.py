"""Derivatives of steps by hyper-parameters, numbers of schedules and states, beside central differences."""

from collections.abc import Callable, Sequence
from typing import Any

import optree
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import functional_optim as fo
from _lib.extremes import rules_of
from _lib.transforms import CASES


F64 = torch.float64
STEPS = 5


def drawn(seed: int) -> dict[str, torch.Tensor]:
    """Numbers of either sign, none of them near a place without a derivative, and no two near each other."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=F64)
    x = {"a": torch.rand(2, 2, generator=generator, dtype=F64), "b": torch.rand(2, generator=generator, dtype=F64)}
    return {"a": (0.3 + x["a"]) * signs, "b": (0.3 + x["b"]) * signs[0]}


def gradients_of(step: int) -> dict[str, torch.Tensor]:
    """Those of a step; second moments of gradients that repeat would be equal, a corner of their maximum."""
    return {k: (1 + step / 8) * g for k, g in drawn(2 + step % 2).items()}


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One output, so that a derivative is checked once and not for each tensor."""
    return torch.cat([x.reshape(-1) for x in tensors])


def is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def holds(run: Callable[..., Any], numbers: Sequence[torch.Tensor]) -> None:
    """Checks both derivatives beside central differences of step 1e-6; see `test_differentiation.py` for the bounds."""
    inputs = [x.detach().clone().requires_grad_() for x in numbers]
    assert gradcheck(run, inputs, fast_mode=True)
    assert gradgradcheck(run, inputs, fast_mode=True, atol=1e-4)


# numbers of which no step is the smallest or largest
SMOOTH = {"scale_by_rprop": {"min_step_size": 0.01, "max_step_size": 50.0}}


def live_numbers(tx: Any) -> dict[str, float]:
    """The hyper-parameters of a rule that may be tensors, and numbers that are far from the ends of their ranges.

    Differences of step 1e-6 say nothing of numbers that are not much larger.
    """
    (rule,) = rules_of(tx)
    found: dict[str, float] = {}
    for name in rule.hypers:
        value = tx._bound.values[name]
        if name in rule.static or not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        if name in SMOOTH.get(rule.name, {}):
            found[name] = SMOOTH[rule.name][name]
            continue
        for x in (float(value), 0.4, 1.5) if 0.01 < abs(value) < 1 else (0.4, 1.5, float(value)):
            try:
                tx.replace(**{name: torch.tensor(x, dtype=F64)})
                tx.replace(**{name: x})
            except (ValueError, TypeError):
                continue
            found[name] = x
            break
    return found


RULES: dict[str, Any] = {}
for case in CASES:
    inner = getattr(case.ours, "inner", case.ours)
    if inner._bound and live_numbers(inner):
        RULES.setdefault(rules_of(inner)[0].name, inner)


@pytest.mark.parametrize("name", RULES)
def test_every_number_and_state_of_a_rule_has_derivatives(name: str) -> None:
    values = live_numbers(RULES[name])
    hypers = [torch.tensor(x, dtype=F64) for x in values.values()]
    params = drawn(1)
    first = RULES[name].replace(**dict(zip(values, hypers, strict=True)))
    _, state = first.update(gradients_of(1), first.init(params), params)
    leaves, structure = optree.tree_flatten(state)
    floats = [x for x in leaves if is_float(x)]

    def run(*numbers: torch.Tensor) -> torch.Tensor:
        tx = RULES[name].replace(**dict(zip(values, numbers, strict=False)))
        given = iter(numbers[len(values) :])
        state = structure.unflatten([next(given) if is_float(x) else x for x in leaves])
        new = params
        for k in range(STEPS):
            new, state = fo.apply_gradients(tx, new, gradients_of(k), state)
        return flat([*new.values(), *[x for x in optree.tree_leaves(state) if is_float(x)]])

    holds(run, [*hypers, *floats])


# schedules of numbers that may be tensors, before, at and past their corners; a count of steps has no derivative
SCHEDULES: dict[str, tuple[Callable[..., Any], tuple[float, ...]]] = {
    "constant": (fo.constant_schedule, (0.3,)),
    "linear": (lambda a, b: fo.linear_schedule(a, b, 3), (0.1, 0.4)),
    "polynomial": (lambda a, b, power: fo.polynomial_schedule(a, b, power, 7), (0.1, 0.4, 2.5)),
    "exponential": (lambda a, rate: fo.exponential_decay(a, 2, rate, transition_begin=1), (0.3, 0.7)),
    "cosine": (lambda a, alpha, x: fo.cosine_decay_schedule(a, 7, alpha, x), (0.3, 0.1, 1.5)),
    "piecewise": (lambda a: fo.piecewise_constant_schedule(a, {1: 0.5, 3: 0.2}), (0.3,)),
    "warmup and cosine": (lambda a, b, c: fo.warmup_cosine_decay_schedule(a, b, 2, 4, c), (0.1, 0.4, 0.05)),
    "warmup and exponential": (
        lambda a, b, rate: fo.warmup_exponential_decay_schedule(a, b, 2, 2, rate),
        (0.1, 0.4, 0.6),
    ),
    "sum and product": (lambda a, b: fo.linear_schedule(a, b, 3) * b, (0.1, 0.4)),
    "a function": (lambda a, rate: lambda count: a * rate**count, (0.3, 0.6)),
    "joined": (lambda a, b: fo.join_schedules([fo.constant_schedule(a), fo.linear_schedule(a, b, 3)], [2]), (0.1, 0.4)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_number_of_a_schedule_has_derivatives(name: str) -> None:
    make, values = SCHEDULES[name]
    params = drawn(1)

    def run(*numbers: torch.Tensor) -> torch.Tensor:
        schedule = make(*numbers)
        tx = fo.chain(fo.clip_by_global_norm(schedule), fo.adam(schedule, eps=0.1))
        state, new = tx.init(params), params
        for k in range(STEPS):
            new, state = fo.apply_gradients(tx, new, {k: g * new[k] for k, g in gradients_of(k).items()}, state)
        return flat([*new.values()])

    holds(run, [torch.tensor(x, dtype=F64) for x in values])
