"""Entries of an opaque state that are one for all parameters, and values that a state starts from."""

import copy
import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.twins import Params, counting, seen
from functional_optim.adapters import TransformOptimizer


def clear_first(opt: TransformOptimizer, params: Mapping[str, torch.nn.Parameter]) -> TransformOptimizer:
    opt.state.pop(next(iter(opt.state)))
    return opt


def remove_first_group(opt: TransformOptimizer, params: Mapping[str, torch.nn.Parameter]) -> TransformOptimizer:
    for p in opt.param_groups.pop(0)["params"]:
        opt.state.pop(p, None)
    return opt


def made_anew(order: str, **how: Any) -> Callable[..., TransformOptimizer]:
    """An optimizer over the same parameters in an order, and others, with the state of one before it."""

    def make(opt: TransformOptimizer, params: Mapping[str, torch.nn.Parameter]) -> TransformOptimizer:
        new = torch.nn.Parameter(torch.ones(2))
        new.grad = torch.ones(2)
        made = TransformOptimizer([{"params": [(k, params.get(k, new))]} for k in order], fo.chain(*opt.tx.members))  # type: ignore[attr-defined]
        made.load_state_dict(copy.deepcopy(opt.state_dict()), by_name=True, **how)
        return made

    return make


@pytest.mark.parametrize("absent", ["", "a", "b"])
@pytest.mark.parametrize(
    "change",
    [clear_first, remove_first_group, made_anew("ab"), made_anew("ba"), made_anew("xba", strict=False)],
    ids=["one cleared", "a group removed", "a file", "another order", "a new one in front"],
)
def test_counters_of_the_tree_go_on(change: Callable[..., TransformOptimizer], absent: str) -> None:
    found: list[int] = []
    params = {k: torch.nn.Parameter(torch.ones(2)) for k in "ab"}
    for p in params.values():
        p.grad = torch.ones(2)
    tx = fo.chain(counting(found), fo.scale(-0.1))
    opt = TransformOptimizer([{"params": [(k, p)]} for k, p in params.items()], tx)
    opt.tx = tx  # type: ignore[attr-defined]
    for k in range(3):
        for name, p in params.items():  # the first or the second takes no step at first, or at last
            p.grad = None if name == absent and k == 1 else torch.ones(2)
        opt.step()
    opt = change(opt, params)
    for _ in range(3):
        opt.step()
    assert found == [0, 1, 2, 3, 4, 5]


def test_entries_of_the_tree_are_one_tensor() -> None:
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    opt = TransformOptimizer(params, fo.chain(counting([]), fo.scale(-0.1)))
    for p in params:
        p.grad = torch.ones(2)
    opt.step()
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))

    assert len({id(x) for own in opt.state.values() for x in own.values()}) == 1


def test_a_counter_of_the_tree_goes_on_when_a_group_comes_back() -> None:
    found: list[int] = []
    params = {k: torch.nn.Parameter(torch.ones(2)) for k in "ab"}
    for p in params.values():
        p.grad = torch.ones(2)
    groups = [{"params": [(k, p)]} for k, p in params.items()]
    opt = TransformOptimizer(groups, fo.chain(counting(found), fo.scale(-0.1)))
    for k in range(9):
        if k == 2:
            away = opt.param_groups.pop(0)
        elif k == 7:
            opt.param_groups.insert(0, away)
        opt.step()

    assert found == list(range(9))
    assert [float(own["transformation_0:tree.n"]) for own in opt.state.values()] == [9.0, 9.0]


# -- first values -----------------------------------------------------------------------------------------------------


def anchored(found: list[float]) -> fo.GradientTransformation:
    """Keeps the parameters of its start, and notes the first number of one."""

    def update(updates: Params, state: Any, params: Any = None) -> Any:
        found.append(float(state["w"].flatten()[0]))
        return updates, state

    return fo.GradientTransformation(lambda ps: {k: p.detach().clone() for k, p in seen(ps).items()}, update)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("sets", [1, 2])
def test_a_state_that_starts_anew_starts_from_the_parameters_of_now(sets: int, loaded: bool) -> None:
    found: list[float] = []
    w, v = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    make = lambda: TransformOptimizer([("w", w), ("v", v)], fo.chain(anchored(found), fo.scale(1.0)))  # noqa: E731
    opt = make()
    for k in range(6):
        w.grad, v.grad = torch.ones(1), None if sets == 2 and k % 2 else torch.ones(1)
        opt.step()
        if loaded and k == 0:
            saved, opt = copy.deepcopy(opt.state_dict()), make()
            opt.load_state_dict(saved)
    assert found == [1.0] * 6
    opt.state.clear()
    opt.step()
    assert found[-1] == 7.0


def test_first_values_are_not_kept() -> None:
    """Of all tensors that `init` has made, those in the state of the optimizer are left."""
    made: list[weakref.ref[torch.Tensor]] = []

    def init(params: Params) -> Any:
        state = {k: torch.zeros_like(p) for k, p in seen(params).items()}
        made.extend(map(weakref.ref, state.values()))
        return state

    params = {k: torch.nn.Parameter(torch.ones(2)) for k in "abcd"}
    keep = fo.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
    opt = TransformOptimizer(list(params.items()), fo.chain(keep, fo.scale(-0.1)))
    for missing in ("", "a", "b", "ab", "c", "bd"):
        for k, p in params.items():
            p.grad = None if k in missing else torch.ones(2)
        opt.step()
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.step()
    kept = {id(x) for own in opt.state.values() for x in own.values()}
    gc.collect()

    assert [x for ref in made if (x := ref()) is not None and id(x) not in kept] == []
