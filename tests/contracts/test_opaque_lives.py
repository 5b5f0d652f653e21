"""Opaque transformations in the lives of optimizers: they go the way of rules with the same formula.

Groups with switches of their own, other orders, files, restarts, parameters that come and go.
"""

import copy
import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.twins import Params, by_norm, doubled, kept, momentum, opaque_by_norm, opaque_momentum, seen
from functional_optim import adapters
from functional_optim.adapters import TransformOptimizer


STEPS = 20


@fo.elementwise(state={"total": fo.slot(0.0)})
def and_entered(u: Any, before: Any, total: Any) -> Any:
    """A sum of the updates that entered the transformations inside, and those that left them."""
    total = total + before
    return u + 0.1 * total, total


class Life:
    """An optimizer over two groups of two parameters, in float64, with an entry of a log for each step.

    Args:
      tx: the chain.
      **options: options of the second group.
    """

    def __init__(self, tx: fo.GradientTransformation, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tx, self.options = tx, options
        draw = lambda *shape: torch.nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))  # noqa: E731
        self.params = {"a": draw(3, 2), "b": draw(3), "c": draw(2, 2), "d": draw(4)}
        self.opt = self.make(("ab", "cd"))

    def make(self, groups: Iterable[str]) -> TransformOptimizer:
        """An optimizer over groups of parameters."""
        made = [{"params": [(k, self.params[k]) for k in names]} for names in groups]
        made[1] |= self.options
        return TransformOptimizer(made, self.tx)

    def run(self, event: Callable[["Life", int], None]) -> list[torch.Tensor]:
        """All parameters, after steps with events before them."""
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(1 + step)
            for p in self.params.values():
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            event(self, step)
            self.opt.step()
        return [p.detach() for p in self.params.values()]


def flip(option: str, group: int, value: Any) -> Callable[[Life, int], None]:
    """An option of a group that changes before the sixth step, and back before the eleventh."""

    def event(life: Life, step: int) -> None:
        if step == 5:
            life.before = life.opt.param_groups[group][option]  # type: ignore[attr-defined]
            life.opt.param_groups[group][option] = value
        elif step == 10:
            life.opt.param_groups[group][option] = life.before  # type: ignore[attr-defined]

    return event


def reverse(life: Life, step: int) -> None:
    if step == 5:
        life.opt.param_groups.reverse()


def load_in_another_order(life: Life, step: int) -> None:
    if step in (5, 10):
        saved = copy.deepcopy(life.opt.state_dict())
        life.opt = life.make(("dc", "ba") if step == 5 else ("ba", "cd"))
        life.opt.load_state_dict(saved, by_name=True)


def add_late(life: Life, step: int) -> None:
    if step == 0:
        life.opt.param_groups.pop(0)
    elif step == 5:
        life.opt.add_param_group({"params": [(k, life.params[k]) for k in "ab"]})


def some_absent(life: Life, step: int) -> None:
    for k, name in enumerate("abcd"):
        if step % 4 == k:
            life.params[name].grad = None


def remove_first(life: Life, step: int) -> None:
    if step == 10:
        for p in life.opt.param_groups.pop(0)["params"]:
            del life.opt.state[p]


def restart_one(life: Life, step: int) -> None:
    if step == 10:
        del life.opt.state[life.params["a"]]


def copied(life: Life, step: int) -> None:
    if step == 5:
        grads = {k: p.grad for k, p in life.params.items()}  # which copies of parameters lack
        life.opt, life.params = copy.deepcopy((life.opt, life.params))
        for k, p in life.params.items():
            p.grad = grads[k]


