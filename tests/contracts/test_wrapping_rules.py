"""Rules around an inner transformation, which see the update that entered it beside the one that left it."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.backends import BACKENDS, only
from _lib.chains import Halve, is_matrix
from _lib.compare import DOUBLE, assert_same_bits
from _lib.marks import INTERPRETER
from _lib.training import train
from _lib.trees import clone, like, make_tree
from functional_optim.adapters import TransformOptimizer


pytestmark = INTERPRETER
STEPS = 20


@fo.elementwise(ranges={"eps": "[0, inf)"})
def cautious(u, before, *, eps=1e-3):  # type: ignore[no-untyped-def]
    agrees = torch.where(u * before > 0, 1.0, 0.0)
    return u * agrees / (fo.leaf_mean(agrees) + eps)


@fo.elementwise
def grams(u, before):  # type: ignore[no-untyped-def]
    return torch.abs(u) * torch.sign(before)


@fo.elementwise(state={"slow": fo.slot("param", evaluate=True)}, final=True)
def lookahead(u, before, p, slow, *, step, every=3, alpha=0.5):  # type: ignore[no-untyped-def]
    syncs = step / every == torch.floor(step / every)
    fast = p + u
    slow = torch.where(syncs, slow + alpha * (fast - slow), slow)
    return torch.where(syncs, slow, fast) - p, slow


@fo.elementwise(state={"mean": fo.zeros})
def blended(u, before, mean, *, decay=0.75):  # type: ignore[no-untyped-def]
    mean = decay * mean + (1 - decay) * before
    return u + 0.5 * mean, mean


def cautiously(tx: Any) -> "ByHand":
    def formula(u: Any, g: Any, p: Any, own: dict[str, Any]) -> Any:
        agrees = (u * g > 0).to(u.dtype)
        return u * agrees / (agrees.mean() + 1e-3)

    return ByHand(tx, formula)


def blending(tx: Any) -> "ByHand":
    def formula(u: Any, g: Any, p: Any, own: dict[str, Any]) -> Any:
        own["mean"] = 0.75 * own.get("mean", 0.0) + 0.25 * g
        return u + 0.5 * own["mean"]

    return ByHand(tx, formula)


def with_slow_weights(tx: Any) -> "ByHand":
    def formula(u: Any, g: Any, p: Any, own: dict[str, Any]) -> Any:
        own["t"], slow = own.get("t", 0) + 1, own.setdefault("slow", p)
        if own["t"] % 3:
            return u
        own["slow"] = slow + 0.5 * (p + u - slow)
        return own["slow"] - p

    return ByHand(tx, formula)


class ByHand:
    """A formula around the updates of a transformation, called by itself, in torch operations."""

    def __init__(self, inner: Any, formula: Callable[..., Any]) -> None:
        self.inner, self.formula = inner, formula

    def init(self, params: Any) -> Any:
        return self.inner.init(params), {k: {} for k in params}

    def update(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, inner = self.inner.update(grads, state[0], params)
        return {k: self.formula(u, grads[k], params[k], state[1][k]) for k, u in updates.items()}, (inner, state[1])


def by_whole_tensors() -> Any:
    @fo.leafwise
    def flipped(u):  # type: ignore[no-untyped-def]
        return -u.flip(0) if u.ndim else -u

    return flipped()


ADAM = fo.scale_by_adam()
LABELS = {"weight": "a", "bias": "b", "scale": "a"}
AROUND: dict[str, tuple[Any, Any]] = {
    "one rule": (cautious(ADAM), cautiously(ADAM)),
    "a chain": (blended(fo.adamw(0.1)), blending(fo.adamw(0.1))),
    "nothing": (blended(fo.identity()), blending(fo.identity())),
    "a masked one": (cautious(fo.masked(ADAM, is_matrix)), cautiously(fo.masked(ADAM, is_matrix))),
    "a partition": (
        blended(fo.partition({"a": fo.trace(0.9), "b": fo.chain(ADAM, fo.scale(0.5))}, LABELS)),
        blending(fo.partition({"a": fo.trace(0.9), "b": fo.chain(ADAM, fo.scale(0.5))}, LABELS)),
    ),
    "an opaque one": (cautious(Halve()), cautiously(Halve())),
    "an opaque one within": (
        blended(fo.chain(fo.trace(0.9), Halve(), fo.scale(-1.0))),
        blending(fo.chain(fo.trace(0.9), Halve(), fo.scale(-1.0))),
    ),
    "whole tensors": (
        blended(fo.chain(fo.trace(0.9), by_whole_tensors())),
        blending(fo.chain(fo.trace(0.9), by_whole_tensors())),
    ),
    "another": (blended(cautious(ADAM)), blending(cautiously(ADAM))),
    "another around an opaque one": (
        blended(fo.chain(fo.scale(2.0), cautious(fo.chain(ADAM, Halve())))),
        blending(fo.chain(fo.scale(2.0), cautiously(fo.chain(ADAM, Halve())))),
    ),
    "a global norm": (
        blended(fo.chain(fo.clip_by_global_norm(0.5), ADAM)),
        blending(fo.chain(fo.clip_by_global_norm(0.5), ADAM)),
    ),
    "the end of a chain": (lookahead(fo.sgd(0.1)), with_slow_weights(fo.sgd(0.1))),
}


def within(tx: Any) -> Any:
    return fo.chain(fo.clip(2.0), tx, fo.scale(0.1))


def reference(tx: Any, params: Any, grads: list[Any]) -> Any:
    parts = [fo.clip(2.0), tx, fo.scale(0.1)]
    states = [part.init(params) for part in parts]
    for updates in grads:
        for k, part in enumerate(parts):
            updates, states[k] = part.update(updates, states[k], params)
        params = fo.apply_updates(params, updates)
    return params


@pytest.mark.filterwarnings("ignore:lookahead stands before")
@pytest.mark.parametrize("name", AROUND)
def test_a_formula_around_a_transformation(name: str) -> None:
    tx, by_hand = AROUND[name]
    first = make_tree(0)
    grads = [like(first, seed) for seed in range(1, STEPS + 1)]
    expected = reference(by_hand, first, grads)

    params, state = train(within(tx), clone(first), grads, donate=True)
    again, _ = train(within(tx), clone(first), grads)
    model = {k: torch.nn.Parameter(p.clone()) for k, p in first.items()}
    opt = TransformOptimizer(list(model.items()), within(tx))
    for g in grads:
        for k, p in model.items():
            p.grad = g[k].clone()
        opt.step()

    torch.testing.assert_close(params, expected, **DOUBLE)
    torch.testing.assert_close(again, expected, **DOUBLE)
    torch.testing.assert_close({k: p.detach() for k, p in model.items()}, expected, **DOUBLE)
    assert len(state[1]) == 2


@fo.elementwise(state={"mu": fo.zeros, "nu": fo.zeros})
def cautious_adam(u, mu, nu, *, step, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, floor=1e-3):  # type: ignore[no-untyped-def]
    mu = b1 * mu + (1 - b1) * u
    nu = b2 * nu + (1 - b2) * u * u
    new = (mu / (1 - b1**step)) / (torch.sqrt(nu / (1 - b2**step) + eps_root) + eps)
    agrees = torch.where(new * u > 0, 1.0, 0.0)
    return new * agrees / (fo.leaf_mean(agrees) + floor), mu, nu


@fo.elementwise(state={"mu": fo.zeros, "nu": fo.zeros})
def plain_adam(u, mu, nu, *, step, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0):  # type: ignore[no-untyped-def]
    mu = b1 * mu + (1 - b1) * u
    nu = b2 * nu + (1 - b2) * u * u
    return (mu / (1 - b1**step)) / (torch.sqrt(nu / (1 - b2**step) + eps_root) + eps), mu, nu


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_rule_that_is_fused_by_hand_to_the_bit(dtype: torch.dtype, backend: str) -> None:
    first = make_tree(0, dtype)
    grads = [{k: x.to(dtype) for k, x in like(first, seed).items()} for seed in range(1, 4)]

    with only(backend):
        wrapped, _ = train(fo.chain(cautious(plain_adam()), fo.scale(-0.1)), clone(first), grads)
        by_hand, _ = train(fo.chain(cautious_adam(), fo.scale(-0.1)), clone(first), grads)

    assert_same_bits(wrapped, by_hand)


def test_it_fuses() -> None:
    params = {"w": torch.zeros(1000)}

    explained, without = fo.explain(grams(fo.adam(1e-3)), params), fo.explain(fo.adam(1e-3), params)

    assert (explained.passes, explained.launches, explained.notes) == (1, 1, ())
    assert explained.bytes_per_element == without.bytes_per_element
    opaque = fo.explain(grams(Halve()), params)
    assert "reads updates, params, updates@0" in str(opaque).replace("\n", " ")
    p = torch.nn.Parameter(torch.zeros(1000))
    assert "updates@" in str(fo.explain(TransformOptimizer([p], grams(Halve()))))


def test_it_is_the_call_that_makes_it() -> None:
    tx = cautious(fo.chain(fo.trace(0.9), fo.scale(-0.1)), eps=0.5)

    assert repr(tx) == "cautious(chain(trace(decay=0.9), scale(step_size=-0.1)), eps=0.5)"
    assert eval(repr(tx), {**vars(fo), "cautious": cautious}) == tx
    assert tx == cautious(inner=fo.chain(fo.trace(0.9), fo.scale(-0.1)), eps=0.5)
    assert hash(tx) == hash(copy.deepcopy(tx))
    assert tx != cautious(fo.chain(fo.trace(0.9), fo.scale(-0.1)))
    assert tx != cautious(fo.trace(0.9), eps=0.5)
    assert pickle.loads(pickle.dumps(tx)) == tx


def test_the_state_is_that_of_both() -> None:
    params = make_tree(0)
    tx = lookahead(fo.adam(0.1))

    params, state = train(tx, params, [like(params, 1)])

    assert [type(s).__name__ for s in (*state[0], state[1])] == ["ScaleByAdamState", "EmptyState", "LookaheadState"]
    assert_same_bits(fo.eval_params(state, params), state[1].slow)
    assert set(fo.slots(tx, state)) == {"mu", "nu", "slow"}
    assert fo.hyperparams(tx, state)["alpha"] == 0.5
    assert_same_bits(pickle.loads(pickle.dumps(state)), state)


def test_options_of_an_optimizer() -> None:
    p, q = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    opt = TransformOptimizer([{"params": [p]}, {"params": [q], "eps": 1.0, "lr": 1.0}], cautious(fo.sgd(0.5)))

    assert {"lr", "eps"} <= set(opt.param_groups[0])
    for x in (p, q):
        x.grad = -torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    opt.step()

    # sgd turns the sign, so nothing agrees
    assert_same_bits([p.detach(), q.detach()], [torch.ones(3, dtype=torch.float64)] * 2)
    other = TransformOptimizer([{"params": [p]}, {"params": [q], "eps": 1.0}], cautious(fo.scale(-1.0)))
    assert "lr" in other.param_groups[0]
    with pytest.raises(ValueError, match=r"`eps` of cautious must be in \[0, inf\)"):
        other.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "eps": -1.0})


@fo.elementwise
def scaled_back(u, before, *, learning_rate=0.5):  # type: ignore[no-untyped-def]
    return -learning_rate * torch.abs(u) * torch.sign(before)


def test_a_schedule_of_its_learning_rate_has_a_factor() -> None:
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt = TransformOptimizer([p], scaled_back(fo.scale(2.0), learning_rate=fo.linear_schedule(1.0, 0.0, 4)))
    opt.param_groups[0]["lr"] = 0.5

    for rate in (1.0, 0.75):
        before = p.detach().clone()
        p.grad = torch.tensor([1.0, -1.0], dtype=torch.float64)
        opt.step()
        assert_same_bits(p.detach(), before - 0.5 * rate * 2.0 * p.grad)


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match="cautious: missing a required argument: 'inner'"):
        cautious()
    with pytest.raises(TypeError, match="expected a gradient transformation"):
        cautious(0.1)
    with pytest.raises(ValueError, match=r"`eps` of cautious must be in \[0, inf\)"):
        cautious(fo.identity(), eps=-1.0)

    def rule(u, before, *, inner=1.0):  # type: ignore[no-untyped-def]
        return u * inner

    with pytest.raises(TypeError, match="rule takes `before`, so it goes around an inner transformation, which is its"):
        fo.elementwise(rule)
    with pytest.raises(TypeError, match="which `leafwise` rules cannot"):
        fo.leafwise(grams_of := lambda u, before: u)
    assert grams_of is not None


def test_a_slot_called_before_is_a_slot() -> None:
    @fo.elementwise(state={"before": fo.zeros})
    def difference(u, before):  # type: ignore[no-untyped-def]
        return u - before, u

    params = make_tree(0)
    updates, _ = difference().update(params, difference().init(params))

    assert_same_bits(updates, params)
