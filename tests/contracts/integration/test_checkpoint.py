"""`torch.distributed.checkpoint`: state by the names of parameters, nested, flattened and whole; files on disk."""

import copy
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dsd

import functional_optim as fo
from _lib.chains import is_matrix
from _lib.compare import EXACT
from _lib.training import fit, grouped, make_batches, make_model, values
from functional_optim import adapters


pytestmark = [
    # without a process group it says that it goes on alone
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    # its own reader and planner use what torch has deprecated
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]
OPTIONS = {
    "nested": dsd.StateDictOptions(),
    "flattened": dsd.StateDictOptions(flatten_optimizer_state_dict=True),
    "full": dsd.StateDictOptions(full_state_dict=True),  # flattened too, the library itself fails to read it back
}
LAYOUT = pytest.mark.parametrize("layout", OPTIONS)
Make = Callable[[torch.nn.Module], Any]


def with_chain(tx: fo.GradientTransformation) -> Make:
    return lambda model: adapters.TransformOptimizer(model.parameters(), tx)


OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda m: adapters.SGD(m.parameters(), lr=0.1),
    "SGD with momentum": lambda m: adapters.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "AdamW in groups": lambda m: adapters.AdamW(grouped(m, lr=0.02), lr=0.05),
    "AdamW with a tensor lr": lambda m: adapters.AdamW(m.parameters(), lr=torch.tensor(0.05, dtype=torch.float64)),
    "AdamW with names": lambda m: adapters.AdamW(m.named_parameters(), lr=0.05),
    "RMSprop": lambda m: adapters.RMSprop(m.parameters(), lr=0.05, momentum=0.9, centered=True),
    "NAdam": lambda m: adapters.NAdam(m.parameters(), lr=0.05),
    "Adagrad": lambda m: adapters.Adagrad(m.parameters(), lr=0.05),
    "ASGD": lambda m: adapters.ASGD(m.parameters(), lr=0.05, lambd=0.1, t0=2),
    "Rprop": lambda m: adapters.Rprop(m.parameters(), lr=0.05),
    "ASGD in groups": lambda m: adapters.ASGD(grouped(m, lr=0.02), lr=0.05, lambd=0.1, t0=2),
    "Rprop in groups": lambda m: adapters.Rprop(grouped(m, lr=0.02), lr=0.05),
    "Lion": lambda m: adapters.Lion(m.parameters(), lr=0.01),
    "LAMB": lambda m: adapters.LAMB(m.parameters(), lr=0.01),
    "chain": with_chain(fo.adamw(0.05)),
    "rprop": with_chain(fo.rprop(0.05)),
    "rprop in groups": lambda m: adapters.TransformOptimizer(
        [{"params": g["params"], "lr": g.get("lr", 0.05)} for g in grouped(m, lr=0.02)], fo.rprop(0.05)
    ),
    "clip and average": with_chain(fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.05), fo.params_ema(0.9))),
    "schedule": with_chain(fo.chain(fo.adamw(fo.linear_schedule(0.1, 0.0, 10)), fo.params_ema(0.9))),
    "slots of some": with_chain(fo.partition({True: fo.adamw(0.05), False: fo.sgd(0.1, momentum=0.9)}, is_matrix)),
    "no slots for some": with_chain(fo.partition({True: fo.adamw(0.05), False: fo.set_to_zero()}, is_matrix)),
}
NAME = pytest.mark.parametrize("name", OPTIMIZERS)
# Reading the state of an optimizer that has none makes the library take a step of zero gradients and zero learning
# rate, which counts in torch's own classes, and which ASGD and Rprop of torch take their learning rates from.
FRESH = ["SGD", "SGD with momentum", "Lion", "NAdam", "Adagrad", "ASGD", "Rprop", "rprop"]
FRESH += [f"{name} in groups" for name in ("AdamW", "ASGD", "Rprop", "rprop")]


def train(name: str, batches: Sequence[Any]) -> tuple[torch.nn.Module, Any]:
    model = make_model()
    optimizer = OPTIMIZERS[name](model)
    fit(model, optimizer, batches)
    return model, optimizer


def copy_of(model: torch.nn.Module) -> torch.nn.Module:
    other = make_model(seed=5)
    other.load_state_dict(model.state_dict())
    return other


@LAYOUT
@NAME
def test_resume_from_memory(name: str, layout: str) -> None:
    if (name, layout) == ("SGD", "full"):
        pytest.skip("the library needs a tensor to find the device by, and torch.optim.SGD has none either")
    batches = make_batches(6)
    expected, _ = train(name, batches)
    model, optimizer = train(name, batches[:3])
    saved = values(dsd.get_optimizer_state_dict(model, optimizer, options=OPTIONS[layout]))
    resumed = copy_of(model)  # without gradients: with them the library takes the optimizer for one that has a state
    fit(model, optimizer, batches[3:])  # the saved state does not follow

    resumed_optimizer = OPTIMIZERS[name](resumed)
    dsd.set_optimizer_state_dict(resumed, resumed_optimizer, saved, options=OPTIONS[layout])
    fit(resumed, resumed_optimizer, batches[3:])
    torch.testing.assert_close(list(resumed.parameters()), list(expected.parameters()), **EXACT)