EVENTS: dict[str, Callable[[Life, int], None]] = {
    "none": lambda life, step: None,
    "maximize": flip("maximize", 0, True),
    "maximize, second group": flip("maximize", 1, True),
    "a switch": flip("nesterov", 0, True),
    "a switch, second group": flip("nesterov", 1, True),
    "groups in another order": reverse,
    "a file in another order": load_in_another_order,
    "a group that comes late": add_late,
    "gradients that are absent": some_absent,
    "a group that goes": remove_first,
    "one that restarts": restart_one,
    "a copy": copied,
}
TRACE = fo.trace(0.5, nesterov=False)
CHAINS: dict[str, Callable[[Any, Any], fo.GradientTransformation]] = {
    "alone": lambda sums, norm: fo.chain(sums, fo.scale(-0.1)),
    "with a switch": lambda sums, norm: fo.chain(sums, TRACE, fo.scale(-0.1)),
    "behind a switch": lambda sums, norm: fo.chain(TRACE, sums, fo.scale(-0.1)),
    "of the tree": lambda sums, norm: fo.chain(TRACE, norm, fo.scale(-0.1)),
    "two": lambda sums, norm: fo.chain(TRACE, sums, fo.ema(0.2), norm, fo.scale(-0.1)),
    "behind a partition": lambda sums, norm: fo.chain(
        fo.partition(
            {"x": fo.chain(fo.scale(2.0), fo.scale(0.7)), "y": fo.trace(0.5)},
            lambda path, p: "x" if path == "a" else "y",
        ),
        sums,
        fo.scale(-0.1),
    ),
    "masked": lambda sums, norm: fo.chain(TRACE, fo.masked(fo.chain(norm, sums), "a|c|d"), fo.scale(-0.1)),
    "inside a rule": lambda sums, norm: fo.chain(and_entered(fo.chain(TRACE, sums, norm)), fo.scale(-0.1)),
}


OPTIONS: dict[str, dict[str, Any]] = {"alike": {}, "maximize": {"maximize": True}, "nesterov": {"nesterov": True}}
WITHOUT_SWITCH = {"alone", "behind a partition"}
LIVES = [
    (chain, options, event)
    for chain in CHAINS
    for options in OPTIONS
    for event in EVENTS
    if chain not in WITHOUT_SWITCH or not (options == "nesterov" or "switch" in event)
]


@pytest.mark.parametrize(("chain", "options", "event"), LIVES)
def test_it_goes_the_way_of_a_rule(chain: str, options: str, event: str) -> None:
    ways = [CHAINS[chain](momentum(), by_norm()), CHAINS[chain](opaque_momentum(), opaque_by_norm())]

    expected, found = (Life(tx, **OPTIONS[options]).run(EVENTS[event]) for tx in ways)

    # a norm adds up in another order
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_lbfgs_over_groups_with_switches() -> None:
    """Where a decay is 0, both forms of momentum are one."""
    matrix = torch.diag(torch.arange(1.0, 18.0, dtype=torch.float64))

    def descend(life: Life, step: int) -> None:
        x = torch.cat([p.detach().flatten() for p in life.params.values()])
        for p, g in zip(life.params.values(), (matrix @ x).split([6, 3, 4, 4]), strict=True):
            p.grad = g.view_as(p)

    tx = fo.chain(fo.trace(0.0, nesterov=False), fo.scale_by_lbfgs(memory_size=3), fo.scale(-0.3))
    expected, found = Life(tx).run(descend), Life(tx, nesterov=True).run(descend)

    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# -- entries of the tree ----------------------------------------------------------------------------------------------


def counting(found: list[int]) -> fo.GradientTransformation:
    """Notes how many steps it has taken."""

    def update(updates: Params, state: Any, params: Any = None) -> Any:
        found.append(int(state["n"]))
        return updates, {"n": state["n"] + 1}

    return fo.GradientTransformation(lambda params: {"n": torch.zeros(())}, update)


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


