"""Promises of examples/zoo.py: ten optimizers that were written as rules equal loops in plain torch."""

import io
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.scripts import load_script
from functional_optim.adapters import TransformOptimizer


zoo = load_script("examples/zoo.py")
STEPS = 20
# Parameters and updates stay below 4, and a formula has fewer than 50 operations, each of which rounds on both sides;
# an error of an update counts LR times, and gradients shrink those of earlier steps. Newton-Schulz iterations multiply
# an error by no more than 3.4445^5 < 500, of numbers below 1/LR.
TOLERANCE = STEPS * 50 * 2 * 4 * 2.0**-53

each = pytest.mark.parametrize("entry", zoo.OPTIMIZERS, ids=[entry.name for entry in zoo.OPTIMIZERS])


def optimizer_of(entry: Any, params: dict[str, torch.Tensor]) -> tuple[dict[str, torch.nn.Parameter], Any]:
    copies = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    return copies, TransformOptimizer(list(copies.items()), entry.tx)


def step(entry: Any, params: dict[str, torch.nn.Parameter], opt: Any, t: int) -> None:
    for name, g in zoo.grads_at({name: p.detach() for name, p in params.items()}, t).items():
        params[name].grad = g
    opt.step(**entry.extra(t))


@each
def test_a_rule_equals_its_loop(entry: Any) -> None:
    params, _ = zoo.run(entry, STEPS)
    expected, _ = zoo.run_plain(entry, STEPS)

    assert zoo.difference(params, zoo.normal(0)) > 0.01  # it has moved
    assert zoo.difference(params, expected) <= TOLERANCE


@each
def test_an_optimizer_of_the_chain_equals_its_loop(entry: Any) -> None:
    params, opt = optimizer_of(entry, zoo.normal(0))
    for t in range(1, STEPS + 1):
        step(entry, params, opt, t)
    expected, _ = zoo.run_plain(entry, STEPS)

    assert zoo.difference(params, expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("StableAdamW", {"b1", "b2", "eps", "lr", "weight_decay"}),
        ("AdEMAMix", {"b1", "b2", "eps", "lr", "weight_decay"}),  # the others are schedules
        ("Cautious AdamW", {"b1", "b2", "eps", "floor", "lr", "weight_decay"}),
        ("Prodigy", {"b1", "b2", "d0", "eps", "lr", "weight_decay"}),
        ("Sophia", {"b1", "b2", "eps", "every", "lr", "rho", "weight_decay"}),
        ("Muon + AdamW", {"b1", "b2", "decay", "iterations", "lr", "orthogonal_eps", "weight_decay"}),
        ("Shampoo", {"eps", "lr", "weight_decay"}),
    ],
)
def test_hyper_parameters_are_options_of_groups(name: str, options: set[str]) -> None:
    (entry,) = [entry for entry in zoo.OPTIMIZERS if entry.name == name]
    _, opt = optimizer_of(entry, zoo.normal(0))

    assert options <= opt.param_groups[0].keys()


def test_schedule_free_stays_where_it_is_while_rates_are_zero() -> None:
    tx = zoo.schedule_free_adamw(learning_rate=0.0)
    params = zoo.normal(0)
    after, _ = fo.apply_gradients(tx, params, zoo.grads_at(params, 1), tx.init(params))

    # 0.1 z + 0.9 x, where both are the parameter
    assert zoo.difference(after, params) <= 3 * 4 * 2.0**-53


@each
def test_a_checkpoint_goes_on_with_the_same_bits(entry: Any) -> None:
    params, opt = optimizer_of(entry, zoo.normal(0))
    for t in range(1, 6):
        step(entry, params, opt, t)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    resumed, other = optimizer_of(entry, {name: p.detach() for name, p in params.items()})
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for t in range(6, 11):
        step(entry, params, opt, t)
        step(entry, resumed, other, t)

    assert all(torch.equal(resumed[name], p) for name, p in params.items())


def test_schedule_free_parameters_to_evaluate_at() -> None:
    (entry,) = [entry for entry in zoo.OPTIMIZERS if entry.name == "Schedule-free AdamW"]
    params, state = zoo.run(entry, STEPS)
    _, memory = zoo.run_plain(entry, STEPS)

    evaluated = fo.eval_params(state, params)
    assert zoo.difference(evaluated, {name: m["x"] for name, m in memory.items()}) <= TOLERANCE


@pytest.mark.slow
def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    zoo.main()

    header, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("optimizer")
    assert [row[:20].strip() for row in rows] == [entry.name for entry in zoo.OPTIMIZERS]
    assert all(5 <= entry.lines <= 17 for entry in zoo.OPTIMIZERS)  # as README.md says