@LAYOUT
@NAME
def test_reading_a_fresh_optimizer_leaves_parameters_alone(name: str, layout: str) -> None:
    model = make_model()
    optimizer = OPTIMIZERS[name](model)
    lrs = [values(g["lr"]) for g in optimizer.param_groups]
    dsd.get_optimizer_state_dict(model, optimizer, options=OPTIONS[layout])
    torch.testing.assert_close(values(list(model.parameters())), values(list(make_model().parameters())), **EXACT)
    assert [g["lr"] for g in optimizer.param_groups] == lrs
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", FRESH)
def test_training_after_a_fresh_optimizer_was_read(name: str) -> None:
    """Nothing of the step of zeros is left."""
    batches = make_batches(3)
    expected, _ = train(name, batches)
    model = make_model()
    optimizer = OPTIMIZERS[name](model)
    dsd.get_optimizer_state_dict(model, optimizer)
    fit(model, optimizer, batches)
    torch.testing.assert_close(list(model.parameters()), list(expected.parameters()), **EXACT)


def check_read_and_unread(name: str, run: Callable[[torch.nn.Module, Any], None]) -> None:
    """Compares parameters after the steps of a fresh optimizer, and of one that checkpoint code has read before."""
    results = []
    for reads in (False, True):
        model = make_model()
        optimizer = OPTIMIZERS[name](model)
        if reads:
            dsd.get_optimizer_state_dict(model, optimizer)
        run(model, optimizer)
        results.append(list(model.parameters()))
    torch.testing.assert_close(*results, **EXACT)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler
@pytest.mark.parametrize("name", ["Rprop in groups", "rprop in groups"])
def test_compiled_steps_after_a_fresh_optimizer_was_read(name: str) -> None:
    def run(model: torch.nn.Module, optimizer: Any) -> None:
        step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
        for sign in (1.0, 1.0, -1.0):
            for p in model.parameters():
                p.grad = torch.full_like(p, sign)
            step()

    check_read_and_unread(name, run)


@pytest.mark.parametrize("name", FRESH)
def test_steps_without_some_gradients_after_a_fresh_optimizer_was_read(name: str) -> None:
    """Parameters may take their first steps in any order."""

    def run(model: torch.nn.Module, optimizer: Any) -> None:
        for step in range(6):
            for k, p in enumerate(model.parameters()):
                p.grad = torch.full_like(p, 0.5) if step > 3 or (k + step) % 3 == 0 else None
            optimizer.step()

    check_read_and_unread(name, run)


def pickled(model: torch.nn.Module, optimizer: Any, name: str) -> tuple[torch.nn.Module, Any]:
    other: tuple[torch.nn.Module, Any] = pickle.loads(pickle.dumps((model, optimizer)))
    return other


def loaded(model: torch.nn.Module, optimizer: Any, name: str) -> tuple[torch.nn.Module, Any]:
    other = copy_of(model)
    new = OPTIMIZERS[name](other)
    dsd.set_optimizer_state_dict(other, new, values(dsd.get_optimizer_state_dict(model, optimizer)))
    return other, new


@pytest.mark.parametrize("carry", [lambda model, optimizer, name: copy.deepcopy((model, optimizer)), pickled, loaded])
# a chain that counts no steps cannot know the group's rate from a file: it has that of the constructor
@pytest.mark.parametrize("name", [name for name in FRESH if name != "rprop in groups"])
def test_training_of_a_copy_after_a_fresh_optimizer_was_read(name: str, carry: Callable[..., Any]) -> None:
    batches = make_batches(3)
    expected, _ = train(name, batches)
    model = make_model()
    optimizer = OPTIMIZERS[name](model)
    dsd.get_optimizer_state_dict(model, optimizer)

    model, optimizer = carry(model, optimizer, name)
    fit(model, optimizer, batches)

    torch.testing.assert_close(list(model.parameters()), list(expected.parameters()), **EXACT)


def test_layouts_are_those_of_torch() -> None:
    """Names and shapes of what is saved equal those of torch's class, so that files go both ways."""
    batches = make_batches(2)

    def saved(cls: Any) -> dict[str, Any]:
        model = make_model()
        optimizer = cls(grouped(model), lr=0.05)
        fit(model, optimizer, batches)
        return dsd.get_optimizer_state_dict(model, optimizer, options=OPTIONS["flattened"])

    actual, expected = saved(adapters.AdamW), saved(torch.optim.AdamW)
    assert {k: getattr(v, "shape", None) for k, v in actual.items()} == {
        k: getattr(v, "shape", None) for k, v in expected.items()
    }


@pytest.mark.parametrize("layout", ["nested", "flattened"])
@pytest.mark.parametrize("name", ["AdamW in groups", "clip and average", "schedule"])
def test_resume_from_files(name: str, layout: str, tmp_path: Path) -> None:
    batches = make_batches(6)
    expected, _ = train(name, batches)
    options = OPTIONS[layout]
    model, optimizer = train(name, batches[:3])
    weights, state = dsd.get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)

    resumed = make_model(seed=5)
    resumed_optimizer = OPTIMIZERS[name](resumed)
    weights, state = dsd.get_state_dict(resumed, resumed_optimizer, options=options)  # trees to load into
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    dsd.set_state_dict(resumed, resumed_optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
    fit(resumed, resumed_optimizer, batches[3:])
    torch.testing.assert_close(list(resumed.parameters()), list(expected.parameters()), **EXACT)


def test_averages_come_back() -> None:
    batches = make_batches(3)
    model, optimizer = train("clip and average", batches)
    saved = values(dsd.get_optimizer_state_dict(model, optimizer))
    resumed = copy_of(model)
    resumed_optimizer = OPTIMIZERS["clip and average"](resumed)
    dsd.set_optimizer_state_dict(resumed, resumed_optimizer, saved)
    with optimizer.averaged_params(), resumed_optimizer.averaged_params():
        torch.testing.assert_close(list(resumed.parameters()), list(model.parameters()), **EXACT)