# -- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["mv", "vm", "mvwn", "vnmw"])
def test_entries_of_some_parameters_only(order: str) -> None:
    """A form does not depend on which parameter comes first."""
    init = lambda params: {k: torch.zeros_like(p) for k, p in seen(params).items() if p.ndim == 1}  # noqa: E731

    def update(updates: Params, state: Any, params: Any = None) -> Any:
        new = {k: s + updates[k] for k, s in state.items()}
        return {**updates, **new}, new

    shapes = {"m": (2, 2), "v": (2,), "w": (3, 1), "n": (4,)}
    params = {k: torch.nn.Parameter(torch.zeros(shapes[k])) for k in order}
    opt = TransformOptimizer(list(params.items()), fo.chain(fo.GradientTransformation(init, update), fo.scale(-1.0)))
    for _ in range(3):
        for p in params.values():
            p.grad = torch.ones_like(p)
        opt.step()

    assert {k for k, p in params.items() if "transformation_0" in opt.state.get(p, {})} == {*order} & {*"vn"}
    assert {k: p.flatten()[0].item() for k, p in params.items()} == {k: -6.0 if k in "vn" else -3.0 for k in order}


def test_dicts_of_another_class_are_the_same_structure() -> None:
    def update(updates: Params, state: Any, params: Any = None) -> Any:
        return updates, OrderedDict((k, state[k] + x) for k, x in reversed(list(seen(updates).items())))

    init = lambda params: {k: torch.zeros_like(p) for k, p in seen(params).items()}  # noqa: E731
    params = {"a": torch.nn.Parameter(torch.zeros(1)), "b": torch.nn.Parameter(torch.zeros(2))}
    opt = TransformOptimizer(list(params.items()), fo.chain(fo.GradientTransformation(init, update), fo.scale(-1.0)))
    for p in params.values():
        p.grad = torch.ones_like(p)
    for _ in range(2):
        opt.step()

    assert {k: opt.state[p]["transformation_0"].tolist() for k, p in params.items()} == {"a": [2.0], "b": [2.0, 2.0]}


def test_a_state_with_tensors_for_keys_is_refused() -> None:
    params = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    keep = fo.GradientTransformation(
        lambda tree: {p: torch.zeros(()) for p in seen(tree).values()},
        lambda updates, state, params=None: (updates, state),
    )
    opt = TransformOptimizer(params, fo.chain(keep, fo.scale(-1.0)))
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"has tensors for keys, so it cannot be split .* in a dict by its name"):
        opt.step()


def test_derivatives_go_through_a_state_that_is_the_gradient() -> None:
    """The state of a step is the gradient of the one before, whose memory the caller may write to."""
    delayed = fo.GradientTransformation(
        lambda params: {k: torch.zeros_like(p) for k, p in seen(params).items()},
        lambda updates, state, params=None: (state, dict(updates)),
    )

    @fo.elementwise(state={"last": fo.slot(0.0)})
    def delayed_rule(u: Any, last: Any) -> Any:
        return last, u

    found = []
    for tx in (delayed, delayed_rule()):
        m = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        start = torch.ones(2, dtype=torch.float64, requires_grad=True)
        x = start.clone()
        opt = TransformOptimizer([("x", x)], fo.chain(tx, fo.scale(-0.2)), differentiable=True)
        for _ in range(3):
            x.grad = m + x
            opt.step()
        found.append(torch.autograd.grad(x.sum(), [m, start]))

    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


# -- memory that is shared --------------------------------------------------------------------------------------------


@fo.elementwise(state={"d": fo.slot(1.0, per="tree")})
def per_tree(u: Any, d: Any) -> Any:
    """Counts in a slot of the tree."""
    return u * d, d + 1.0


@pytest.mark.parametrize("tx", [counting([]), per_tree(), opaque_by_norm()], ids=["opaque", "a slot", "a norm"])
def test_parameters_of_one_memory_are_refused_where_a_step_is_of_all(tx: fo.GradientTransformation) -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    params[1].data = params[0].data
    for p in params:
        p.grad = torch.ones(3)
    opt = TransformOptimizer([(f"w{k}", p) for k, p in enumerate(params)], fo.chain(tx, fo.scale(-0.1)))
    with pytest.raises(ValueError, match=r"'w0'.*'w1'.*memory|'w1'.*'w0'.*memory"):
        opt.step()
    assert not opt.state
    assert [p.tolist() for p in params] == [[1.0] * 3] * 3


