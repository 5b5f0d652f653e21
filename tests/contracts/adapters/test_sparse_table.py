"""Sparse gradients: torch's own table of configurations and errors."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.testing._internal.common_optimizers import get_error_inputs_for_all_optims, optim_db

from _lib.compare import ulps
from _lib.optimizers import content, params_of
from _lib.sparse import F32, F64, ONE, UNITS, give_sparse, pair
from functional_optim.adapters import SparseAdam


pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant:UserWarning")  # torch's, of tensors that it makes


NAMES = ("SGD", "Adagrad", "SparseAdam")
INFOS = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in NAMES}


def inputs() -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Each configuration that takes sparse gradients, and those with schedulers."""
    for name, info in INFOS.items():
        assert info.supports_sparse or info.only_supports_sparse_grads
        for case in info.optim_inputs_func("cpu", F64):
            if not case.kwargs.get("weight_decay"):
                yield f"{name}, {case.desc}", {"name": name, **case.kwargs}, []
        kwargs, schedulers = info.metadata_for_sparse
        yield f"{name}, sparse", {"name": name, **kwargs}, schedulers


TABLE = {desc: (kwargs, schedulers) for desc, kwargs, schedulers in inputs()}


@pytest.mark.parametrize("case", TABLE)
def test_every_configuration_of_the_table(case: str) -> None:
    kwargs, makers = TABLE[case]
    if isinstance(kwargs.get("lr"), torch.Tensor):
        kwargs = {**kwargs, "lr": kwargs["lr"].double()}  # torch's arithmetic is that of the tensor
    ours, theirs = pair(layouts=ONE, **kwargs)
    schedulers = [make(opt) for make in makers for opt in (ours, theirs)]

    for step in range(8):
        give_sparse([ours, theirs], ONE, step)
        before = content(ours)["params"][0]
        for opt in (ours, theirs):
            opt.step()
        for scheduler in schedulers:
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(1.0) if plateau else scheduler.step()
        [p], [q] = params_of(ours), params_of(theirs)
        assert ulps(p, q, before, p - before).max() <= UNITS
        with torch.no_grad():
            q.copy_(p)
    assert [g["lr"] for g in ours.param_groups] == [g["lr"] for g in theirs.param_groups]


ERRORS = {
    case.optimizer_error_input.desc: case
    for case in (
        *get_error_inputs_for_all_optims("cpu", F32),
        *INFOS["SparseAdam"].optim_error_inputs_func("cpu", F32),
    )
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_sparse_adam_are_those_of_torch(case: str) -> None:
    error = ERRORS[case]
    params, kwargs = error.optimizer_error_input.params, error.optimizer_error_input.kwargs
    params = [torch.nn.Parameter(torch.randn(1))] if params is None else params
    expect = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    with expect(error.error_type, match=error.error_regex):
        SparseAdam(params, **kwargs)


MORE_ERRORS: tuple[dict[str, Any], ...] = (
    {"lr": 0.0},
    {"lr": torch.ones(2)},
    {"eps": 0.0},
    {"betas": (0.5, 1.0)},
    {"foreach": True},
)


@pytest.mark.parametrize("kwargs", MORE_ERRORS, ids=str)
def test_errors_that_the_table_lacks_are_those_of_torch(kwargs: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as theirs:
        torch.optim.SparseAdam([torch.nn.Parameter(torch.ones(1))], **kwargs)
    with pytest.raises(theirs.type, match=re.escape(str(theirs.value))):
        SparseAdam([torch.nn.Parameter(torch.ones(1))], **kwargs)
