"""Every optimizer against optax and, where conventions agree, against torch.optim."""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import optax
import optree
import pytest
import torch

import functional_optim as fo
import functional_optim._optimizers
from _lib.records import (
    ATOL,
    BACKENDS,
    RTOL,
    STEPS,
    double,
    gradients,
    normal,
    run_optax_params,
    run_params,
    stack,
    use,
)
from _lib.transforms import asgd, params_swa, rprop
from _lib.trees import Tree, clone


class Case(NamedTuple):
    """An optimizer and its counterpart.

    Args:
      id: its name, and what is special about this row.
      ours: the optimizer.
      theirs: that of optax, or a function that makes one of torch.optim from a list of parameters.
    """

    id: str
    ours: Any
    theirs: Any


MASK = {"layers": [True, (False,)], "scale": False}


def matrices(params: Tree) -> Tree:
    """A mask, as optax wants it and this package takes it."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


LEARNING_RATE = (fo.warmup_cosine_decay_schedule(0.0, 0.1, 5, 20), optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 20))
DECAY = (fo.linear_schedule(0.1, 0.0, 20), optax.linear_schedule(0.1, 0.0, 20))


def both(name: str, *args: Any, id: str = "", **kwargs: Any) -> Case:
    """A row with the same arguments on both sides; a pair of schedules gives each side its own."""

    def side(k: int) -> Any:
        def choose(x: Any) -> Any:
            return x if not isinstance(x, tuple) else x[0] if k == 0 else double(x[1])

        make = getattr((fo, optax)[k], name)
        return make(*map(choose, args), **{key: choose(x) for key, x in kwargs.items()})

    return Case(f"{name}-{id}" if id else name, side(0), side(1))


CASES = [
    both("sgd", 0.1),
    both("sgd", 0.1, 0.9, id="momentum"),
    both("sgd", 0.1, 0.9, True, id="nesterov"),
    both("sgd", LEARNING_RATE, 0.9, id="schedule"),
    both("adam", 1e-2),
    both("adam", 1e-2, 0.5, 0.75, 1e-3, 1e-4, id="arguments"),
    both("adam", 1e-2, nesterov=True, id="nesterov"),
    both("adam", LEARNING_RATE, id="schedule"),
    both("adamw", 1e-2),
    both("adamw", 1e-2, weight_decay=0.1, mask=MASK, id="mask"),
    both("adamw", 1e-2, 0.5, 0.75, 1e-3, 1e-4, None, 0.1, matrices, nesterov=True, id="arguments"),
    both("adamw", LEARNING_RATE, weight_decay=DECAY, id="schedules"),
    both("nadam", 1e-2),
    both("nadamw", 1e-2, weight_decay=0.1),
    both("amsgrad", 1e-2, b2=0.5),
    both("amsgrad", 1e-2, 0.5, 0.75, 1e-3, 1e-4, None, False, False, id="arguments"),
    both("rmsprop", 1e-2),
    both("rmsprop", 1e-2, centered=True, id="centered"),
    both("rmsprop", 1e-2, momentum=0.9, id="momentum"),
    both("rmsprop", 1e-2, centered=True, momentum=0.9, nesterov=True, initial_scale=0.5, id="centered_nesterov"),
    both("rmsprop", 1e-2, 0.5, 1e-3, eps_in_sqrt=False, bias_correction=True, id="arguments"),
    # the momentum comes after the learning rate, so that a schedule acts on what enters it
    both("rmsprop", LEARNING_RATE, momentum=0.9, id="schedule"),
    both("adamax", 1e-2),
    both("adamax", LEARNING_RATE, 0.5, 0.75, 1e-3, id="arguments"),
    both("adamaxw", 1e-2, weight_decay=0.1, mask=MASK),
    both("adamaxw", LEARNING_RATE, 0.5, 0.75, 1e-3, DECAY, id="schedules"),
    both("radam", 1e-2),
    both("radam", LEARNING_RATE, 0.5, 0.9, 1e-3, 1e-4, 6.0, nesterov=True, id="arguments"),
    both("adagrad", 0.1),
    both("adagrad", LEARNING_RATE, 0.0, 1e-3, id="arguments"),
    both("adadelta", 0.1),
    both("adadelta", LEARNING_RATE, 0.5, 1e-3, DECAY, MASK, id="arguments"),
    # optax returns the identity for no learning rate, and so climbs
    Case("adadelta-none", fo.adadelta(), optax.chain(optax.adadelta(None), optax.scale(-1.0))),
    Case("rprop", fo.rprop(0.1), optax.chain(rprop(0.1), optax.scale(-1.0))),
    Case(
        "rprop-arguments",
        fo.rprop(0.1, 0.3, 1.7, 0.05, 0.4),
        optax.chain(rprop(0.1, 0.3, 1.7, 0.05, 0.4), optax.scale(-1.0)),
    ),
    Case("asgd", fo.asgd(0.1, 0.5, 0.6, t0=6), optax.chain(asgd(0.1, 0.5, 0.6), params_swa(8, 1))),
    both("lion", 1e-3),
    both("lion", 1e-3, 0.5, 0.75, None, 0.1, MASK, id="arguments"),
    both("lion", LEARNING_RATE, weight_decay=DECAY, id="schedules"),
    both("lars", 0.1),
    both("lars", 0.1, 0.1, MASK, 0.01, 1e-3, matrices, 0.5, True, id="arguments"),
    both("lars", LEARNING_RATE, weight_decay=DECAY, id="schedules"),
    both("lamb", 1e-2),
    both("lamb", LEARNING_RATE, weight_decay=DECAY, id="schedules"),
    both("lamb", 1e-2, 0.5, 0.75, 1e-3, 1e-4, 0.1, MASK, id="arguments"),
    both("adabelief", 1e-2),
    both("adabelief", LEARNING_RATE, 0.5, 0.75, 1e-3, 1e-4, nesterov=True, id="arguments"),
    both("yogi", 1e-2),
    both("yogi", LEARNING_RATE, 0.5, 0.75, 1e-2, id="arguments"),
    # optax has 1 - b2 in the place of a b2; see `_lib.transforms.adan`
    both("adan", 1e-2, b2=0.5),
    both("adan", LEARNING_RATE, 0.5, 0.5, 0.7, 1e-2, 1e-3, DECAY, MASK, id="arguments"),
    both("novograd", 1e-2),
    both("novograd", LEARNING_RATE, 0.5, 0.75, 1e-2, 1e-3, 0.1, id="arguments"),
    both("optimistic_gradient_descent", LEARNING_RATE, 0.7, 0.3),
    both("optimistic_adam_v2", 1e-2),
    both("optimistic_adam_v2", LEARNING_RATE, alpha=0.7, beta=0.3, b1=0.5, eps=1e-3, nesterov=False, id="arguments"),
    both("fromage", 0.1),
    both("fromage", LEARNING_RATE, 0.1, id="arguments"),
    both("sign_sgd", 1e-2),
    both("signum", 1e-2),
    both("signum", LEARNING_RATE, 0.5, id="arguments"),
]

TORCH_CASES = [
    Case("sgd", fo.sgd(0.1), lambda ps: torch.optim.SGD(ps, 0.1)),
    Case("sgd-momentum", fo.sgd(0.1, 0.9), lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9)),
    Case("sgd-nesterov", fo.sgd(0.1, 0.9, True), lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, nesterov=True)),
    Case(
        "sgd-l2",
        fo.chain(fo.add_decayed_weights(0.1), fo.sgd(0.1, 0.9)),
        lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, weight_decay=0.1),
    ),
    Case("adam", fo.adam(1e-2), lambda ps: torch.optim.Adam(ps, 1e-2)),
    Case(
        "adam-l2",
        fo.chain(fo.add_decayed_weights(0.1), fo.adam(1e-2, 0.5, 0.75, 1e-3)),
        lambda ps: torch.optim.Adam(ps, 1e-2, (0.5, 0.75), 1e-3, weight_decay=0.1),
    ),
    Case("adamw", fo.adamw(1e-2, weight_decay=0.1), lambda ps: torch.optim.AdamW(ps, 1e-2, weight_decay=0.1)),
    Case("nadam", fo.nadam(1e-2, momentum_decay=4e-3), lambda ps: torch.optim.NAdam(ps, 1e-2)),
    Case(
        "nadamw",
        fo.nadamw(1e-2, 0.5, 0.75, 1e-3, weight_decay=0.1, momentum_decay=0.5),
        lambda ps: torch.optim.NAdam(ps, 1e-2, (0.5, 0.75), 1e-3, 0.1, 0.5, decoupled_weight_decay=True),
    ),
    # with an eps, torch has it beside a second moment that is not corrected
    Case("radam", fo.radam(1e-2, eps=0.0), lambda ps: torch.optim.RAdam(ps, 1e-2, eps=0.0)),
    Case("adamax", fo.adamax(1e-2), lambda ps: torch.optim.Adamax(ps, 1e-2)),
    Case(
        "adagrad",
        fo.adagrad(0.1, 0.0, 1e-10, eps_in_sqrt=False),
        lambda ps: torch.optim.Adagrad(ps, 0.1),
    ),
    Case("adadelta", fo.adadelta(weight_decay=0.1), lambda ps: torch.optim.Adadelta(ps, weight_decay=0.1)),
    Case("rprop", fo.rprop(0.1), lambda ps: torch.optim.Rprop(ps, 0.1)),
    Case("asgd", fo.asgd(0.1, 0.5), lambda ps: torch.optim.ASGD(ps, 0.1, 0.5)),
    Case(
        "rmsprop",
        fo.rmsprop(1e-2, 0.9, eps_in_sqrt=False),
        lambda ps: torch.optim.RMSprop(ps, 1e-2, alpha=0.9),
    ),
    Case(
        "rmsprop-centered",
        fo.rmsprop(1e-2, 0.9, eps_in_sqrt=False, centered=True),
        lambda ps: torch.optim.RMSprop(ps, 1e-2, alpha=0.9, centered=True),
    ),
]


QUICK = ("reference", "foreach", "c")
# Of every name the last row, which has the most in it; Triton's interpreter is slow, so it shows two of them: one of
# a single pass, one of two passes with groups of leaves.
LAST = {case.id.partition("-")[0]: row for row, case in enumerate(CASES)}
fusions = pytest.mark.parametrize(
    ("row", "backend"),
    [
        pytest.param(row, backend, id=f"{CASES[row].id}-{backend}")
        for name, row in LAST.items()
        for backend in (BACKENDS if name in ("adamw", "lamb") else QUICK)
    ],
)


def named(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("row", range(len(cases)), ids=[case.id for case in cases])


@functools.cache
def our_params(row: int, backend: str) -> Tree:
    return run_params(CASES[row].ours, backend)


@functools.cache
def optax_params(row: int) -> Tree:
    return run_optax_params(CASES[row].theirs)


@pytest.fixture
def double_numbers() -> Iterator[None]:
    """torch keeps the products and rates of NAdam and ASGD in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@functools.cache
