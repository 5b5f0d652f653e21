"""Training that torch began and ours goes on with, and the other way round, by files."""

import io
from typing import Any

import pytest
import torch

from _lib.forms_of_torch import EXACT, FEW, LOOPS, ROUNDED
from _lib.optimizers import (
    NUMBERS,
    OURS,
    THEIRS,
    UNITS,
    assert_same,
    follow,
    options,
    pair,
    params_of,
    train,
    twins,
)


def reload(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state as a file keeps it."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def reborn(opt: torch.optim.Optimizer, cls: Any, state_dict: dict[str, Any], **kwargs: Any) -> torch.optim.Optimizer:
    """An optimizer of another class over copies of the parameters, with a state loaded."""
    new: torch.optim.Optimizer = cls(twins(params_of(opt)), **kwargs)
    new.load_state_dict(reload(state_dict))
    for state in new.state.values():
        for key in NUMBERS & state.keys():  # torch loads numbers other than `step` in the dtype of the parameter
            assert cls in THEIRS.values() or state[key].dtype is torch.float32
            state[key] = state[key].float()
    return new


@pytest.mark.parametrize("case", FEW)
def test_training_that_torch_began_goes_on_with_the_same_bits(case: str) -> None:
    name, kwargs = EXACT[case]
    _, theirs = pair(name, theirs=ROUNDED[name], **kwargs)
    train([theirs], range(10), missing=True)

    ours = reborn(theirs, OURS[name], theirs.state_dict(), lr=123.0)
    assert_same(ours, theirs)
    train([ours, theirs], range(10, 30), missing=True)

    assert_same(ours, theirs)
    assert options(ours) == options(theirs)


@pytest.mark.parametrize("case", FEW)
def test_training_that_ours_began_goes_on_in_torch_with_the_same_bits(case: str) -> None:
    name, kwargs = EXACT[case]
    ours, _ = pair(name, **{**kwargs, **ROUNDED[name]})
    train([ours], range(10), missing=True)

    theirs = reborn(ours, THEIRS[name], ours.state_dict(), lr=123.0)
    assert_same(ours, theirs)
    train([ours, theirs], range(10, 30), missing=True)

    assert_same(ours, theirs)
    assert options(ours) == options(theirs)


@pytest.mark.parametrize("case", LOOPS)
def test_training_goes_on_from_torch_and_back_within_units(case: str) -> None:
    name, kwargs = LOOPS[case]
    _, theirs = pair(name, **kwargs)
    train([theirs], range(5))  # RAdam takes its first adaptive step after these, or among them
    ours = reborn(theirs, OURS[name], theirs.state_dict())
    back = reborn(ours, THEIRS[name], ours.state_dict())
    assert_same(ours, theirs)
    assert_same(back, theirs)

    far = follow(ours, back, range(5, 15))

    assert max(far.values()) <= UNITS[name], far


OLD = {  # options that files of earlier versions of torch lack
    "SGD": ("foreach", "fused", "maximize", "differentiable", "nesterov"),
    "Adam": ("foreach", "fused", "maximize", "differentiable", "capturable", "amsgrad", "decoupled_weight_decay"),
    "AdamW": ("foreach", "fused", "maximize", "differentiable", "capturable", "amsgrad", "decoupled_weight_decay"),
    "RMSprop": ("foreach", "maximize", "differentiable", "capturable", "momentum", "centered"),
    "NAdam": ("foreach", "maximize", "differentiable", "capturable", "decoupled_weight_decay"),
    "RAdam": ("foreach", "maximize", "differentiable", "capturable", "decoupled_weight_decay"),
    "Adagrad": ("foreach", "maximize", "differentiable", "fused"),
    **dict.fromkeys(("Adamax", "Adadelta", "ASGD", "Rprop"), ("foreach", "maximize", "differentiable", "capturable")),
}


@pytest.mark.parametrize("name", OLD)
def test_files_of_older_versions_load(name: str) -> None:
    """Without the newer options, and with numbers that are Python's."""
    _, theirs = pair(name, lr=0.01)
    train([theirs], range(5))
    old = reload(theirs.state_dict())
    for group in old["param_groups"]:
        for key in OLD[name]:
            del group[key]
    for state in old["state"].values():
        state.update({key: float(state[key]) for key in NUMBERS & state.keys()})
        if name == "ASGD":  # a weight of 1 may be a whole number
            state["mu"] = torch.tensor(1)

    ours = reborn(theirs, OURS[name], old)
    theirs = reborn(theirs, THEIRS[name], old)

    assert_same(ours, theirs)
    assert options(ours) == options(theirs)
    far = follow(ours, theirs, range(5, 10))
    assert max(far.values()) <= UNITS[name], far
