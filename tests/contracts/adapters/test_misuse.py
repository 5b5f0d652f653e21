"""Misuse of an optimizer: it goes on rightly, or says what is wrong and changes nothing."""

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.optimizers import vectors
from functional_optim.adapters import SGD, AdamW, TransformOptimizer, load_safetensors, save_safetensors


class Named(torch.nn.Parameter):
    """A class of parameters of somebody's own."""


@fo.stateless
def halved(updates: Any, params: Any) -> Any:
    return {k: None if u is None else u / 2 for k, u in updates.items()}


MAKERS: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: AdamW(params, lr=0.1),
    "a transformation between kernels": lambda params: TransformOptimizer(
        params, fo.chain(fo.scale(2.0), halved, fo.sgd(0.1, momentum=0.9))
    ),
}


@pytest.mark.parametrize("kind", ["one gradient for two", "a class of its own"])
@pytest.mark.parametrize("maker", MAKERS)
def test_shared_gradients_and_parameter_subclasses_step(maker: str, kind: str) -> None:
    """The slow check leaves out the addresses; several steps, because the first ones look at every tensor anew."""
    ours, plain = vectors(), vectors()
    if kind == "a class of its own":
        ours = [Named(p.detach()) for p in ours]
    opt, twin = MAKERS[maker](ours), MAKERS[maker](plain)
    for step in range(5):
        for k, (p, q) in enumerate(zip(ours, plain, strict=True)):
            p.grad = torch.full_like(p, 1.0 + step, requires_grad=False).as_subclass(torch.Tensor)
            q.grad = torch.full_like(q, 1.0 + step)
            if kind == "one gradient for two" and k:
                p.grad = ours[0].grad
        opt.step()
        twin.step()
    for p, q in zip(ours, plain, strict=True):
        assert torch.equal(p.detach().as_subclass(torch.Tensor), q.detach())


@pytest.mark.parametrize("donate", [False, True])
def test_one_gradient_for_two_parameters_in_the_pure_api(donate: bool) -> None:
    tx = fo.sgd(0.5, momentum=0.5)
    params = [torch.zeros(16), torch.zeros(16)]
    state = tx.init(params)
    for _ in range(4):
        g = torch.ones(16)
        params, state = fo.apply_gradients(tx, params, [g, g], state, donate=donate)
    assert torch.equal(params[0], params[1])
    assert params[0][0] == -0.5 * (1 + 1.5 + 1.75 + 1.875)


def test_a_first_step_that_overflowed_for_one_parameter_is_still_to_come() -> None:
    a, b = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    opt = SGD([a, b], lr=1.0, momentum=0.5, dampening=0.5, fused=True)
    for found, grads in ((1.0, (1, 1)), (0.0, (1, None)), (0.0, (1, 1))):
        for p, g in zip((a, b), grads, strict=True):
            p.grad = None if g is None else torch.ones(4)
        opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(found)  # type: ignore[attr-defined]
        opt.step()
    assert b.tolist() == [-1.0] * 4  # not dampened
    assert a.tolist() == [-2.0] * 4  # 1, then 0.5 + 0.5


def test_a_step_that_overflowed_leaves_no_state_to_copy() -> None:
    p = torch.nn.Parameter(torch.zeros(4))
    opt = SGD([p], lr=1.0, momentum=0.5, dampening=0.5, fused=True)
    p.grad = torch.full((4,), torch.inf)
    opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(1.0)  # type: ignore[attr-defined]
    opt.step()
    assert not opt.state


def test_names_follow_their_parameters() -> None:
    ps = dict(zip("abcd", vectors(4), strict=True))
    tx = fo.chain(fo.sgd(1.0), fo.masked(fo.set_to_zero(), re.compile("c")))
    groups: list[dict[str, Any]] = [{"params": [(k, ps[k]) for k in pair]} for pair in ("ab", "cd")]
    opt = TransformOptimizer(groups, tx)

    def moved() -> list[str]:
        before = {k: p.detach().clone() for k, p in ps.items()}
        for p in ps.values():
            p.grad = torch.ones_like(p)
        opt.step()
        return [k for k, p in ps.items() if not torch.equal(p, before[k])]

    assert moved() == ["a", "b", "d"]
    first, second = opt.param_groups
    first["param_names"], second["param_names"] = ["a", "c"], ["b", "d"]
    assert moved() == ["a", "c", "d"]  # the parameter b is called c now
    first["params"].append(second["params"].pop())
    with pytest.raises(ValueError, match="group 0 has 3 params but 2 param_names"):
        opt.step()