TWICE = ["SGD", "AdamW", "Adam", "NAdam", "RAdam", "Rprop", "RMSprop", "Adagrad", "Adamax", "Adadelta", "ASGD"]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("name", TWICE)
def test_a_parameter_that_is_twice_in_a_group_takes_two_steps(name: str) -> None:
    found = []
    for library in (adapters, torch.optim):
        w = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        foreach = {} if library is adapters else {"foreach": False}
        opt = getattr(library, name)([{"params": [w, w]}], lr=0.1, **foreach)
        for k in range(STEPS):
            w.grad = torch.full((2,), 1.0 + k, dtype=torch.float64)
            opt.step()
        found.append((w.detach(), float(opt.state[w].get("step", 2 * STEPS))))

    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)  # scalars of NAdam and ASGD are in float32


# -- files ------------------------------------------------------------------------------------------------------------


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
    """A transformation that sees none of those that have taken a step keeps them with the first that it sees."""
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


# -- groups that come back --------------------------------------------------------------------------------------------


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


# -- reductions in front ----------------------------------------------------------------------------------------------


CLIP = fo.clip_by_global_norm(0.5)
REDUCED: dict[str, Callable[[], fo.GradientTransformation]] = {
    "between rules for whole tensors": lambda: fo.chain(doubled(), CLIP, doubled(), fo.clip_by_global_norm(0.9)),
    "between opaque ones": lambda: fo.chain(opaque_momentum(), CLIP, opaque_by_norm(), fo.clip_by_global_norm(0.9)),
    "inside, opaque behind it": lambda: kept(fo.chain(CLIP, opaque_momentum())),
    "inside, whole tensors behind it": lambda: kept(fo.chain(CLIP, doubled())),
    "inside, whole tensors in front": lambda: kept(fo.chain(doubled(), CLIP)),
    "inside twice": lambda: kept(fo.chain(CLIP, kept(fo.chain(fo.clip_by_global_norm(0.3), opaque_momentum())), CLIP)),
    "inside and behind": lambda: fo.chain(CLIP, kept(fo.chain(doubled(), momentum())), fo.clip_by_global_norm(0.7)),
    "of rules alone": lambda: fo.chain(kept(fo.chain(CLIP, momentum())), fo.clip_by_global_norm(0.7)),
    "in a partition": lambda: fo.chain(
        fo.partition({"x": fo.chain(doubled(), CLIP), "y": CLIP}, lambda path, p: "x" if path in "ac" else "y"), CLIP
    ),
}


@pytest.mark.parametrize("reduced", REDUCED)
@pytest.mark.parametrize("event", ["none", "a switch", "gradients that are absent", "groups in another order"])
def test_reductions_over_the_tree_are_those_of_all_groups(reduced: str, event: str) -> None:
    """The pure functions know no groups; a switch without effect makes other chains of them."""
    same = fo.trace(0.0, nesterov=False)  # both forms are one where the decay is 0
    chain = fo.chain(same, REDUCED[reduced](), fo.scale(-0.1))
    alike, others = Life(chain), Life(chain, nesterov=True)
    pure = {k: p.detach().clone() for k, p in alike.params.items()}
    state = chain.init(pure)
    found, expected = others.run(EVENTS[event]), alike.run(EVENTS["none" if "switch" in event else event])

    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if event != "gradients that are absent":
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(1 + step)
            grads = {k: torch.randn(p.shape, generator=generator, dtype=torch.float64) for k, p in pure.items()}
            pure, state = fo.apply_gradients(chain, pure, grads, state)
        torch.testing.assert_close(found, list(pure.values()), rtol=1e-12, atol=1e-12)
