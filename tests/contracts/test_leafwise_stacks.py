"""Rules for whole tensors, of leaves that are computed together: stacks, batches, and the memory of results."""

from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import functional_optim as fo
from _lib.compare import Snapshot, assert_same_bits
from functional_optim.adapters import TransformOptimizer


def test_leaves_of_one_shape_are_computed_at_once() -> None:
    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.n = 0

        def __torch_dispatch__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.n += "select" not in str(fn) and "add" not in str(fn)  # adding updates to parameters is the chain's
            return fn(*args, **(kwargs or {}))

    @fo.leafwise
    def square(u: Any) -> Any:
        return u @ u.T @ u

    counts = []
    for n in (3, 30):
        grads = {str(k): torch.randn(4, 3) for k in range(n)}
        tx = square()
        state = tx.init(grads)
        with Count() as mode:
            updates, _ = tx.update(grads, state)
        counts.append(mode.n)
        torch.testing.assert_close(updates, {k: g @ g.T @ g for k, g in grads.items()})
    assert counts[0] == counts[1]


def test_groups_with_the_same_numbers_are_computed_at_once() -> None:
    """Others are not, and those that differ in what the rule does not read are."""
    sizes: list[int] = []

    @fo.leafwise(batched=True)
    def spread(u: Any, *, rate: Any = 2.0) -> Any:
        sizes.append(len(u))
        return u * rate

    params = [nn.Parameter(torch.ones(2, 2)) for _ in range(5)]
    live = torch.tensor(3.0)
    groups = [
        {"params": [p], "rate": rate, "lr": 0.1 * k}
        for k, (p, rate) in enumerate(zip(params, (2.0, live, 2.0, 5.0, live), strict=True))
    ]
    opt = TransformOptimizer(groups, fo.chain(spread(), fo.scale_by_learning_rate(0.5)))
    for _ in range(2):
        for p in params:
            p.grad = torch.ones(2, 2)
        sizes.clear()
        opt.step()
        assert sorted(sizes) == [1, 2, 2]
    for p, group in zip(params, opt.param_groups, strict=True):
        assert p[0, 0].item() == pytest.approx(1 - 2 * float(group["rate"]) * group["lr"])


def test_a_function_that_cannot_be_batched_is_called_leaf_by_leaf() -> None:
    @fo.leafwise
    def signed(u: Any) -> Any:
        return u if float(u.sum()) > 0 else -2 * u

    grads = {str(k): torch.full((2, 2), float(k - 2)) for k in range(5)}
    for _ in range(2):
        updates, _ = signed().update(grads, signed().init(grads))
        assert_same_bits(updates, {k: g if g.sum() > 0 else -2 * g for k, g in grads.items()})


@pytest.mark.parametrize("n", [1, 2])
def test_slots_and_updates_may_be_arguments(n: int) -> None:
    """The gradient or the parameter as the new slot, or as the update: both have memory of their own afterwards."""

    @fo.leafwise(state={"prev": fo.slot("first_update"), "old": fo.slot("param")})
    def difference(u: Any, p: Any, prev: Any, old: Any) -> Any:
        return p - old + u + 0.5 * (u - prev), u, p

    @fo.leafwise
    def parameter(u: Any, p: Any) -> Any:
        return p

    names = "ab"[:n]
    tx = fo.chain(difference(), fo.scale(-1.0))
    params, grads = ({k: torch.full((3,), x, dtype=torch.float64) for k in names} for x in (1.0, 0.0))
    state = tx.init(params)
    p = old = torch.ones(3, dtype=torch.float64)
    prev = None
    for step in range(5):
        for g in grads.values():
            g.fill_(float(step + 1))  # in the memory of the gradient before
        params, state = fo.apply_gradients(tx, params, grads, state, donate=True)
        g = torch.full((3,), float(step + 1), dtype=torch.float64)
        p, old, prev = p - (p - old + g + 0.5 * (g - (g if prev is None else prev))), p, g
        assert_same_bits(params, dict.fromkeys(names, p))

    decay = fo.chain(parameter(), fo.scale(-0.5))
    params = {k: torch.ones(3) for k in names}
    for donate in (False, True):
        params, _ = fo.apply_gradients(decay, params, params, decay.init(params), donate=donate)
    assert_same_bits(params, {k: torch.full((3,), 0.25) for k in names})


