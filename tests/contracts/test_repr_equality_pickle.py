"""Transformations and their states are values: printed, compared, hashed, copied, pickled and kept in files."""

import copy
import io
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import functional_optim as fo
from _lib import chains
from _lib.chains import Halve, halving, is_matrix, remember_first, scale_by_value
from _lib.compare import Snapshot, assert_same_bits
from _lib.training import train
from _lib.trees import leaves, like, make_tree


def values() -> dict[str, Any]:
    """Transformations of every kind, made anew: none has been hashed, compared or used."""
    return {
        "rule": fo.scale_by_adam(b1=0.95, mu_dtype=torch.bfloat16, nesterov=True),
        "rule without arguments": fo.zero_nans(),
        "private rule": fo.add_decayed_weights(0.1),
        "chain": fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-3, weight_decay=0.1), fo.params_ema(0.99)),
        "empty chain": fo.identity(),
        "named_chain": fo.named_chain(("momentum", fo.trace(0.9, nesterov=True)), ("lr", fo.scale(-0.1))),
        "masked by a tree": fo.masked(fo.scale(2.0), {"weight": True, "bias": False, "scale": True}),
        "masked by an expression": fo.masked(
            fo.chain(fo.trace(0.9), fo.scale(1.5)), re.compile("weight", re.IGNORECASE)
        ),
        "masked by a function": fo.masked(fo.scale(2.0), is_matrix),
        "partition": fo.partition(
            {"a": fo.sgd(0.1, 0.9), "b": fo.set_to_zero()}, {re.compile("bias"): "b", re.compile(""): "a"}
        ),
        "partition by a tree": fo.partition({0: fo.lion(1e-4), 1: fo.adam(1e-3)}, {"weight": 0, "bias": 1, "scale": 1}),
        "partition by a function": fo.partition({True: fo.adam(0.1), False: fo.sgd(0.1)}, is_matrix),
        "decay by a mask": fo.adamw(1e-3, mask=is_matrix),
        "schedule": fo.chain(
            fo.scale_by_adam(b1=fo.linear_schedule(0.9, 0.99, 10)),
            fo.scale_by_schedule(fo.cosine_decay_schedule(1e-3, 100)),
        ),
        "nested schedules": fo.sgd(
            fo.join_schedules([fo.constant_schedule(0.1), fo.exponential_decay(1.0, 10, 0.5)], [5])
        ),
        "schedule with a mapping": fo.sgd(fo.piecewise_constant_schedule(1.0, {5: 0.5, 10: 0.1})),
        "schedule of a user": fo.sgd(halving),
        "rule of a user": fo.chain(remember_first(rate=0.25), fo.masked(scale_by_value(factor=-1.0), True)),
        "infinity": fo.clip(float("inf")),
        "functions that are known by a call": fo.lbfgs(memory_size=5, linesearch=None),
        "integers stay integers": fo.scale(2),
    }


VALUES = values()
NAMESPACE = {**vars(fo), **vars(chains), "re": re, "torch": torch, "inf": float("inf")}


@pytest.mark.parametrize("name", VALUES)
def test_the_repr_is_the_call_that_makes_it(name: str) -> None:
    tx = VALUES[name]

    again = eval(repr(tx), NAMESPACE)

    assert again == tx
    assert hash(again) == hash(tx)
    assert repr(again) == repr(tx)


REPRS = {
    "scale_by_adam(b1=0.95)": fo.scale_by_adam(0.95),
    "chain(trace(decay=0.9), scale(step_size=-0.1))": fo.chain(fo.trace(0.9), fo.scale(-0.1)),
    "chain()": fo.identity(),
    "scale_by_zoom_linesearch(max_linesearch_steps=9, max_learning_rate=0.5)": fo.scale_by_zoom_linesearch(9, 0.5),
    "named_chain(('a', scale(step_size=1.0)))": fo.named_chain(("a", fo.scale(1.0))),
    "masked(scale(step_size=2.0), re.compile('weight'))": fo.masked(fo.scale(2.0), "weight"),
    "masked(scale(step_size=2.0), {'a': True})": fo.masked(fo.scale(2.0), {"a": True}),
    "masked(scale(step_size=2.0), is_matrix)": fo.masked(fo.scale(2.0), is_matrix),
    "partition({'a': scale(step_size=2.0)}, 'a')": fo.multi_transform({"a": fo.scale(2.0)}, "a"),
    "add_decayed_weights(weight_decay=0.1)": fo.add_decayed_weights(0.1),
    "scale_by_learning_rate()": fo.scale_by_learning_rate(),
    "scale(step_size=halving)": fo.scale(halving),
}


