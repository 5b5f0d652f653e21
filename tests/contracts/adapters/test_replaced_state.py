"""Entries of an optimizer's state that users put there, reset or free, and counters that count for a long time."""

import contextlib
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import functional_optim as fo
from _lib.compare import Snapshot, assert_same_bits
from _lib.optimizers import OURS, SMALL, content, fitting, make_params, params_of, train, twins
from _lib.trees import clone, make_tree, tensors
from functional_optim import adapters
from functional_optim.adapters import TransformOptimizer


STEPS = 20

# -- counters of users ------------------------------------------------------------------------------------------------

COUNTERS: dict[str, Callable[[int], Any]] = {
    "one element": lambda n: torch.full((1,), float(n)),
    "one element in two dimensions": lambda n: torch.full((1, 1), float(n)),
    "float64": lambda n: torch.tensor(float(n), dtype=torch.float64),
    "int64": lambda n: torch.tensor(n),
    "int32 in one dimension": lambda n: torch.tensor([n], dtype=torch.int32),
    "int": lambda n: n,
    "float": float,
    "in shared memory": lambda n: torch.full((1,), float(n)).share_memory_(),
}


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("kind", COUNTERS)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_a_counter_of_any_form_counts_on(name: str, kind: str, steps: int) -> None:
    """As where processes share the state of one optimizer, which a much-copied recipe makes by hand."""
    ours = getattr(adapters, name)(make_params(shapes=SMALL), lr=0.05)
    theirs = getattr(torch.optim, name)(twins(params_of(ours)), lr=0.05, fused=True)
    train([ours, theirs], range(steps))
    for p in params_of(ours):
        own = ours.state[p]
        own["step"] = COUNTERS[kind](steps)
        own.setdefault("exp_avg", torch.zeros_like(p))
        own.setdefault("exp_avg_sq", torch.zeros_like(p))
    train([ours, theirs], range(steps, STEPS))
    assert_same_bits(content(ours)["params"], content(theirs)["params"])
    assert [float(ours.state[p]["step"]) for p in params_of(ours)] == [STEPS] * len(SMALL)


@fo.leafwise(state={"seen": fo.slot(0.0)})
def turned(u: Any, seen: Any, *, step: Any) -> Any:
    return u.flip(0) / step, seen + 1


