"""`LBFGS`: the errors of torch, closures that raise, and files of other classes."""

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing._internal.common_optimizers import get_error_inputs_for_all_optims

from _lib.compare import assert_same_bits
from _lib.lbfgs import (
    F32,
    F64,
    INFO,
    Run,
    one,
    square,
)
from functional_optim.adapters import LBFGS


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_closure_that_raises_changes_nothing(at: int, line_search_fn: str | None) -> None:
    run = Run(LBFGS, "net", line_search_fn=line_search_fn, lr=0.1, max_iter=5)
    run.step()
    before = copy.deepcopy([run.content(), run.opt.state_dict()])
    calls = len(run.values)

    def closure() -> torch.Tensor:
        if len(run.values) == calls + at:
            raise KeyboardInterrupt
        return run.closure()

    with pytest.raises(KeyboardInterrupt):
        run.opt.step(closure)

    del run.values[calls:]
    assert_same_bits([run.content(), run.opt.state_dict()], before)


def errors() -> list[Any]:
    given = [*get_error_inputs_for_all_optims("cpu", F32), *INFO.optim_error_inputs_func("cpu", F32)]
    return list({case.optimizer_error_input.desc: case for case in given}.values())


@pytest.mark.parametrize("case", errors(), ids=lambda case: case.optimizer_error_input.desc)
def test_errors_are_those_of_torch(case: Any) -> None:
    given = case.optimizer_error_input
    params = [torch.nn.Parameter(torch.randn(1))] if given.params is None else given.params
    expect = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises

    with expect(case.error_type, match=case.error_regex):
        LBFGS(params, **given.kwargs)


def both(case: Callable[[Any], Any]) -> tuple[Any, Any]:
    found = []
    for cls in (torch.optim.LBFGS, LBFGS):
        with pytest.raises((ValueError, RuntimeError, TypeError)) as error:
            case(cls)
        found.append(error.value)
    return found[0], found[1]


SAME_ERRORS: dict[str, Callable[[Any], Any]] = {
    "several groups": lambda cls: cls([{"params": [one()]}, {"params": [one()]}]),
    "negative lr": lambda cls: cls([one()], lr=-1.0),
    "nan lr": lambda cls: cls([one()], lr=math.nan),
    "lr of two elements": lambda cls: cls([one()], lr=torch.ones(2)),
    "unknown argument": lambda cls: cls([one()], momentum=0.9),
}


@pytest.mark.parametrize("case", SAME_ERRORS)
def test_more_errors_are_those_of_torch(case: str) -> None:
    theirs, ours = both(SAME_ERRORS[case])

    assert type(ours) is type(theirs)
    assert str(theirs) in str(ours)


def test_a_second_group_is_refused() -> None:
    opt = LBFGS([one()])

    with pytest.raises(ValueError, match="LBFGS doesn't support per-parameter options"):
        opt.add_param_group({"params": [one()]})

    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("closure", [(), (None,), (torch.zeros(()),)])
def test_a_step_without_a_closure_is_refused(closure: Any) -> None:
    with pytest.raises(TypeError, match=r"call `step\(closure\)`"):
        LBFGS([one()]).step(*closure)


@pytest.mark.parametrize("loss", [None, torch.ones(2)], ids=str)
@pytest.mark.parametrize("at", [1, 2])
def test_a_closure_that_returns_no_loss_is_refused_and_nothing_changes(at: int, loss: Any) -> None:
    p = torch.nn.Parameter(torch.ones(2))
    opt, calls = LBFGS([p], lr=0.1), []

    def closure() -> Any:
        calls.append(1)
        p.grad = 2 * p.detach()
        return loss if len(calls) == at else (p * p).sum()

    with pytest.raises(TypeError, match=r"the closure of LBFGS returned .* expected the loss, one number"):
        opt.step(closure)
    assert torch.equal(p.detach(), torch.ones(2))
    assert not opt.state


def test_an_unknown_line_search_is_refused() -> None:
    p = one()
    with pytest.raises(RuntimeError, match=re.escape("only 'strong_wolfe' is supported, not 'armijo'")):
        LBFGS([p], line_search_fn="armijo").step(lambda: square(p))


def test_a_state_of_other_parameters_is_refused() -> None:
    run = Run(LBFGS, "net")
    run.step()
    opt = LBFGS([torch.nn.Parameter(torch.zeros(k, dtype=F64)) for k in (5, 4, 4, 3)])

    with pytest.raises(ValueError, match=r"has a vector of 31 elements, but the parameters have 16"):
        opt.load_state_dict(run.opt.state_dict())

    assert not opt.state


def foreign() -> dict[str, Any]:
    """A state dict of AdamW after a step."""
    p = one()
    p.grad = torch.ones_like(p)
    opt = torch.optim.AdamW([p])
    opt.step()
    return opt.state_dict()


FOREIGN: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "another class": (
        lambda own: foreign(),
        ValueError,
        r"param_groups\[0\] of the state dict lacks 'max_iter', .* it has 'lr', 'betas'.* another class than LBFGS",
    ),
    "states of another class": (
        lambda own: own | {"state": foreign()["state"]},
        ValueError,
        "the saved state of parameter 0 lacks 'func_evals', 'n_iter'; it has 'step', 'exp_avg'",
    ),
    "a state that is no dict": (lambda own: own | {"state": {0: 3}}, ValueError, "parameter 0 is 3, expected a dict"),
    "states on meta": (
        lambda own: own | {"state": {0: own["state"][0] | {"d": own["state"][0]["d"].to("meta")}}},
        ValueError,
        "the saved 'd' of parameter 0 is on meta, without elements",
    ),
    "no states": (lambda own: {"param_groups": own["param_groups"]}, KeyError, "lacks 'state'; it has 'param_groups'"),
    "no groups": (lambda own: {"state": {}}, KeyError, "lacks 'param_groups'"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_file_of_another_class_is_refused_before_anything_changes(case: str) -> None:
    make, error, words = FOREIGN[case]
    p = one()
    opt = LBFGS([p])

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = square(p)
        loss.backward()
        return loss

    opt.step(closure)
    before = copy.deepcopy(opt.state_dict())

    with pytest.raises(error, match=words):
        opt.load_state_dict(make(copy.deepcopy(before)))

    assert_same_bits(opt.state_dict(), before)
