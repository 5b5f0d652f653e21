"""Mistakes that could be made where rules become one program: names, scopes, slots, numbers that only look fixed."""

import re
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.marks import INTERPRETER
from functional_optim.adapters import TransformOptimizer


BACKENDS = ("reference", "foreach", "c", "triton")

pytestmark = INTERPRETER


@fo.elementwise(state={"total": fo.slot(0.0)})
def aa(u: Any, total: Any, *, weight: float = 1.0) -> tuple[Any, Any]:
    """A sum of updates."""
    total = total + weight * u
    return total, total


@fo.elementwise(state={"total": fo.slot(0.0)})
def aa_2(u: Any, total: Any) -> tuple[Any, Any]:
    """A sum of halves of updates, under the name that a second `aa` would have."""
    total = total + 0.5 * u
    return total, total


def by_itself(txs: list[fo.GradientTransformation], steps: int) -> tuple[torch.Tensor, list[Any]]:
    """The last update of transformations called one after another."""
    states = [tx.init(torch.zeros(3, dtype=torch.float64)) for tx in txs]
    u = torch.zeros(3)
    for step in range(steps):
        u = torch.arange(1.0, 4.0, dtype=torch.float64) * (step + 1)
        for k, tx in enumerate(txs):
            u, states[k] = tx.update(u, states[k], torch.zeros(3, dtype=torch.float64))
    return u, states