class Following(TorchDispatchMode):
    """A mode that is shown each operation, so that no kernel runs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", COUNTERS)
@pytest.mark.parametrize("way", ["kernels", "a mode", "autograd"])
@pytest.mark.parametrize("before", [(), (turned(),), (fo.scale_by_adam(), turned())], ids=["one", "two", "four"])
def test_a_counter_of_any_form_counts_for_all_segments(before: tuple[Any, ...], way: str, kind: str) -> None:
    """Each segment of a chain reads the counter as the first one has put it right, and the last one moves that on."""
    opts = []
    for _ in range(2):
        params: list[torch.Tensor] = [*make_params(shapes=SMALL)]
        if way == "autograd":
            params = [p.clone() for p in params]
            for p in params:
                p.retain_grad()
        opts.append(TransformOptimizer(params, fo.chain(*before, fo.adam(0.05)), differentiable=way == "autograd"))
    train(opts, range(3))
    for p in params_of(opts[0]):
        opts[0].state[p]["step"] = COUNTERS[kind](3)
    with Following() if way == "a mode" else contextlib.nullcontext():
        train(opts, range(3, 8))
    assert_same_bits(*[content(opt)["params"] for opt in opts])
    assert [float(opts[0].state[p]["step"]) for p in params_of(opts[0])] == [8] * len(SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["traced", "in Python"])
def test_a_schedule_goes_on_where_float32_counts_no_further(kind: str, dtype: torch.dtype) -> None:
    """Each step past 2**24 has its own learning rate, also after a checkpoint."""
    start = 2**24 - 3

    def ramp(count: Any) -> Any:
        return (count - start) * 0.25

    def table(count: Any) -> float:
        return ramp(int(count))

    p = nn.Parameter(torch.zeros(2, dtype=dtype))
    tx = fo.sgd(ramp if kind == "traced" else table)
    opt = TransformOptimizer([p], tx)
    p.grad = torch.ones(2, dtype=dtype)
    opt.step()
    for key, x in opt.state[p].items():
        if key == "step":
            opt.state[p][key] = torch.full_like(x, start)
    with torch.no_grad():
        p.zero_()
    for step in range(STEPS):
        opt.step()
        if step == STEPS // 2:
            saved = opt.state_dict()
            opt = TransformOptimizer([p], tx)
            opt.load_state_dict(saved)
        assert p[0].item() == -0.25 * sum(range(step + 1))


# -- slots that are reset ---------------------------------------------------------------------------------------------

SLOTS = [
    ("AdamW", "exp_avg", lambda p: adapters.AdamW(p, lr=0.1)),
    ("AdamW", "exp_avg_sq", lambda p: adapters.AdamW(p, lr=0.1)),
    ("AMSGrad", "max_exp_avg_sq", lambda p: adapters.AdamW(p, lr=0.1, amsgrad=True)),
    ("chain", "trace", lambda p: TransformOptimizer(p, fo.chain(fo.trace(0.9), fo.adam(0.1)))),
    ("average", "ema", lambda p: TransformOptimizer(p, fo.chain(fo.adam(0.1), fo.params_ema(0.9)))),
]


@pytest.mark.parametrize("who", ["one", "all"])
@pytest.mark.parametrize(("name", "key", "make"), SLOTS, ids=[f"{name}-{key}" for name, key, _ in SLOTS])
def test_a_slot_that_is_reset_starts_anew(name: str, key: str, make: Any, who: str) -> None:
    """It is what it is at a first step; other slots, counters and parameters go on."""
    opt, twin = make(make_params(shapes=SMALL)), make(make_params(shapes=SMALL))
    train([opt, twin], range(5))
    for p, q in list(zip(params_of(opt), params_of(twin), strict=True))[: 1 if who == "one" else None]:
        opt.state[p][key] = None
        twin.state[q][key] = q.detach().clone() if key == "ema" else torch.zeros_like(q)
    train([opt, twin], range(5, STEPS))
    assert_same_bits(content(opt), content(twin))


def sums() -> fo.GradientTransformation:
    """Sums of updates for each parameter, and a number for all: a state that is not made of rules."""

    def init(params: Any) -> Any:
        return {name: torch.zeros_like(p) for name, p in params.items()}, torch.zeros(())

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return updates, ({name: state[0][name] + u for name, u in updates.items()}, state[1] + 1)

    return fo.GradientTransformation(init, update)


@fo.leafwise(state={"left": fo.zeros, "right": fo.zeros})
def with_two(u: Any, left: Any, right: Any) -> Any:
    return u.clone(), left + u, right - u


KEPT: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    **{
        name: lambda params, name=name: getattr(adapters, name)(params, **fitting(name))
        for name in [*OURS, "Adafactor", "LAMB", "Lion"]
    },
    "AMSGrad": lambda params: adapters.AdamW(params, amsgrad=True),
    "momentum": lambda params: adapters.RMSprop(params, momentum=0.9, centered=True),
    "rows": lambda params: adapters.SparseAdam(params),
    "rows of sums": lambda params: adapters.Adagrad(params),
    "a chain": lambda params: TransformOptimizer(params, fo.chain(fo.trace(0.9), fo.adam(0.1), fo.params_ema(0.9))),
    "whole tensors": lambda params: TransformOptimizer(params, fo.chain(with_two(), fo.sgd(0.1))),
    "no rules": lambda params: TransformOptimizer(params, fo.chain(fo.trace(0.9), sums(), fo.sgd(0.1))),
}


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("name", KEPT)
def test_a_slot_that_was_removed_is_refused_and_nothing_changes(name: str, copied: bool) -> None:
    """torch raises KeyError for it; a state that is empty, as where the only slot is gone, is that of a first step."""
    opt = KEPT[name](make_params(shapes=SMALL))
    rows = name.startswith("rows")

    def step(opt: Any) -> None:
        for p in params_of(opt):
            p.grad = torch.ones_like(p).to_sparse(1) if rows else torch.ones_like(p)
        opt.step()

    for _ in range(2):
        step(opt)
    own = list(opt.state[params_of(opt)[0]])
    for key in own if len(own) > 1 else ():
        changed = deepcopy(opt) if copied else opt
        p = params_of(changed)[0]
        holders = list(changed.state.values()) if ":tree" in key else [changed.state[p]]  # one that any may hold
        removed = {id(state): state.pop(key) for state in holders}[id(changed.state[p])]
        before, entries = (
            Snapshot(params_of(changed), [dict(s) for s in changed.state.values()]),
            dict(changed.state[p]),
        )

        for _ in range(2):
            with pytest.raises(
                ValueError, match=rf"the state of '.*params\[0\]' lacks '{key}', but has .*put the entry"
            ):
                step(changed)

        before.check()
        assert changed.state[p].keys() == entries.keys()
        for state in holders:
            state[key] = removed
        step(changed)
    opt.state[params_of(opt)[0]].clear()
    step(opt)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("switches", [{"amsgrad": True}, {"momentum": 0.5, "centered": True}], ids=str)
def test_a_slot_that_comes_with_a_switch_starts_then(switches: dict[str, Any], copied: bool) -> None:
    opt = (adapters.Adam if "amsgrad" in switches else adapters.RMSprop)(make_params(shapes=SMALL))
    train([opt], range(2))
    opt = deepcopy(opt) if copied else opt
    known = set(opt.state[params_of(opt)[0]])

    opt.param_groups[0].update(switches)
    train([opt], range(2, 4))

    assert set(opt.state[params_of(opt)[0]]) > known


@pytest.mark.parametrize("who", [slice(1), slice(None)], ids=["one", "all"])
def test_a_momentum_that_is_reset_is_that_of_torch(who: slice) -> None:
    """The first gradient afterwards is taken as it is. Only the loop of torch knows one buffer that is None."""
    ours = adapters.SGD(make_params(shapes=SMALL), lr=0.1, momentum=0.9, dampening=0.5)
    theirs = torch.optim.SGD(twins(params_of(ours)), lr=0.1, momentum=0.9, dampening=0.5, foreach=False)
    for step in range(STEPS):
        if step in (4, 9):
            for opt in (ours, theirs):
                for p in params_of(opt)[who]:
                    opt.state[p]["momentum_buffer"] = None
        train([ours, theirs], [step])
        torch.testing.assert_close(content(ours), content(theirs), rtol=1e-6, atol=1e-6)


# -- memory -----------------------------------------------------------------------------------------------------------


def storages(tree: Any) -> list[int]:
    return [x.untyped_storage()._cdata for x in tensors(tree)]


CHAINS = {
    "AdamW": fo.adamw(0.1),
    "clip and average": fo.chain(fo.zero_nans(), fo.clip_by_global_norm(1.0), fo.adam(0.1), fo.params_ema(0.9)),
    "momentum": fo.sgd(0.1, momentum=0.9),
}


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("chain", CHAINS)
def test_tensors_of_a_pure_state_have_memory_of_their_own(chain: str, steps: int) -> None:
    for donate in (False, True):
        tx, params = CHAINS[chain], make_tree(0)
        state = tx.init(params)
        for step in range(steps):
            params, state = fo.apply_gradients(tx, params, make_tree(1 + step), state, donate=donate)
        found = storages((params, state))
        assert len(set(found)) == len(found)
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in tensors(state))


@pytest.mark.parametrize("chain", CHAINS)
def test_freeing_the_state_of_a_parameter_leaves_the_others(chain: str) -> None:
    """Such as an offloader does, that brings it back before the next step."""
    opt, twin = (TransformOptimizer(make_params(shapes=SMALL * 3), CHAINS[chain]) for _ in range(2))
    train([opt, twin], range(2))
    for step in range(2, STEPS):
        for p in params_of(opt):
            before = clone([dict(opt.state[q]) for q in params_of(opt) if q is not p])
            away = [(x, x.clone(), x.untyped_storage().nbytes()) for x in tensors(dict(opt.state[p]))]
            for x, _, _ in away:
                x.untyped_storage().resize_(0)
            assert_same_bits([dict(opt.state[q]) for q in params_of(opt) if q is not p], before)
            for x, kept, size in away:
                x.untyped_storage().resize_(size)
                x.copy_(kept)
        train([opt, twin], [step])
    assert_same_bits(content(opt), content(twin))


# -- slots that a rule leaves as they are -----------------------------------------------------------------------------


@fo.elementwise(state={"sum": fo.zeros, "kept": fo.slot(2.0), "seen": fo.slot(3.0, per="leaf")})
def with_kept(u: Any, sum: Any, kept: Any, seen: Any) -> Any:
    """A rule that hands two of its slots on."""
    return u * kept * seen, sum + u, kept, seen


@pytest.mark.parametrize("backend", ["reference", "foreach", "c"])
def test_a_slot_that_is_left_as_it_is_is_not_written(backend: str) -> None:
    tx = fo.chain(with_kept(), fo.sgd(0.1))
    with fo.use_backend(backend):
        opt = TransformOptimizer(make_params(shapes=SMALL), tx)
        train([opt], range(2))
        kept = [opt.state[p][key] for p in params_of(opt) for key in ("kept", "seen")]
        written = [opt.state[p]["sum"] for p in params_of(opt)]
        versions = [[x._version for x in own] for own in (kept, written)]
        train([opt], range(2, 5))
        assert all(opt.state[p][key] is x for (p, key), x in zip(
            [(p, key) for p in params_of(opt) for key in ("kept", "seen")], kept, strict=True))  # fmt: skip
        assert [x._version for x in kept] == versions[0]
        assert all(x._version > v for x, v in zip(written, versions[1], strict=True))

        params = make_tree(0)
        state = tx.init(params)
        _, new = fo.apply_gradients(tx, params, make_tree(1), state)
        for key in ("kept", "seen"):
            assert all(a is b for a, b in zip(
                tensors(getattr(new[0], key)), tensors(getattr(state[0], key)), strict=True))  # fmt: skip
        versions = [[x._version for x in tensors(getattr(state[0], key))] for key in ("kept", "seen")]
        fo.apply_gradients(tx, params, make_tree(1), state, donate=True)
        assert versions == [[x._version for x in tensors(getattr(state[0], key))] for key in ("kept", "seen")]


def test_numbers_of_numpy_count_too() -> None:
    p = nn.Parameter(torch.zeros(2))
    opt = adapters.AdamW([p], lr=0.1)
    p.grad = torch.ones(2)
    opt.step()
    opt.state[p]["step"] = np.float32(1)
    opt.step()
    assert float(opt.state[p]["step"]) == 2.0


@fo.leafwise(state={"sum": fo.zeros})
def add_up(u: Any, sum: Any) -> Any:
    return u.clone(), sum + u


def test_an_entry_that_is_gone_behind_another_stage_moves_no_slot_twice() -> None:
    """A segment before the one that finds nothing in its place has put its own slots in place already."""
    found = []
    for gone in (False, True):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = TransformOptimizer([p], fo.chain(fo.trace(0.9), add_up(), fo.scale(-0.1)))
        for step in range(4):
            p.grad = torch.full((3,), 1.0 + step)
            if gone and step == 2:
                optimizer.state[p]["sum"] = None
            optimizer.step()
        found.append([p.detach(), optimizer.state[p]["trace"]])
    assert all(map(torch.equal, *found))


def differences() -> fo.GradientTransformation:
    """Updates less those of the step before, which are kept as they were given."""

    def init(params: Any) -> Any:
        return {name: torch.zeros_like(p) for name, p in params.items()}

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return {name: u - state[name] for name, u in updates.items()}, dict(updates)

    return fo.GradientTransformation(init, update)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_state_that_is_a_gradient_is_a_copy_of_it(set_to_none: bool) -> None:
    """Gradients are written to between steps."""
    p = nn.Parameter(torch.ones(3))
    opt = TransformOptimizer([p], fo.chain(differences(), fo.sgd(1.0)))
    expected, last = torch.ones(3), 0.0
    for step in range(4):
        opt.zero_grad(set_to_none=set_to_none)
        (p * (step + 1.0)).sum().backward()
        opt.step()
        expected, last = expected - (step + 1.0 - last), step + 1.0
        assert torch.equal(p.detach(), expected)