@pytest.mark.parametrize("text", REPRS)
def test_reprs(text: str) -> None:
    assert repr(REPRS[text]) == text


def test_the_repr_of_an_opaque_transformation_names_its_functions() -> None:
    assert re.search(r"chain\(GradientTransformation\(.*Halve\.init.*Halve\.update", repr(fo.chain(Halve())))


@pytest.mark.parametrize("name", VALUES)
def test_different_transformations_differ(name: str) -> None:
    assert [k for k, tx in VALUES.items() if tx == VALUES[name]] == [name]


class Pair(NamedTuple):
    """Two transformations, and whether they are equal."""

    a: Any
    b: Any
    equal: bool


TENSOR, OTHER = torch.tensor(0.1), torch.tensor(0.1)
PAIRS: dict[str, Pair] = {
    "same call": Pair(fo.adam(1e-3), fo.adam(1e-3), True),
    "default spelled out": Pair(fo.scale_by_adam(), fo.scale_by_adam(b1=0.9), True),
    "another number": Pair(fo.adam(1e-3), fo.adam(2e-3), False),
    "an int and a float": Pair(fo.scale(1), fo.scale(1.0), False),
    "a switch and a number": Pair(
        fo.scale_by_learning_rate(1.0), fo.scale_by_learning_rate(1.0, flip_sign=False), False
    ),
    "a dtype": Pair(fo.trace(0.9), fo.trace(0.9, accumulator_dtype=torch.float32), False),
    "the same tensor": Pair(fo.scale(TENSOR), fo.scale(TENSOR), True),
    "tensors alike": Pair(fo.scale(TENSOR), fo.scale(OTHER), False),
    "equal schedules": Pair(fo.sgd(fo.linear_schedule(1.0, 0.0, 9)), fo.sgd(fo.linear_schedule(1.0, 0.0, 9)), True),
    "other schedules": Pair(fo.sgd(fo.linear_schedule(1.0, 0.0, 9)), fo.sgd(fo.linear_schedule(1.0, 0.0, 8)), False),
    "the same function": Pair(fo.scale(halving), fo.scale(halving), True),
    "a member and its chain": Pair(fo.scale(1.0), fo.chain(fo.scale(1.0)), False),
    "chains nested otherwise": Pair(fo.chain(fo.chain(fo.scale(1.0))), fo.chain(fo.scale(1.0)), False),
    "names": Pair(fo.named_chain(("a", fo.scale(1.0))), fo.named_chain(("b", fo.scale(1.0))), False),
    "masks": Pair(fo.masked(fo.scale(1.0), "a"), fo.masked(fo.scale(1.0), "b"), False),
    "mask trees": Pair(fo.masked(fo.scale(1.0), [True, False]), fo.masked(fo.scale(1.0), [True, False]), True),
    "masks of tensors": Pair(
        fo.masked(fo.scale(1.0), [torch.tensor(True)]), fo.masked(fo.scale(1.0), [torch.tensor(True)]), True
    ),
    "masks of kinds that do not compare": Pair(
        fo.masked(fo.scale(1.0), [True]), fo.masked(fo.scale(1.0), torch.ones(2)), False
    ),
    "labels": Pair(fo.partition({"a": fo.scale(1.0)}, "a"), fo.partition({"a": fo.scale(1.0)}, ["a"]), False),
    "order of the labels": Pair(
        fo.partition({"a": fo.scale(1.0), "b": fo.scale(2.0)}, "a"),
        fo.partition({"b": fo.scale(2.0), "a": fo.scale(1.0)}, "a"),
        True,
    ),
    "an object of another kind": Pair(fo.scale(1.0), "scale(step_size=1.0)", False),
}


@pytest.mark.parametrize("name", PAIRS)
def test_equality_and_hashes(name: str) -> None:
    a, b, equal = PAIRS[name]

    assert (a == b, b == a, a != b) == (equal, equal, not equal)
    assert not equal or (hash(a) == hash(b) and len({a, b}) == 1)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle {k}": lambda x, k=k: pickle.loads(pickle.dumps(x, k)) for k in (2, pickle.HIGHEST_PROTOCOL)},
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", VALUES)
def test_copies_of_transformations(name: str, how: str) -> None:
    tx = values()[name]

    again = COPIES[how](tx)

    assert again == tx
    assert hash(again) == hash(tx)
    assert repr(again) == repr(tx)


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_transformations_that_have_been_used(how: str) -> None:
    """A copy works, with all that the transformation remembers of its use."""
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-2, mask=is_matrix), fo.params_ema(0.9))
    params = make_tree(0)
    grads = [like(params, seed) for seed in range(3)]
    expected = train(tx, params, grads)

    actual = train(COPIES[how](tx), params, grads)

    assert_same_bits(actual, expected)