@pytest.mark.parametrize("backend", BACKENDS)
def test_rules_of_one_name_and_one_that_looks_like_a_second_keep_their_own_slots(backend: str) -> None:
    txs = [aa(), aa_2(), aa(weight=0.25), aa_2()]
    expected, states = by_itself(txs, 5)
    tx = fo.chain(*txs)
    state = tx.init(torch.zeros(3, dtype=torch.float64))
    with fo.use_backend(backend):
        for step in range(5):
            u, state = tx.update(torch.arange(1.0, 4.0, dtype=torch.float64) * (step + 1), state)
    assert torch.equal(u, expected)
    for own, other in zip(state, states, strict=True):
        assert torch.equal(own.total, other.total)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_of_the_same_values_over_different_leaves_are_different_norms(backend: str) -> None:
    a, b = (fo.masked(fo.clip_by_global_norm(1.0), re.compile(name)) for name in ("w", "b"))
    tx = fo.chain(a, b)
    grads = {"w": torch.tensor([3.0, 4.0], dtype=torch.float64), "b": torch.tensor([6.0, 8.0], dtype=torch.float64)}
    with fo.use_backend(backend):
        updates, _ = tx.update(grads, tx.init(grads))
    # each is divided by its own norm: 5 and 10
    for u in updates.values():
        torch.testing.assert_close(u, torch.tensor([0.6, 0.8], dtype=torch.float64), rtol=1e-15, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_norms_of_one_value_in_one_rule(backend: str) -> None:
    tx = twice()
    u = torch.tensor([3.0, 4.0], dtype=torch.float64)
    with fo.use_backend(backend):
        updates, _ = tx.update({"a": u, "b": u.clone()}, tx.init({"a": u, "b": u}))
    torch.testing.assert_close(updates["a"], u / torch.tensor(50.0, dtype=torch.float64), rtol=1e-14, atol=0)


@fo.elementwise
def twice(u: Any) -> Any:
    """Divides by a norm, and again by the same one."""
    return u / fo.tree_norm(u) / fo.tree_norm(u)


@fo.elementwise(state={"last": fo.slot(0.0)})
def remembers(u: Any, last: Any) -> tuple[Any, Any]:
    """Writes a slot that it never reads."""
    return u, 2.0 * u


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slot_that_is_written_and_never_read_may_lie_in_another_order(backend: str) -> None:
    tx = fo.chain(remembers(), fo.scale(-1.0))
    params = torch.zeros(4, 3)
    grads = torch.arange(12.0).reshape(4, 3)
    state = tx.init(params)
    last = torch.zeros(3, 4).t()
    state = (state[0]._replace(last=last), state[1])
    with fo.use_backend(backend):
        params, state = fo.apply_gradients(tx, params, grads, state, donate=True)
    assert state[0].last is last
    assert torch.equal(last, 2 * grads)
    assert torch.equal(params, -grads)


@fo.elementwise(state={"start": fo.slot("param"), "rate": fo.slot(0.5, per="leaf"), "unread": fo.slot(3.0)})
def pulled_back(u: Any, p: Any, start: Any, rate: Any, unread: Any) -> Any:
    """Changes none of its slots, and does not look at one of them."""
    return u + rate * (p - start), start, rate, unread


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slot_that_is_returned_unchanged_stays_what_it_was(backend: str, donate: bool) -> None:
    tx = fo.chain(pulled_back(), aa())
    params = {"a": torch.ones(2, 3).t(), "b": torch.zeros(4)}
    state = tx.init(params)
    with fo.use_backend(backend):
        for _ in range(3):
            grads = {k: torch.ones_like(p) for k, p in params.items()}
            params, state = fo.apply_gradients(tx, params, grads, state, donate=donate)
    # d' = d + t where t' = t + 1 + d / 2, from 0: 1, then 3.5, then 8.75
    torch.testing.assert_close(params, {"a": torch.full((3, 2), 9.75), "b": torch.full((4,), 8.75)}, rtol=0, atol=0)
    assert torch.equal(state[0].start["a"], torch.ones(3, 2))
    assert torch.equal(state[0].start["b"], torch.zeros(4))
    assert torch.equal(state[0].rate["b"], torch.tensor(0.5))
    assert torch.equal(state[0].unread["a"], torch.full((3, 2), 3.0))


UNCHANGED = ("start", "rate", "unread")


def versions(state: Any) -> list[int]:
    """The number of writes to each slot of `pulled_back`."""
    return [x._version for name in UNCHANGED for x in getattr(state, name).values()]


@pytest.mark.parametrize(
    ("backend", "donate", "recorded"),
    [
        (backend, donate, recorded)
        for backend in BACKENDS
        for donate, recorded in ((False, False), (False, True), (True, False))
        if not (recorded and backend == "foreach")  # which has no derivative
    ],
)
def test_a_slot_that_is_returned_unchanged_is_not_written(backend: str, donate: bool, recorded: bool) -> None:
    """Nor copied: the new state has the very tensors of the old one."""
    tx = fo.chain(pulled_back(), aa())
    params = {"a": torch.ones(2, 3).t(), "b": torch.zeros(4)}
    grads = {k: torch.ones_like(p).requires_grad_(recorded) for k, p in params.items()}
    state = tx.init(params)
    before = [x for name in UNCHANGED for x in getattr(state[0], name).values()]
    with fo.use_backend(backend):
        _, new = fo.apply_gradients(tx, params, grads, state, donate=donate)
        again = new if donate else tx.update(grads, state, params)[1]
    for found in (new, again):
        after = [x for name in UNCHANGED for x in getattr(found[0], name).values()]
        assert all(x is y for x, y in zip(before, after, strict=True))
        assert versions(found[0]) == [0] * 6
        assert all((x is y) is donate for x, y in zip(state[1].total.values(), found[1].total.values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_slot_that_is_returned_unchanged_is_not_counted(dtype: torch.dtype) -> None:
    tx, params = fo.chain(pulled_back(), aa()), {"a": torch.zeros(3, dtype=dtype)}
    optimizer = TransformOptimizer([torch.nn.Parameter(params["a"])], tx)
    with torch.no_grad():
        explained = [fo.explain(tx, params), fo.explain(optimizer)]
    # reads the update, the parameter, `start` and `total`; writes the parameter and `total`
    counted = [(x.bytes_read, x.bytes_written) for x in explained]
    assert counted == [(4 * dtype.itemsize, 2 * dtype.itemsize)] * 2


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_optimizer_does_not_write_slots_that_are_returned_unchanged(backend: str, guarded: bool) -> None:
    w = torch.nn.Parameter(torch.ones(3))
    opt: Any = TransformOptimizer([w], fo.chain(pulled_back(), fo.scale(-1.0)))
    w.grad = torch.ones(3)
    with fo.use_backend(backend):
        opt.step()
        before = {name: opt.state[w][name] for name in UNCHANGED}
        written = [x._version for x in before.values()]
        for found in (0.0, 1.0, 0.0):
            if guarded:
                opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(found)
            opt.step()
    assert all(opt.state[w][name] is x for name, x in before.items())
    assert [x._version for x in before.values()] == written
    # 1, 0, -0.5, -0.75, -0.875: one step less where one is skipped
    assert w.tolist() == [-0.75 if guarded else -0.875] * 3


def test_an_optimizer_keeps_slots_that_are_returned_unchanged() -> None:
    w = torch.nn.Parameter(torch.ones(3))
    opt = TransformOptimizer([w], fo.chain(pulled_back(), fo.scale(-1.0)))
    for _ in range(2):
        w.grad = torch.ones(3)
        opt.step()
    assert w.tolist() == [-0.5] * 3  # 1, 0, and from there down by 1 - 1 / 2
    assert opt.state[w]["start"].tolist() == [1.0] * 3
    assert opt.state[w]["unread"].tolist() == [3.0] * 3


def test_a_python_function_is_called_at_every_step_even_if_it_looks_constant() -> None:
    rates = [0.5, 0.25, 0.125]
    tx = fo.scale_by_schedule(lambda count: rates[0])
    state = tx.init(torch.zeros(1))
    found = []
    while rates:
        u, state = tx.update(torch.ones(1), state)
        found.append(u.item())
        rates.pop(0)
    assert found == [0.5, 0.25, 0.125]


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_default_device_does_not_reach_into_a_step(backend: str, donate: bool) -> None:
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1))
    params = {"w": torch.ones(3)}
    state = tx.init(params)
    with torch.device("meta"), fo.use_backend(backend):
        params, state = fo.apply_gradients(tx, params, {"w": torch.full_like(params["w"], 2.0)}, state, donate=donate)
    assert params["w"].device.type == "cpu"
    # one step of Adam is as long as the learning rate, and decay takes 1e-4 of that
    torch.testing.assert_close(params["w"], torch.full((3,), 0.9 - 1e-5), rtol=1e-6, atol=0)


@fo.elementwise
def moves_to(u: Any, p: Any, *, target: float) -> Any:
    """Computes the new parameter itself."""
    return (target + 0 * u) - p


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_that_a_rule_computes_whole_is_rounded_once(backend: str) -> None:
    p = torch.tensor([1e8, -3e7, 0.1])
    tx = moves_to(target=0.1)
    with fo.use_backend(backend):
        new, _ = fo.apply_gradients(tx, p, torch.zeros(3), tx.init(p))
    assert torch.equal(new, torch.full((3,), 0.1))  # p + (0.1 - p) would be 0, 0 and 0.1