def torch_params(row: int) -> Tree:
    params, records = normal(1000), []
    leaves, structure = optree.tree_flatten(params)
    optimizer = TORCH_CASES[row].theirs(leaves)
    for step in range(STEPS):
        for p, g in zip(leaves, optree.tree_leaves(gradients("normal", step)), strict=True):
            p.grad = g
        optimizer.step()
        records.append(clone(structure.unflatten(leaves)))
    return stack(records)


def unfused(tx: Any, backend: str) -> Tree:
    """Records parameters that `update` and `apply_updates` lead to."""
    params, records = normal(1000), []
    state = tx.init(params)
    for step in range(STEPS):
        with use(backend, step):
            updates, state = tx.update(gradients("normal", step), state, params)
        params = fo.apply_updates(params, updates)
        records.append(params)
    return stack(records)


@pytest.mark.parametrize("backend", BACKENDS)
@named(CASES)
def test_parameters_are_those_of_optax(row: int, backend: str) -> None:
    torch.testing.assert_close(our_params(row, backend), optax_params(row), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.usefixtures("double_numbers")
@named(TORCH_CASES)
def test_parameters_are_those_of_torch(row: int, backend: str) -> None:
    actual = run_params(TORCH_CASES[row].ours, backend)
    torch.testing.assert_close(actual, torch_params(row), rtol=RTOL, atol=ATOL)


OTHERS = {"muon", "adafactor", "lbfgs", "polyak_sgd"}  # test_matrix_methods.py, test_lbfgs.py, test_extra_arguments.py


def test_every_optimizer_has_a_row() -> None:
    package = functional_optim._optimizers
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    own = {
        name
        for m in modules
        for name, x in vars(m).items()
        if callable(x) and getattr(inspect.unwrap(x), "__globals__", None) is vars(m)
    }
    public = {name for name in own if not name.startswith("_")}
    assert {case.id.partition("-")[0] for case in CASES} == public - OTHERS


# In float64 a value is not rounded when it leaves a kernel, so that one pass does what two do, bit for bit.


@fusions
def test_donating_changes_no_bit(row: int, backend: str) -> None:
    actual = run_params(CASES[row].ours, backend, donate=True)
    torch.testing.assert_close(actual, our_params(row, backend), rtol=0, atol=0)


@fusions
def test_one_pass_is_update_and_apply_updates(row: int, backend: str) -> None:
    actual = our_params(row, backend)
    torch.testing.assert_close(actual, unfused(CASES[row].ours, backend), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_donating_reuses_the_memory_of_parameters_and_state(backend: str) -> None:
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-2), fo.params_ema(0.9))
    params = normal(0)
    state = tx.init(params)
    tensors = [x for x in optree.tree_leaves((params, state)) if isinstance(x, torch.Tensor)]
    places = [x.data_ptr() for x in tensors]
    before = clone(params)
    with use(backend):
        new = fo.apply_gradients(tx, params, normal(1), state, donate=True)
    assert [x.data_ptr() for x in optree.tree_leaves(new)] == places
    assert all(x is y for x, y in zip(optree.tree_leaves(new), tensors, strict=True))
    assert not any(
        torch.equal(x, y) for x, y in zip(optree.tree_leaves(before), optree.tree_leaves(params), strict=True)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_donating_nothing_is_written(backend: str) -> None:
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-2), fo.params_ema(0.9))
    arguments = (normal(0), normal(1), tx.init(normal(0)))
    before = optree.tree_map(torch.clone, arguments)
    with use(backend):
        fo.apply_gradients(tx, *arguments)
        tx.update(arguments[1], arguments[2], arguments[0])
    torch.testing.assert_close(arguments, before, rtol=0, atol=0)