@pytest.fixture
def python(tmp_path: Path) -> Iterator[Callable[[str, dict[str, Any]], str]]:
    """A function that runs code in a new process, with values handed over by pickle, and returns what it prints."""

    def run(code: str, values: dict[str, bytes]) -> str:
        for name, content in values.items():
            (tmp_path / name).write_bytes(content)
        tests = Path(__file__).parents[1]
        paths = [str(tests), str(tests.parent)]
        head = f"import sys; sys.path[:0] = {paths!r}\n"
        done = subprocess.run(
            [sys.executable, "-c", head + code, str(tmp_path)], capture_output=True, text=True, timeout=120
        )
        assert not done.returncode, done.stderr
        return done.stdout

    return run


IN_ANOTHER_PROCESS = """
import pickle, re, sys
from pathlib import Path
import torch
import functional_optim as fo
from _lib import chains, compare, trees

folder = Path(sys.argv[1])
txs = pickle.loads((folder / "txs").read_bytes())
space = {**vars(fo), **vars(chains), "re": re, "torch": torch, "inf": float("inf")}
for name, tx in txs.items():
    again = eval(repr(tx), space)
    assert again == tx and hash(again) == hash(tx), name
loaded = torch.load(folder / "states", weights_only=True)
for name, (tx, params, state, grads, extra) in pickle.loads((folder / "runs").read_bytes()).items():
    compare.assert_same_bits(loaded[name], state)
    new, state = fo.apply_gradients(tx, params, grads, loaded[name], **extra)
    loaded[name] = (new, tuple(x for x in trees.leaves(state)))
torch.save(loaded, folder / "results")
print("done")
"""


@pytest.mark.slow
def test_pickles_and_checkpoints_in_another_process(python: Any, tmp_path: Path) -> None:
    """Hashes of text and of types differ between processes, so nothing of them may travel."""
    txs = {k: tx for k, tx in VALUES.items() if "halving" not in repr(tx)}
    for tx in txs.values():
        hash(tx)
    runs = {}
    for name in txs:
        params, extra = make_tree(0), {"value": 2.0}
        _, state = train(txs[name], params, [like(params, seed) for seed in (1, 2)], **extra)
        runs[name] = (txs[name], params, state, like(params, 3), extra)
    states = io.BytesIO()
    torch.save({k: state for k, (_, _, state, _, _) in runs.items()}, states)
    files = {"txs": pickle.dumps(txs), "runs": pickle.dumps(runs), "states": states.getvalue()}

    assert python(IN_ANOTHER_PROCESS, files) == "done\n"

    results = torch.load(tmp_path / "results", weights_only=True)
    for name, (tx, params, state, grads, extra) in runs.items():
        new, state = fo.apply_gradients(tx, params, grads, state, **extra)
        assert_same_bits(results[name], (new, tuple(leaves(state))))


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", VALUES)
def test_copies_of_states(name: str, how: str) -> None:
    params = make_tree(0)
    _, state = train(VALUES[name], params, [like(params, 1)], value=2.0)

    again = COPIES[how](state)

    assert_same_bits(again, state)
    assert type(again) is type(state)
    assert repr(again) == repr(state)


@pytest.mark.parametrize("name", VALUES)
def test_states_load_with_weights_only(name: str) -> None:
    params = make_tree(0)
    grads = [like(params, seed) for seed in range(4)]
    _, state = train(VALUES[name], params, grads[:2], value=2.0)
    file = io.BytesIO()
    torch.save({"state": state, "params": params}, file)
    file.seek(0)

    loaded = torch.load(file, weights_only=True)

    assert_same_bits(loaded["state"], state)
    expected = train(VALUES[name], params, grads[2:], state, value=2.0)
    assert_same_bits(train(VALUES[name], params, grads[2:], loaded["state"], value=2.0), expected)


def test_a_deep_copy_of_a_state_is_its_own() -> None:
    tx, params = VALUES["chain"], make_tree(0)
    params, state = train(tx, params, [like(params, 1)])
    saved, before = copy.deepcopy(state), Snapshot(state)

    train(tx, params, [like(params, 2)], saved, donate=True)

    before.check()