def test_safetensors_keys_that_look_alike(tmp_path: Path) -> None:
    state = {"b.c": torch.ones(2), "b": {"c": torch.zeros(2)}, 1: torch.full((2,), 2.0), "1": torch.full((2,), 3.0)}
    save_safetensors(state, tmp_path / "state.safetensors")  # type: ignore[arg-type]
    loaded: Any = load_safetensors(tmp_path / "state.safetensors")
    assert [loaded["b.c"][0], loaded["b"]["c"][0], loaded[1][0], loaded["1"][0]] == [1, 0, 2, 3]


def test_momentum_that_is_a_tensor_may_be_switched_off() -> None:
    ours, theirs = vectors(1), vectors(1)
    a, b = SGD(ours, lr=0.1, momentum=0.5, fused=True), torch.optim.SGD(theirs, lr=0.1, momentum=0.5)
    for momentum in (0.5, 0.0, 0.5, 0.5):
        for opt, [p] in ((a, ours), (b, theirs)):
            opt.param_groups[0]["momentum"] = torch.tensor(momentum, dtype=torch.float64)
            p.grad = torch.ones_like(p)
            opt.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-15, atol=1e-15)  # a few roundings in double precision


def test_averaged_params_refuses_to_nest() -> None:
    [p] = vectors(1)
    opt = TransformOptimizer([p], fo.chain(fo.sgd(0.1), fo.params_ema(0.5)))
    p.grad = torch.ones_like(p)
    opt.step()
    before = p.detach().clone()
    with opt.averaged_params():
        with pytest.raises(RuntimeError, match="called inside itself"), opt.averaged_params():
            pass
        with pytest.raises(RuntimeError, match="step was called inside"):
            opt.step()
    assert torch.equal(p, before)


class Mine(TransformOptimizer.factory(fo.lion)):  # type: ignore[misc]
    """A class of somebody's own, made of one that was made."""


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_optimizer_copies_have_its_class(copied: Callable[[Any], Any]) -> None:
    [p] = vectors(1)
    for cls in (Mine, TransformOptimizer.factory(fo.lion)):
        opt = cls([p], lr=0.1)
        p.grad = torch.ones_like(p)
        opt.step()
        twin = copied(opt)
        assert type(twin) is cls
        assert twin.param_groups[0]["b1"] == opt.param_groups[0]["b1"]
        [q] = twin.param_groups[0]["params"]
        q.grad = torch.ones_like(q)
        twin.step()
        opt.step()
        assert torch.equal(p, q)


def test_names_that_occur_twice_match_nothing() -> None:
    layers = [torch.nn.Linear(2, 2) for _ in range(2)]
    opt = AdamW([{"params": list(layer.named_parameters())} for layer in layers])
    with pytest.raises(ValueError, match="this optimizer has 'weight' twice"):
        opt.load_state_dict(opt.state_dict(), by_name=True)


def test_a_chain_that_differs_in_what_is_not_made_of_rules() -> None:
    [p] = vectors(1)
    a = TransformOptimizer([p], fo.chain(halved, fo.sgd(0.1)))
    b = TransformOptimizer([p], fo.chain(fo.sgd(0.1)))
    with pytest.raises(ValueError, match="the state was saved by another chain"):
        b.load_state_dict(a.state_dict())


def test_a_gradient_that_is_its_parameter() -> None:
    [p] = vectors(1)
    opt = SGD([p], lr=0.1)
    p.grad = p.detach()
    with pytest.raises(ValueError, match="share memory, so a step, which writes in place, would corrupt them"):
        opt.step()


@pytest.mark.parametrize("named", [False, True])
def test_a_mask_that_matches_no_parameter_is_warned_of_once(named: bool) -> None:
    model = torch.nn.Linear(2, 2)
    mask = "wieght" if named else "weight"
    opt = TransformOptimizer(
        model.named_parameters() if named else model.parameters(), fo.adamw(0.1, weight_decay=0.5, mask=mask)
    )
    model(torch.ones(1, 2)).sum().backward()

    with pytest.warns(UserWarning, match=f"the mask .*{mask}.* matches no parameter; there are ") as caught:
        opt.step()
    opt.step()

    assert len(caught) == 1
    assert ("weight" if named else "param_groups[0].params[0]") in str(caught[0].message).partition("there are")[2]


