"""Steps of ensembles on a device, against a stand-in: kernels, uploads, numbers that stay there, capture."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.func import vmap

import functional_optim as fo
from _lib.compare import assert_same_bits
from _lib.marks import INTERPRETER
from _lib.stand_in import StandIn, _Kernel, replay
from functional_optim._compiler.cache import BuildError
from functional_optim._runtime.cuda import launch
from functional_optim._runtime.members import MembersStep
from functional_optim._runtime.programs import Programs
from functional_optim._stand_ins import _stand_in


pytestmark = [INTERPRETER, pytest.mark.triton]

N = 3
SHAPES: dict[str, tuple[int, ...]] = {"weight": (4, 3), "bias": (3,), "gain": (), "none": (0, 2)}
RATES = torch.tensor([0.1, 0.02, 3e-3], dtype=torch.float64)
CHAINS: dict[str, Callable[[Any], fo.GradientTransformation]] = {
    "elements alone": lambda x: fo.adamw(x),
    "a norm of the tree": lambda x: fo.chain(fo.clip_by_global_norm(x), fo.adamw(x, weight_decay=0.1)),
    "a norm of each leaf": lambda x: fo.lamb(x, weight_decay=0.1),
    "two programs and a norm": lambda x: fo.chain(
        fo.clip_by_global_norm(1.0), fo.masked(fo.trace(0.9), lambda path, p: p.ndim > 1), fo.sgd(x)
    ),
    "in a schedule": lambda x: fo.sgd(fo.cosine_decay_schedule(x, 5), 0.9),
}


@pytest.fixture(autouse=True)
def _bound_anew() -> None:
    """Bound steps are shared by equal chains of other tests, and keep the stand-in that they were bound to."""
    _stand_in.cache_clear()


def draw(seed: int, layout: str = "contiguous") -> dict[str, torch.Tensor]:
    """The leaves of all members."""
    generator = torch.Generator().manual_seed(seed)
    tree = {k: torch.randn((N, *s), generator=generator) for k, s in SHAPES.items()}
    if layout == "transposed":
        tree["weight"] = tree["weight"].transpose(0, 2).contiguous().transpose(0, 2)
    return tree


def member(tree: Any, k: int) -> Any:
    return {name: x[k].clone() for name, x in tree.items()}


def bound(tx: Any) -> list[MembersStep]:
    """The steps of ensembles that a chain is bound to."""
    return [step for trees in tx._tree_steps for segment in trees.segments for _, step in segment.members_steps]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "packed"])
@pytest.mark.parametrize("rates", ["rate of each", "rate of all"])
@pytest.mark.parametrize("name", CHAINS)
def test_members_step_as_they_do_alone(device: StandIn, name: str, rates: str, layout: str) -> None:
    make, own = CHAINS[name], RATES if rates == "rate of each" else RATES[:1].expand(N)
    form: Any = fo.pack if layout == "packed" else dict
    alone = []
    for k in range(N):
        tx, params = make(own[k]), member(draw(0), k)
        state = tx.init(params)
        for t in range(3):
            params, state = fo.apply_gradients(tx, params, member(draw(t + 1), k), state)
        alone.append(params)
    dims, given = (None, 0, 0, 0) if rates == "rate of all" else (0, 0, 0, 0), own if len(own.unique()) > 1 else own[0]
    params = vmap(form)(draw(0, layout))
    state = vmap(lambda x, p: make(x).init(p), dims[:2])(given, params)
    step = vmap(lambda x, p, g, s: fo.apply_gradients(make(x), p, g, s), dims)
    with mock.patch.object(Programs, "evaluate_reference", side_effect=AssertionError("by operations of torch")):
        for t in range(3):
            params, state = step(given, params, vmap(form)(draw(t + 1, layout)), state)

    found = vmap(fo.unpack)(params) if layout == "packed" else params
    assert_same_bits(dict(found), {name: torch.stack([p[name] for p in alone]) for name in SHAPES})


@pytest.mark.parametrize(("name", "kernels"), [("elements alone", 2), ("a norm of the tree", 3 * N)])
def test_a_step_is_one_upload_and_a_copy_for_each_number(device: StandIn, name: str, kernels: int) -> None:
    """Numbers are read where they are, those of all members by one copy, and the host waits for none of them."""
    launched: list[str] = []
    bind = _Kernel.bind

    def counted(self: _Kernel, programs: int, arguments: Any) -> Any:
        call = bind(self, programs, arguments)
        return lambda: (launched.append("kernel"), call())

    params, make = draw(0), CHAINS[name]
    state = vmap(lambda x, p: make(x).init(p))(RATES, params)
    step = vmap(lambda x, p, g, s: fo.apply_gradients(make(x), p, g, s))
    with mock.patch.object(_Kernel, "bind", counted):
        for _ in range(2):
            params, state = step(RATES, params, params, state)
        device.copies.clear()
        launched.clear()
        waits = AssertionError("the host reads a number")
        with mock.patch.multiple(torch.Tensor, tolist=mock.Mock(side_effect=waits), item=mock.Mock(side_effect=waits)):
            params, state = step(RATES, params, params, state)
    upload, *numbers = device.copies
    assert len(launched) == kernels
    assert upload > 3 * N * len(SHAPES), "addresses of gradients, moments and parameters"
    assert set(numbers) == {N}
    assert len(numbers) <= 3


@pytest.mark.parametrize("name", ["elements alone", "a norm of the tree"])
def test_a_captured_step_of_members_goes_on_at_each_replay(device: StandIn, name: str) -> None:
    """Each replay reads the rates that are there by then."""
    make = CHAINS[name]
    step = vmap(lambda x, p, g, s: fo.apply_gradients(make(x), p, g, s))
    rates, params, grads = RATES.clone(), draw(0), draw(1)
    state = vmap(lambda x, p: make(x).init(p))(rates, params)
    for _ in range(2):
        params, state = step(rates, params, grads, state)
    with device.capture() as graph:
        captured = step(rates, params, grads, state)
    for factor in (1.0, 0.5):
        rates.copy_(factor * RATES)
        grads["weight"].copy_(draw(2)["weight"] * factor)
        replay(graph)
        assert_same_bits(captured, step(rates, params, grads, state))


def test_kernels_for_other_addresses_that_cannot_be_built(device: StandIn, all_enabled: None) -> None:
    """Addresses that are no multiples of 16 have kernels of their own; operations of torch take their place."""
    tx = fo.sgd(0.5, 0.9)
    aligned = torch.ones(N, 4)
    step = vmap(lambda p, s: fo.apply_gradients(tx, p, p, s))
    state = vmap(tx.init)(aligned)
    for _ in range(2):
        step(aligned, state)
    assert len(bound(tx)) == 1
    apart = torch.ones(N * 4 + 1)[1:].reshape(N, 4)
    with mock.patch.object(launch, "load_kernels", side_effect=BuildError("no compiler")):
        with pytest.warns(UserWarning, match="no compiler"):
            new, _ = step(apart, state)
        again, _ = step(apart, state)
        with device.capture():  # operations of torch need no step before
            step(apart, state)
    for found in (new, again):
        torch.testing.assert_close(found, aligned / 2)


def test_a_first_step_of_members_is_refused_while_capturing(device: StandIn) -> None:
    tx, params = fo.adam(0.1), draw(0)
    state = vmap(tx.init)(params)
    with pytest.raises(RuntimeError, match="the first one over these tensors"), device.capture():
        vmap(lambda p, s: fo.apply_gradients(tx, p, p, s))(params, state)
