"""Files with the state of opaque transformations: refusals, and states that go on."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.twins import Params, counting, momentum, opaque_momentum, seen
from functional_optim.adapters import TransformOptimizer


def saved() -> tuple[TransformOptimizer, dict[str, Any]]:
    """An optimizer, and its state after two steps, with entries of parameters and of the tree."""

    def update(updates: Params, state: Any, params: Any = None) -> Any:
        return updates, {"m": {k: m + 1 for k, m in state["m"].items()}, "n": state["n"] + 1, "k": state["k"] + 1}

    def init(params: Params) -> Any:
        return {"m": {k: torch.zeros_like(p) for k, p in seen(params).items()}, "n": torch.zeros(()), "k": 0}

    params = {"a": torch.nn.Parameter(torch.ones(2)), "b": torch.nn.Parameter(torch.ones(2, 3))}
    opt = TransformOptimizer(list(params.items()), fo.chain(fo.GradientTransformation(init, update), fo.scale(-0.1)))
    for _ in range(2):
        for p in params.values():
            p.grad = torch.ones_like(p)
        opt.step()
    return opt, copy.deepcopy(opt.state_dict())


REFUSED: dict[str, tuple[Callable[[dict[int, dict[str, Any]]], Any], str]] = {
    "an entry of a parameter is gone": (
        lambda state: state[1].pop("transformation_0.m"),
        "the saved state of 'b' has 'transformation_0:tree.*, expected 'transformation_0.m'",
    ),
    "an entry of the tree is gone": (
        lambda state: [own.pop("transformation_0:tree.n") for own in state.values()],
        "the saved state of 'a' lacks 'transformation_0:tree.n'",
    ),
    "another shape": (
        lambda state: state[1].update({"transformation_0.m": torch.zeros(3, 2)}),
        r"the saved 'transformation_0.m' of 'b' has shape \(3, 2\), but the parameter has \(2, 3\)",
    ),
    "a text": (
        lambda state: state[0].update({"transformation_0.m": "zeros"}),
        "the saved 'transformation_0.m' of 'a' is str 'zeros', expected a tensor",
    ),
    "a number for a tensor": (
        lambda state: state[0].update({"transformation_0.m": 0.0}),
        "the saved 'transformation_0.m' of 'a' is float 0.0, expected a tensor",
    ),
    "a dict for a number": (
        lambda state: state[0].update({"transformation_0:tree.k": {}}),
        "the saved 'transformation_0:tree.k' of 'a' is dict {}, expected one number",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_do_not_fit_are_refused(name: str) -> None:
    change, message = REFUSED[name]
    opt, state = saved()
    before = copy.deepcopy(opt.state_dict())
    change(state["state"])
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    torch.testing.assert_close(opt.state_dict()["state"], before["state"], rtol=0, atol=0)


def test_an_entry_that_update_has_made_none_stays_none() -> None:
    """A step behind a file is the step that there would have been."""

    def update(updates: Params, state: Any, params: Any = None) -> Any:
        used = 1.0 if state["once"] is None else state["once"]
        kept = {k: updates[k] * used * (2.0 if m is None else 1.0) for k, m in state["m"].items()}
        return {**updates, **kept}, {"once": None, "m": dict.fromkeys(kept)}

    def init(params: Params) -> Any:
        return {"once": torch.tensor(10.0), "m": {k: torch.zeros_like(p) for k, p in seen(params).items()}}

    params = {k: torch.nn.Parameter(torch.ones(2)) for k in "ab"}
    tx = fo.chain(fo.GradientTransformation(init, update), fo.scale(-0.1))
    opt = TransformOptimizer(list(params.items()), tx)
    for k in range(4):
        for p in params.values():
            p.grad = torch.ones(2)
        if k == 2:
            file = copy.deepcopy(opt.state_dict())
            opt = TransformOptimizer(list(params.items()), tx)
            opt.load_state_dict(file)
        opt.step()

    # 10 at the first step, 2 at each other
    assert [p.tolist() for p in params.values()] == [pytest.approx([1 - 1.6] * 2, rel=1e-5)] * 2


def test_an_entry_of_the_tree_may_be_with_one_parameter() -> None:
    opt, state = saved()
    del state["state"][0]["transformation_0:tree.n"]
    opt.load_state_dict(state)
    opt.step()

    assert [float(own["transformation_0:tree.n"]) for own in opt.state.values()] == [3.0, 3.0]


def test_a_file_in_which_a_parameter_without_a_step_holds_entries_of_the_tree() -> None:
    """A transformation keeps them with its first parameter, if it sees none that has taken a step."""
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in "ab")
    found: list[int] = []
    tx = fo.chain(
        fo.masked(counting(found), {"a": True, "b": False}), counting([]), opaque_momentum(), momentum(), fo.scale(-0.1)
    )
    opt = TransformOptimizer([("a", a), ("b", b)], tx)
    b.grad = torch.ones(2)
    opt.step()
    file = copy.deepcopy(opt.state_dict())
    opt = TransformOptimizer([("a", a), ("b", b)], tx)
    opt.load_state_dict(file)
    a.grad = torch.ones(2)
    opt.step()

    assert found == [0, 1]
    assert float(opt.state[b]["m"][0]) == 2.0  # 0.5 * 1 + (0.5 * 1 + 1)


@pytest.mark.parametrize("shape", [(1,), ()])
def test_entries_that_grow_go_through_a_file(shape: tuple[int, ...]) -> None:
    """Though their first form is that of a parameter of one number."""

    def update(updates: Params, state: Any, params: Any = None) -> Any:
        return updates, {k: torch.cat([s.reshape(-1), torch.ones(1)]) for k, s in state.items()}

    init = lambda params: {k: torch.zeros_like(p) for k, p in seen(params).items()}  # noqa: E731
    p = torch.nn.Parameter(torch.ones(shape))
    opt = TransformOptimizer([("w", p)], fo.chain(fo.GradientTransformation(init, update), fo.scale(-0.1)))
    for _ in range(3):
        p.grad = torch.ones(shape)
        opt.step()
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))

    assert opt.state[p]["transformation_0"].shape == (4,)


def test_a_key_of_the_state_that_looks_like_one_of_the_tree() -> None:
    init = lambda params: {"m:tree": {k: torch.zeros_like(p) for k, p in seen(params).items()}}  # noqa: E731
    tx = fo.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(4))
    for p in (a, b):
        p.grad = torch.ones_like(p)
    opt = TransformOptimizer([("a", a), ("b", b)], fo.chain(tx, fo.scale(-0.1)))
    opt.step()
    other = TransformOptimizer([("b", b), ("a", a)], fo.chain(tx, fo.scale(-0.1)))
    with pytest.raises(ValueError, match=r"of 'b' has shape \(3,\), but the parameter has \(4,\)"):
        other.load_state_dict(opt.state_dict())


def test_a_file_is_loaded_beside_parameters_that_have_no_shape_yet() -> None:
    def make() -> tuple[list[torch.nn.Parameter], TransformOptimizer]:
        params = [torch.nn.Parameter(torch.ones(2)), *torch.nn.LazyLinear(2).parameters()]
        return params, TransformOptimizer(params, fo.chain(opaque_momentum(), fo.scale(-0.1)))

    (first, *_), opt = make()
    opt.load_state_dict(opt.state_dict())
    file = copy.deepcopy(opt.state_dict())
    file["state"][0] = {"transformation_0": torch.ones(2)}
    opt.load_state_dict(file)

    assert opt.state[first]["transformation_0"].tolist() == [1.0, 1.0]


def test_an_entry_of_the_tree_that_is_set_for_one_parameter_is_refused() -> None:
    opt, _ = saved()
    own = next(iter(opt.state.values()))
    own["transformation_0:tree.n"] = torch.tensor(7.0)
    with pytest.raises(ValueError, match=r"'transformation_0:tree.n' is one for all parameters, but it is tensor\(2"):
        opt.step()
    for own in opt.state.values():
        own["transformation_0:tree.n"] = torch.tensor(7.0)
    opt.step()

    assert [float(own["transformation_0:tree.n"]) for own in opt.state.values()] == [8.0, 8.0]