class MainGrad(torch.Tensor):
    """Its gradient is somewhere else, as some libraries for large models have it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.grad.__get__:  # type: ignore[attr-defined]
            return args[0].__dict__.get("main_grad")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_parameter_class_with_its_own_grad_attribute() -> None:
    p = torch.ones(3).as_subclass(MainGrad).requires_grad_()
    p.__dict__["main_grad"] = torch.ones(3)

    SGD([p], lr=0.5).step()

    assert p.detach().tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("what", ["parameter", "gradient"])
@pytest.mark.parametrize("offset", [0, 8])
def test_freed_storage_of_params_or_gradients_is_refused(offset: int, what: str, steps: int) -> None:
    flat = {"parameter": torch.ones(16), "gradient": torch.ones(16)}
    p = torch.nn.Parameter(flat["parameter"][offset : offset + 8])
    p.grad = flat["gradient"][offset : offset + 8]
    opt = SGD([p, torch.nn.Parameter(torch.ones(2))], lr=0.5)
    for _ in range(steps):
        opt.step()
    flat[what].untyped_storage().resize_(0)

    with pytest.raises(ValueError, match=r"of shape \(8,\) has no memory: its storage has been freed"):
        opt.step()


@pytest.mark.parametrize("steps", [0, 4])
def test_a_gradient_that_is_zero_and_has_no_memory(steps: int) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    opt = SGD([p], lr=0.5, momentum=0.5)
    for _ in range(steps):
        p.grad = torch.zeros(3)
        opt.step()
    p.grad = torch._efficientzerotensor((3,))

    opt.step()

    p.grad = torch.ones(3)
    opt.step()
    assert p.detach().tolist() == [0.5, 0.5, 0.5]


def test_options_changed_while_other_params_have_gradients() -> None:
    """Options that are remembered belong to the parameters that took part then."""
    ours, theirs = [[torch.nn.Parameter(torch.ones(16)) for _ in range(4)] for _ in range(2)]
    opts = [
        cls([{"params": ps[:2], "lr": 0.1}, {"params": ps[2:], "lr": 0.2}])
        for cls, ps in ((AdamW, ours), (torch.optim.AdamW, theirs))
    ]
    for step in range(40):
        for opt, ps in zip(opts, (ours, theirs), strict=True):
            if step % 7 == 3:
                opt.param_groups[step % 2]["lr"] = 0.01 * step
            if step % 11 == 5:
                opt.param_groups[1]["betas"] = (0.5 + 0.01 * step, 0.9)
            for k, p in enumerate(ps):
                p.grad = None if (step // 2) % 3 == 1 and k % 2 else torch.full((16,), 1.0 + 0.1 * k - 0.05 * step)
            opt.step()
    # a stale rate would be off by tenths; 40 steps of at most 0.2, each of which differs by some ulp
    torch.testing.assert_close(ours, theirs, rtol=0, atol=40 * 0.2 * 2**-20)


@pytest.mark.parametrize("bad", [{0}, {0, 1}, {3}, {3, 4}], ids=str)
@pytest.mark.parametrize("at_end", [False, True])
def test_updates_of_a_transformation_that_do_not_fit_at_some_steps(bad: set[int], at_end: bool) -> None:
    """They are refused at each of these steps, which change nothing; the others are those of a run without them."""
    calls = iter(range(100))

    def cut(updates: Any, params: Any) -> Any:
        return {k: u[:2] for k, u in updates.items()} if next(calls) in bad else updates

    rules = (fo.trace(0.9), fo.stateless(cut)) if at_end else (fo.trace(0.9), fo.stateless(cut), fo.scale(-0.1))
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = TransformOptimizer([p], fo.chain(*rules))
    other = TransformOptimizer([q], fo.chain(*(rule for rule in rules if rule is not rules[1])))
    for step in range(8):
        p.grad = torch.full((3,), 1.0 + step)
        q.grad = p.grad.clone()
        if step in bad:
            with pytest.raises(ValueError, match=r"the update that .* returned at .* has shape \(2,\)"):
                optimizer.step()
        else:
            optimizer.step()
            other.step()
        assert torch.equal(p, q)
