"""Tensors that change between steps, and steps from several threads."""

import collections
import gc
import itertools
import threading
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.compare import Snapshot, assert_same_bits
from _lib.training import train
from _lib.trees import clone, like


# --- threads


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("same_shapes", [False, True])
def test_threads_share_a_transformation(same_shapes: bool, donate: bool) -> None:
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-2, weight_decay=0.1), fo.params_ema(0.9))
    n_threads, n_steps = 4, 50
    trees = [
        {f"p{k}": torch.ones(7 + (0 if same_shapes else t), dtype=torch.float64) * t for k in range(5)}
        for t in range(n_threads)
    ]
    grads = [[like(tree, 100 * t + s) for s in range(n_steps)] for t, tree in enumerate(trees)]
    expected = [train(tx, clone(tree), gs) for tree, gs in zip(trees, grads, strict=True)]
    meet = threading.Barrier(n_threads, timeout=60)

    def work(t: int) -> Any:
        params, state = trees[t], tx.init(trees[t])
        meet.wait()
        return train(tx, params, grads[t], state, donate=donate)

    with ThreadPoolExecutor(n_threads) as pool:
        actual = list(pool.map(work, range(n_threads)))

    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)


def test_threads_ask_for_backends_of_their_own() -> None:
    """A graph is compiled for the backend that is asked for around its own call, whatever another thread does."""
    tx, params = fo.sgd(0.1), {"w": torch.ones(2)}
    seen: list[str] = []

    @torch.compile(backend=lambda graph, _: seen.append(str(graph.graph)) or graph, fullgraph=True, dynamic=False)
    def step(params: Any, grads: Any, state: Any) -> Any:
        return fo.apply_gradients(tx, params, grads, state)

    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with fo.use_backend("reference"):
            entered.set()
            assert left.wait(60)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(other)
        assert entered.wait(60)
        step(params, params, tx.init(params))  # within the other's block
        with fo.use_backend("reference"):
            left.set()
            done.result()
            step(params, params, tx.init(params))  # the other has left its block

    assert ["traced_step" in text for text in seen] == [False, True]


# --- tensors that change between steps


def replace_data(p: torch.Tensor, new: torch.Tensor) -> None:
    p.data = new


# Changes of a parameter "p", its gradient "g" or its momentum "m", all square matrices, after some steps.
CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "nothing": lambda x: None,
    "parameter: new memory": lambda x: replace_data(x["p"], x["p"].data * 2),
    "parameter: double": lambda x: replace_data(x["p"], x["p"].data.double()),
    "parameter: half": lambda x: replace_data(x["p"], x["p"].data.bfloat16()),
    "parameter: other layout": lambda x: replace_data(x["p"], x["p"].data.t().contiguous().t()),
    "parameter: not dense": lambda x: replace_data(x["p"], x["p"].data.repeat_interleave(2, 1)[:, ::2]),
    "parameter: transposed in place": lambda x: x["p"].t_(),
    "parameter: smaller": lambda x: replace_data(x["p"], x["p"].data[:2, :2].clone()),
    "parameter: a view of fewer rows": lambda x: replace_data(x["p"], x["p"].data[:2]),
    "parameter: integers": lambda x: replace_data(x["p"], x["p"].data.to(torch.int32)),
    "parameter: set to another storage": lambda x: x["p"].data.set_(torch.ones(3, 3).storage(), 0, (3, 3), (3, 1)),
    "parameter: swapped": lambda x: torch.utils.swap_tensors(x["p"], torch.full((3, 3), 7.0)),
    "all smaller": lambda x: [replace_data(v, v.data[:2, :2].clone()) for v in x.values()],
    "all double": lambda x: [replace_data(v, v.data.double()) for v in x.values()],
    "all transposed in place": lambda x: [v.t_() for v in x.values()],
    "gradient: double": lambda x: replace_data(x["g"], x["g"].data.double()),
    "gradient: other layout": lambda x: replace_data(x["g"], x["g"].data.t().contiguous().t()),
    "gradient: larger": lambda x: replace_data(x["g"], torch.ones(4, 4)),
    "momentum: new memory": lambda x: replace_data(x["m"], x["m"].data * 2),
    "momentum: double": lambda x: replace_data(x["m"], x["m"].data.double()),
    "momentum: half": lambda x: replace_data(x["m"], x["m"].data.half()),
    "momentum: transposed in place": lambda x: x["m"].t_(),
    "momentum: other layout": lambda x: replace_data(x["m"], x["m"].data.t().contiguous().t()),
    "momentum: smaller": lambda x: replace_data(x["m"], x["m"].data[:2]),
    "momentum: resized": lambda x: x["m"].resize_(2, 3),
    "momentum: memory read as integers": lambda x: replace_data(x["m"], x["m"].data.view(torch.int32)),
    "momentum: swapped": lambda x: torch.utils.swap_tensors(x["m"], torch.full((3, 3), 7.0)),
    "momentum: swapped with another shape": lambda x: torch.utils.swap_tensors(x["m"], torch.ones(4, 4)),
    "momentum: swapped with a sparse one": lambda x: torch.utils.swap_tensors(x["m"], torch.ones(3, 3).to_sparse()),
}