@pytest.mark.parametrize("n", [1, 2])
def test_a_change_in_place_of_a_later_step_is_refused_before_it_happens(n: int) -> None:
    @fo.leafwise(state={"buf": fo.zeros})
    def momentum(u: Any, buf: Any, *, first: Any) -> Any:
        buf = u.clone() if first else buf.mul_(0.5).add_(u)
        return buf, buf

    params = {k: torch.ones(3) for k in "ab"[:n]}
    tx = momentum()
    _, state = tx.update(params, tx.init(params))
    before = Snapshot(params, state)
    for _ in range(2):
        with pytest.raises(fo.RuleError, match="changes its argument `buf` in place"):
            tx.update(params, state)
        before.check()


def test_counters_that_cannot_be_read_do_not_split_batches() -> None:
    """Under a transformation a counter stays a tensor, one for all leaves."""
    calls = []

    @fo.leafwise(state={"mu": fo.slot("first_update")})
    def counted(u: Any, mu: Any, *, step: Any) -> Any:
        calls.append(u)
        return u / step, mu + u

    params = {str(k): torch.ones(3) for k in range(6)}
    tx = counted()
    state = tx.init(params)
    torch.func.vmap(lambda g: tx.update(dict.fromkeys(params, g), state)[0])(torch.ones(2, 3))
    assert len(calls) == 1


def test_large_leaves_are_computed_one_by_one() -> None:
    """A stack is a copy of its leaves, which a rule may have only up to a size."""
    seen: list[tuple[int, ...]] = []

    @fo.leafwise(state={"mu": fo.zeros}, batched=True, stacked_up_to=6)
    def trace_twice(u, mu):  # type: ignore[no-untyped-def]
        seen.append(tuple(u.shape))
        mu = mu + u
        return 2 * mu, mu

    params = {
        f"{name}{k}": torch.full(shape, 1.0 + k) for k in range(2) for name, shape in (("a", (2, 3)), ("b", (3, 3)))
    }
    tx = trace_twice()
    state = tx.init(params)
    for n in (1, 2):
        updates, state = tx.update(params, state)
        for name, p in params.items():
            assert torch.equal(updates[name], 2 * n * p)
            assert torch.equal(state.mu[name], n * p)
    assert sorted(seen) == sorted(2 * [(2, 2, 3), (1, 3, 3), (1, 3, 3)])


def test_more_leaves_than_a_stack_holds_on_a_cpu_are_several_stacks() -> None:
    """Stacked or mapped: the last stack is smaller, and each leaf gets its own result."""
    seen: list[tuple[int, ...]] = []

    def centred(u, mu, *, step):  # type: ignore[no-untyped-def]
        seen.append(tuple(u.shape))
        mu = mu + u.mean(-1, keepdim=True) * step
        return u - mu, mu

    params = {f"p{k}": torch.full((512, 512), 1.0 + k) for k in range(5)}
    for options in ({"batched": True}, {}):
        tx = fo.leafwise(state={"mu": fo.zeros}, **options)(centred)()
        state = tx.init(params)
        for n in (1, 3):
            updates, state = tx.update(params, state)
            for k, name in enumerate(params):
                assert torch.equal(state.mu[name], torch.full((512, 512), n * (1.0 + k)))
                assert torch.equal(updates[name], params[name] - state.mu[name])
    assert seen[:4] == [(4, 512, 512), (1, 512, 512)] * 2


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("view", [False, True])
def test_an_update_is_no_part_of_the_gradient(batched: bool, view: bool) -> None:
    """Also where a rule returns its argument, or a view of it."""
    tx = fo.leafwise(batched=batched)(lambda u: u.view(u.shape) if view else u)()
    grads = {"w": torch.ones(2, 3)}
    state = tx.init(grads)
    for _ in range(3):
        updates, state = tx.update(grads, state)
        updates["w"].mul_(7.0)
        assert torch.equal(grads["w"], torch.ones(2, 3))


