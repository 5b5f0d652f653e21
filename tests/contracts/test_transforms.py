"""Every transformation against optax: updates and states at every step, on every backend."""

import functools
import importlib
import inspect
import pkgutil
from typing import Any

import pytest
import torch

import functional_optim as fo
import functional_optim._transforms
from _lib.records import ATOL, BACKENDS, RTOL, STEPS, parameters, run_optax_updates, run_updates
from _lib.transforms import CASES, IDS, Case


# no formulas of an element, or of an extra argument too; tested elsewhere
OTHERS = {
    "eval_params",
    "reduce_on_plateau",
    "scale_by_polyak",
    "update_average",
    "stateless",
    "stateless_with_tree_map",
}
SECOND_ORDER = {name for name in vars(fo) if "linesearch" in name} | {"scale_by_lbfgs", "value_and_grad_from_state"}
MATRIX_METHODS = {"orthogonalize", "scale_by_shape", "scale_by_muon", "scale_by_factored_rms"}  # test_matrix_methods.py


@functools.cache
def expected(row: int) -> Any:
    """Results of optax. It keeps a counter only where a formula of its own reads it."""
    case = CASES[row]
    record = run_optax_updates(case.theirs, case.gradients)
    if "count" in fields_of(case):
        record["state"].setdefault("count", torch.arange(1, STEPS + 1))
    return record


def fields_of(case: Case) -> tuple[str, ...]:
    state = case.ours.init(parameters(0))
    return getattr(state, "inner_state", state)._fields


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", range(len(CASES)), ids=IDS)
def test_updates_and_states_are_those_of_optax(row: int, backend: str) -> None:
    actual = run_updates(CASES[row].ours, CASES[row].gradients, backend)
    torch.testing.assert_close(actual, expected(row), rtol=RTOL, atol=ATOL, equal_nan=True)


def test_every_transformation_has_a_row() -> None:
    package = functional_optim._transforms
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    public = {
        name
        for module in modules
        for name, x in vars(module).items()
        if getattr(inspect.unwrap(x), "__globals__", None) is vars(module) and hasattr(fo, name)
    }
    assert {case.id.partition("-")[0] for case in CASES} == public - OTHERS - MATRIX_METHODS - SECOND_ORDER


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backend_asked_for_is_the_one_that_computes(backend: str) -> None:
    with fo.use_backend(backend):
        explanation = fo.explain(fo.scale_by_adam(), parameters(0))
    assert explanation.backends == (backend,)