def momentum_as(name: str) -> Any:
    """Descent with momentum that no other test has used: names are part of what a transformation is."""
    return fo.named_chain((name, fo.trace(0.5)), ("rate", fo.scale_by_learning_rate(0.1)))


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_change_between_steps(change: str, donate: bool) -> None:
    """After any change of a tensor the next step is the one that a transformation never used before would make."""
    generator = torch.Generator().manual_seed(0)
    x = {k: torch.randn(3, 3, generator=generator) for k in "pgm"}
    names = [f"{change}, {donate}, {use}" for use in ("used", "fresh")]
    used, fresh = map(momentum_as, names)

    def step(tx: Any, name: str, p: Any, g: Any, m: Any, donate: bool) -> tuple[Any, Any]:
        state = tx.init(torch.zeros(3, 3))
        state[name] = state[name]._replace(trace=m)
        p, state = fo.apply_gradients(tx, p, g, state, donate=donate)
        return p, state[name].trace

    for _ in range(3):
        x["p"], x["m"] = step(used, names[0], **x, donate=donate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about typed storages and resizing
        CHANGES[change](x)
    try:
        expected = step(fresh, names[1], **clone(x), donate=False)
    except (TypeError, ValueError, RuntimeError) as error:
        before = Snapshot(x)
        with pytest.raises(type(error)):
            step(used, names[0], **x, donate=donate)
        before.check()
        return

    actual = step(used, names[0], **x, donate=donate)

    assert_same_bits(actual, expected)


@pytest.mark.parametrize("change", CHANGES)
def test_one_of_many_small_tensors_that_changes_between_steps(change: str) -> None:
    names = [f"{change}, one of many, {use}" for use in ("used", "fresh")]
    used, fresh = map(momentum_as, names)
    params, grads = ({str(k): torch.arange(9.0).view(3, 3) + x for k in range(30)} for x in (1.0, 2.0))
    state = used.init(params)
    for _ in range(3):
        fo.apply_gradients(used, params, grads, state, donate=True)
    untouched = clone(params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about typed storages and resizing
        CHANGES[change]({"p": params["7"], "g": grads["7"], "m": state[names[0]].trace["7"]})
    p, m = clone((params, state[names[0]].trace))
    start = fresh.init(untouched)
    start[names[1]] = start[names[1]]._replace(trace=m)
    try:
        expected, after = fo.apply_gradients(fresh, p, grads, start)
    except (TypeError, ValueError, RuntimeError) as error:
        before = Snapshot((params, grads, state))
        with pytest.raises(type(error)):
            fo.apply_gradients(used, params, grads, state, donate=True)
        before.check()
        return

    fo.apply_gradients(used, params, grads, state, donate=True)

    assert_same_bits(params, expected)
    assert_same_bits(state[names[0]].trace, after[names[1]].trace)


def small_leaves(n: int = 30) -> tuple[Any, Any, Any, Any]:
    """A transformation that no other test has used, parameters, gradients, and a state that has made three steps."""
    tx = momentum_as(f"small leaves {next(NUMBERS)}")
    params = {str(k): torch.full((3, 3), float(k)) for k in range(n)}
    grads = {k: torch.ones_like(p) for k, p in params.items()}
    state = tx.init(params)
    for _ in range(3):
        fo.apply_gradients(tx, params, grads, state, donate=True)
    return tx, params, grads, state


NUMBERS = itertools.count()


def trace_of(state: Any) -> Any:
    return next(iter(state.values())).trace


def test_version_of_a_swapped_state_tensor_is_bumped() -> None:
    tx, params, grads, state = small_leaves()
    m = trace_of(state)["7"]
    torch.utils.swap_tensors(m, torch.zeros(3, 3))
    for _ in range(3):
        version = m._version

        fo.apply_gradients(tx, params, grads, state, donate=True)

        assert m._version > version
    m.resize_(2, 2)
    with pytest.raises(ValueError, match=r"state trace.trace at '7' has shape \(2, 2\)"):
        fo.apply_gradients(tx, params, grads, state, donate=True)


def test_state_is_freed_with_its_last_reference() -> None:
    *_, state = small_leaves()
    references = [weakref.ref(x) for x in trace_of(state).values()]

    gc.disable()
    try:
        del state
        assert [r() for r in references] == [None] * len(references)
    finally:
        gc.enable()


def test_large_state_tensor_moved_between_steps_is_read_anew() -> None:
    """Its memory is its own, so another tensor may get it when it is given up, as by moving it away and back."""
    tx = momentum_as("large among small")
    params = {**{str(k): torch.ones(3) for k in range(30)}, "large": torch.ones(100_000)}
    grads = {k: torch.ones_like(p) for k, p in params.items()}
    state = tx.init(params)
    for _ in range(2):
        fo.apply_gradients(tx, params, grads, state, donate=True)
    m = trace_of(state)["large"]
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        away = m.data.to(dtype)
        m.data = torch.empty(0)
        m.data = away.clone()
        expected = (m.to(torch.float32) * 0.5 + 1).to(dtype)

        fo.apply_gradients(tx, params, grads, state, donate=True)

        assert_same_bits(m, expected)


@pytest.mark.parametrize("what", ["parameter", "momentum"])
def test_tensor_that_escaped_vmap_is_refused(what: str) -> None:
    tx, params, grads, state = small_leaves(12)
    found: list[torch.Tensor] = []
    torch.vmap(lambda x: (found.append(x), x * 1)[1])(torch.ones(2, 3, 3))
    (params if what == "parameter" else trace_of(state))["3"] = found[0]

    for _ in range(3):
        with pytest.raises(ValueError, match=r"at '3' has escaped from a function that `torch\.vmap` maps"):
            fo.apply_gradients(tx, params, grads, state)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("what", ["params", "updates", "momentum"])
def test_freed_storage_is_refused(what: str, donate: bool) -> None:
    tx, params, grads, state = small_leaves()
    x = {"params": params, "updates": grads, "momentum": trace_of(state)}[what]["3"]
    x.data = torch.ones(3, 3)
    for _ in range(2):
        fo.apply_gradients(tx, params, grads, state, donate=donate)
    x.untyped_storage().resize_(0)

    with pytest.raises(ValueError, match=r"of a leaf of shape \(3, 3\) has no memory: its storage has been freed"):
        fo.apply_gradients(tx, params, grads, state, donate=donate)


@pytest.mark.parametrize("repeated", [False, True])
def test_gradient_with_negative_bit(repeated: bool) -> None:
    """Such as the imaginary part of a conjugate: a view of memory with a sign still to be applied."""
    params, tx = {"v": torch.zeros(2), "w": torch.zeros(2)}, fo.chain(fo.identity(), fo.sgd(1.0))
    state, g = tx.init(params), torch.tensor([1.0, 2.0])
    fo.apply_gradients(tx, params, {"v": g, "w": g if repeated else g.clone()}, state)

    new, _ = fo.apply_gradients(tx, params, {"v": torch._neg_view(g), "w": torch._neg_view(g)}, state)

    torch.testing.assert_close(new, {"v": g, "w": g})


# --- trees in turns


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("chain", ["whole tensors", "Python", "rules"])
def test_trees_with_the_same_keys_in_another_order_take_turns(chain: str, donate: bool) -> None:
    """A dict and an ordered dict are read alike; each has its own containers, with its own leaves at its keys."""

    def squared(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return updates, type(updates)((k, state[k] + u * u) for k, u in updates.items())

    first = {
        "whole tensors": fo.scale_by_factored_rms(min_dim_size_to_factor=2),
        "Python": fo.GradientTransformation(lambda p: type(p)((k, torch.zeros_like(x)) for k, x in p.items()), squared),
        "rules": fo.trace(0.5),
    }[chain]
    tx = fo.chain(first, fo.scale(-0.1))
    plain = {k: torch.tensor([1.0 + i]) for i, k in enumerate("abcd")}
    ordered = collections.OrderedDict((k, plain[k] + 10) for k in "cadb")
    trees: list[Any] = [plain, ordered]
    states = [tx.init(tree) for tree in trees]
    expected = [train(fo.chain(first, fo.scale(-0.1)), clone(tree), [clone(tree)] * 2) for tree in trees]
    grads = clone(trees)

    for _ in range(2):
        for k, g in enumerate(grads):
            trees[k], states[k] = fo.apply_gradients(tx, trees[k], g, states[k], donate=donate)

    for k in range(2):
        assert_same_bits((trees[k], states[k]), expected[k])