@fo.leafwise(state={"kept": fo.slot(0.0)})
def keep(u: Any, kept: Any) -> Any:
    """The argument itself, as update and as slot."""
    return u, u


@pytest.mark.parametrize("n", [1, 2])
def test_leaves_in_one_memory_that_are_read_otherwise(n: int) -> None:
    """One is negated when it is read, and one is of another storage at the same address."""
    memory, names = torch.arange(1.0, 7.0), ("a", "b")[:n]
    shared = numpy.arange(1.0, 9.0, dtype=numpy.float32)
    trees = [
        {"a": torch._neg_view(memory[:3]), "b": memory[3:]},
        {"a": torch.from_numpy(shared[:4]), "b": torch.from_numpy(shared)[4:]},
    ]
    for tree in trees:
        grads = {k: tree[k] for k in names}
        for tx in (
            double(),
            fo.chain(double(), double(), fo.scale(0.5)),
            fo.chain(fo.identity(), double()),
        ):
            state = tx.init(grads)
            for _ in range(3):
                updates, state = tx.update(grads, state)
                assert_same_bits(updates, {k: 2 * g for k, g in grads.items()})


@fo.leafwise
def double(u: Any) -> Any:
    return u * 2


def test_a_rule_that_writes_in_inference_mode_reaches_no_gradient() -> None:
    """Tensors have no version there, by which the rule would be refused."""

    @fo.leafwise(batched=True)
    def writes(u: Any) -> Any:
        return u.mul_(2)

    with torch.inference_mode():
        memory = torch.ones(8)
        for grads in ({"a": memory[:4], "b": memory[4:]}, {"a": memory}):
            tx = writes()
            state = tx.init(grads)
            for _ in range(3):
                _, state = tx.update(grads, state)
                assert (memory == 1).all()


@fo.leafwise(batched=True)
def turned(u: Any) -> Any:
    """Matrices whose elements lie in memory the other way round."""
    return (2 * u).mT.contiguous().mT


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("layout", ["packed", "views of a stack", "expanded", "overlapping", "apart"])
def test_results_share_no_memory_with_gradients_and_slots(layout: str, alone: bool) -> None:
    """Gradients stay as they are, however they lie in memory, and no update or slot shares theirs."""
    tx = keep() if alone else fo.chain(keep(), turned(), keep(), turned(), fo.scale(0.25))
    params = {k: torch.zeros(3, 4) for k in "abc"}
    memory = torch.arange(100.0)
    grads: Any = {
        "packed": lambda: fo.pack({k: torch.full((3, 4), 1.0 + i) for i, k in enumerate("abc")}),
        "views of a stack": lambda: dict(zip("abc", memory[:36].view(3, 3, 4), strict=True)),
        "expanded": lambda: dict(zip("abc", memory[:3].view(3, 1, 1).expand(3, 3, 4), strict=True)),
        "overlapping": lambda: {k: memory[2 * i :].as_strided((3, 4), (4, 1)) for i, k in enumerate("abc")},
        "apart": lambda: {k: torch.full((3, 4), 1.0 + i) for i, k in enumerate("abc")},
    }[layout]()
    before = Snapshot(grads)
    like: Any = fo.pack(params) if layout == "packed" else params
    state = tx.init(like)
    for _ in range(3):  # views are taken from the second step on
        updates, state = tx.update(grads, state, like)
        before.check()
        plain, given = (fo.unpack(x) if layout == "packed" else x for x in (updates, grads))
        assert_same_bits(plain, dict(given))
        torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda x: x.zero_() if x.is_floating_point() else x, (plain, state)
        )
        before.check()


def test_updates_of_a_rule_are_not_copied_for_the_next_one() -> None:
    """Its results are views of one tensor; the first rule is given copies, for gradients are the caller's."""
    tx, grads = fo.chain(double(), turned(), double()), {k: torch.ones(3, 4) for k in "abc"}
    state = tx.init(grads)
    counts = []
    for _ in range(3):
        with mock.patch.object(torch, "stack", wraps=torch.stack) as stack:
            updates, state = tx.update(grads, state)
        counts.append(stack.call_count)
        assert_same_bits(updates, {k: 8 * g for k, g in grads.items()})
    assert counts == [3, 1, 1]
