"""State of opaque transformations in any form."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.compare import DOUBLE, Snapshot, assert_same_bits, leaves
from _lib.marks import pairwise
from _lib.state_forms import (
    FORM,
    FORMS,
    RATE,
    SCOPE,
    SCOPES,
    STEPS,
    Params,
    Reference,
    assert_close,
    copied,
    give,
    make_chain,
    make_grads,
    make_params,
)
from _lib.trees import make_tree
from functional_optim.adapters import TransformOptimizer


# -- numbers ----------------------------------------------------------------------------------------------------------


@pairwise("form, scope, how", FORMS, SCOPES, ("pure", "donated"))
def test_pure_steps(form: str, scope: str, how: str) -> None:
    tx, reference = make_chain(form, scope), Reference(form, make_params(), SCOPES[scope][1])
    params = {k: p.detach() for k, p in make_params().items()}
    state = tx.init(params)
    for step in range(STEPS):
        params, state = fo.apply_gradients(tx, params, make_grads(step), state, donate=how == "donated")
        reference.step(make_grads(step))
        assert_close(params, reference)


GROUPS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "named": lambda params: list(params.items()),
    "by position": lambda params: list(params.values()),
    "in groups": lambda params: [
        {"params": [(k, p) for k, p in params.items() if p.ndim != 1], "lr": 0.05},
        {"params": [(k, p) for k, p in params.items() if p.ndim == 1]},
    ],
}


@pairwise("form, scope, groups", FORMS, SCOPES, GROUPS)
def test_steps_of_an_optimizer(form: str, scope: str, groups: str) -> None:
    if scope == "one parameter" and groups == "by position":
        pytest.skip("a mask by name needs names")
    params, reference = make_params(), Reference(form, make_params(), SCOPES[scope][1])
    opt = TransformOptimizer(GROUPS[groups](params), make_chain(form, scope))
    rates = {k: 0.05 for k, p in params.items() if p.ndim != 1} if groups == "in groups" else {}
    for step in range(STEPS):
        give(params, make_grads(step))
        opt.step()
        reference.step(make_grads(step), rates)
        assert_close(params, reference)


def test_a_group_none_of_whose_parameters_an_opaque_transformation_sees() -> None:
    """Its chain is another one, for it has other switches."""

    class Count:
        def init(self, params: Any) -> Any:
            return {"n": torch.zeros(())}

        def update(self, updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            return updates, {"n": state["n"] + 1}

    w, b = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,)))
    tx = fo.chain(fo.masked(Count(), lambda path, p: p.ndim == 1), fo.sgd(0.1))
    opt = TransformOptimizer([{"params": [("w", w)], "maximize": True}, {"params": [("b", b)]}], tx)
    for p in (w, b):
        p.grad = torch.ones_like(p)
    for _ in range(2):
        opt.step()
    assert [x.item() for x in opt.state[b].values()] == [2.0]
    assert not opt.state.get(w)
    torch.testing.assert_close((w.detach(), b.detach()), (torch.full((2, 2), 1.2), torch.full((2,), 0.8)))


@pytest.mark.parametrize("names", [["a"], ["a", "in.bias"], ["out.weight", "in.weight"]])
@FORM
def test_parameters_whose_first_gradients_come_late(form: str, names: list[str]) -> None:
    params, reference = make_params(), Reference(form, make_params(), SCOPES["all"][1])
    opt = TransformOptimizer(params.items(), make_chain(form, "all"))
    for step in range(STEPS):
        grads = make_grads(step, missing=False)
        grads |= dict.fromkeys(names) if step < 7 else {}
        give(params, grads)
        opt.step()
        reference.step(grads)
        assert_close(params, reference)


@SCOPE
@FORM
def test_parameters_that_are_added_later(form: str, scope: str) -> None:
    """Entries of the tree, and those of the parameters that were there, go on."""
    later = {"a", "out.weight", "in.weight"} if scope == "all" else {"out.weight", "in.bias"}
    params = make_params()
    first = {k: p for k, p in params.items() if k not in later}
    opt = TransformOptimizer(first.items(), make_chain(form, scope))
    reference = Reference(form, {k: p for k, p in make_params().items() if k not in later}, SCOPES[scope][1])
    for step in range(STEPS):
        if step == 7:
            opt.add_param_group({"params": [(k, p) for k, p in params.items() if k in later]})
            reference.add({k: p for k, p in make_params().items() if k in later})
        there = params if step >= 7 else first
        give(there, make_grads(step))
        opt.step()
        reference.step({k: g for k, g in make_grads(step).items() if k in there})
        for k in there:
            torch.testing.assert_close(params[k].detach(), reference.params[k], **DOUBLE)


# -- transformations within transformations -------------------------------------------------------------------------


def of_each(inner: fo.GradientTransformation) -> fo.GradientTransformation:
    """A transformation that runs another one for each parameter by itself."""

    def init(params: Params) -> Any:
        return {k: inner.init(p) for k, p in params.items() if isinstance(p, torch.Tensor)}

    def update(updates: Params, state: Any, params: Any = None) -> tuple[Any, Any]:
        made, new = dict(updates), dict(state)
        for k, u in updates.items():
            if isinstance(u, torch.Tensor):
                made[k], new[k] = inner.update(u, state[k], params[k])
        return type(updates)(made), new

    return fo.GradientTransformation(init, update)


def of_all(inner: fo.GradientTransformation) -> fo.GradientTransformation:
    """A transformation that runs another one, of which nothing is known but its two functions."""
    return fo.GradientTransformation(inner.init, lambda u, s, p=None: inner.update(u, s, p))


INNER: dict[str, Callable[[], fo.GradientTransformation]] = {
    "Adam": fo.scale_by_adam,
    "AMSGrad": fo.scale_by_amsgrad,
    "momentum and decay": lambda: fo.chain(fo.trace(0.9, nesterov=True), fo.add_decayed_weights(0.1), fo.ema(0.5)),
    "a schedule": lambda: fo.chain(fo.scale_by_rms(), fo.scale_by_schedule(fo.linear_schedule(1.0, 0.1, STEPS))),
}


@pytest.mark.parametrize("wrap", [of_each, of_all])
@pytest.mark.parametrize("inner", INNER)
def test_the_state_of_an_inner_transformation(inner: str, wrap: Callable[[Any], Any]) -> None:
    """It is as if the inner one were in the chain."""
    runs = []
    for tx in (INNER[inner](), wrap(INNER[inner]())):
        params = make_params()
        opt = TransformOptimizer(params.items(), fo.chain(tx, fo.scale_by_learning_rate(RATE)))
        for step in range(STEPS):
            give(params, make_grads(step, missing=False))
            opt.step()
            if step == STEPS // 2:
                saved = copied(opt)
                opt = TransformOptimizer(params.items(), fo.chain(tx, fo.scale_by_learning_rate(RATE)))
                opt.load_state_dict(saved)
        runs.append([p.detach() for p in params.values()])
    torch.testing.assert_close(*runs, **DOUBLE)


# -- structures that change -----------------------------------------------------------------------------------------


X = torch.ones(2)
CHANGES: dict[str, tuple[Callable[[Params], Any], Callable[[Any], Any]]] = {
    "None to a dict": (lambda p: {"a": None}, lambda s: {"a": {"b": X}}),
    "None to a tuple": (lambda p: None, lambda s: (X,)),
    "None of parameters to dicts": (dict.fromkeys, lambda s: {k: {"b": X} for k in s}),
    "None of one parameter to a dict": (dict.fromkeys, lambda s: {**s, next(iter(s)): {"b": X}}),
    "a dict to None": (lambda p: {"a": {"b": X}}, lambda s: {"a": None}),
    "a tensor to a dict": (lambda p: dict.fromkeys(p, X), lambda s: {k: {"x": X} for k in s}),
    "a tuple grows": (lambda p: (X, 1), lambda s: (*s, 1)),
    "a tuple of a parameter grows": (lambda p: dict.fromkeys(p, (X,)), lambda s: dict.fromkeys(s, (X, X))),
    "a list becomes a tuple": (lambda p: {"a": [X, X]}, lambda s: {"a": (X, X)}),
    "a key is gone": (lambda p: {"a": X, "b": X}, lambda s: {"a": X}),
    "a key is new": (lambda p: {"a": X}, lambda s: {**s, "b": X}),
    "a key is called otherwise": (lambda p: {"a": X}, lambda s: {"b": X}),
    "a parameter is gone": (lambda p: dict.fromkeys(p, X), lambda s: dict(list(s.items())[1:])),
    "a parameter too many": (lambda p: dict.fromkeys(p, X), lambda s: {**s, "more": X}),
    "a list in order is too short": (lambda p: [X for _ in p], lambda s: s[1:]),
    "an empty state is filled": (lambda p: (), lambda s: {"count": 1}),
    "a text": (lambda p: {"a": 1}, lambda s: {"a": "one"}),
    "None of a key to a dict": (lambda p: {"a": None, "b": X}, lambda s: {"a": {"w": X}, "b": X}),
    "a number beside parameters to a dict": (
        lambda p: {**dict.fromkeys(p, X), "all": 1},
        lambda s: {**s, "all": {"w": X}},
    ),
}  # fmt: skip


# states with an entry for each parameter of the tree, hidden ones included
UNSEEN: dict[str, Callable[[Any], Any]] = {
    "nodes in a list": lambda p: [x if isinstance(x, fo.MaskedNode) else torch.zeros_like(x) for x in p.values()],
    "None in a list": lambda p: [None if isinstance(x, fo.MaskedNode) else torch.zeros_like(x) for x in p.values()],
    "nodes by name": lambda p: {k: x if isinstance(x, fo.MaskedNode) else torch.zeros_like(x) for k, x in p.items()},
    "None by name": lambda p: {k: None if isinstance(x, fo.MaskedNode) else torch.zeros_like(x) for k, x in p.items()},
}


@pytest.mark.parametrize("case", UNSEEN)
def test_entries_that_stand_for_what_a_mask_hides(case: str) -> None:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        entries = list(state.values()) if isinstance(state, dict) else state
        moved = [
            0.9 * x + u if isinstance(u, torch.Tensor) else x for x, u in zip(entries, updates.values(), strict=True)
        ]
        kept = dict(zip(state, moved, strict=True)) if isinstance(state, dict) else moved
        news = {k: m if isinstance(u, torch.Tensor) else u for (k, u), m in zip(updates.items(), moved, strict=True)}
        return type(updates)(news), kept

    inner = fo.GradientTransformation(UNSEEN[case], update)
    tx = fo.chain(fo.masked(inner, lambda path, p: p.ndim == 2), fo.scale(-RATE))
    expected = fo.chain(fo.masked(fo.trace(0.9), lambda path, p: p.ndim == 2), fo.scale(-RATE))
    params, others = make_params(), make_params()
    opt, other = TransformOptimizer(params.items(), tx), TransformOptimizer(others.items(), expected)
    for step in range(STEPS):
        for own, o in ((params, opt), (others, other)):
            give(own, make_grads(step, missing=False))
            o.step()

    for k, p in params.items():
        torch.testing.assert_close(p.detach(), others[k].detach(), **DOUBLE)
    found = [opt.state[params[k]]["transformation_0"] for k, p in params.items() if p.ndim == 2]
    assert [tuple(x.shape) for x in found] == [tuple(p.shape) for p in params.values() if p.ndim == 2]


@pytest.mark.parametrize(
    "init",
    [
        lambda p: {id(x): torch.zeros_like(x) for x in p.values()},
        lambda p: {id(x): (torch.zeros_like(x), 1) for x in reversed(p.values())},
        lambda p: {"all": {hash(x): torch.zeros_like(x) for x in p.values()}},
    ],
)
def test_a_state_by_objects_cannot_be_split(init: Callable[[Any], Any]) -> None:
    """Their ids are other ones in the process that reads a checkpoint."""
    tx = fo.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
    params = make_params()
    opt = TransformOptimizer(params.items(), tx)
    give(params, make_grads(0, missing=False))
    before = Snapshot(params)

    with pytest.raises(ValueError, match=r"cannot be split among the parameters .* in a dict by its name or in a list"):
        opt.step()

    before.check()
    assert not opt.state


@pytest.mark.parametrize("form", ["a tensor by name", "a nest of trees", "a list in order", "a counter"])
@pytest.mark.parametrize("pure", [True, False])
def test_entries_without_memory_are_refused_before_the_transformation_reads_them(form: str, pure: bool) -> None:
    tx = make_chain(form, "all")
    own = make_params()
    params = {k: p.detach() for k, p in own.items()}
    opt, state = TransformOptimizer(own.items(), tx), tx.init(params)
    give(own, make_grads(0, missing=False))
    opt.step()
    params, state = fo.apply_gradients(tx, params, make_grads(0, missing=False), state)
    entries = leaves(state) if pure else [x for k, s in opt.state.items() for x in s.values()]
    entries = [x for x in entries if isinstance(x, torch.Tensor) and x.nbytes]
    shared = {x.untyped_storage().data_ptr() for x in [*params.values(), *own.values()]}
    lost = [x for x in entries if x.untyped_storage().data_ptr() not in shared]
    before = Snapshot(params, own)
    for x in lost:
        x.untyped_storage().resize_(0)

    with pytest.raises(ValueError, match="has no memory: its storage has been freed or cut"):
        fo.apply_gradients(tx, params, make_grads(1, missing=False), state) if pure else opt.step()

    before.check()


def changing(init: Any, change: Any, at: int) -> fo.GradientTransformation:
    count = [0]

    def shifting(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count[0] += 1
        return updates, change(state) if count[0] == at else state

    return fo.GradientTransformation(init, shifting)


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("case", CHANGES)
def test_a_structure_that_changes_is_refused_by_name_and_nothing_is_written(case: str, at: int) -> None:
    params = make_params()
    opt = TransformOptimizer(
        params.items(), fo.chain(fo.trace(0.9), changing(*CHANGES[case], at), fo.trace(0.9), fo.scale(-RATE))
    )
    for step in range(at - 1):
        give(params, make_grads(step, missing=False))
        opt.step()
    give(params, make_grads(9, missing=False))
    before = {k: dict(opt.state[p]) for k, p in params.items() if p in opt.state}
    snapshot = Snapshot(params, before)

    with pytest.raises((ValueError, TypeError), match="shifting"):
        opt.step()

    snapshot.check()
    assert {k: dict(opt.state[p]) for k, p in params.items() if p in opt.state}.keys() == before.keys()
    for k, own in before.items():
        assert opt.state[params[k]].keys() == own.keys()
        assert all(opt.state[params[k]][key] is x for key, x in own.items())
    opt.step()  # the change was in one step only


def test_entries_that_are_none_at_first_and_tensors_later() -> None:
    """A state that is made lazily, and one whose tensors change shape and dtype, keep their structure."""

    def init(params: Params) -> Any:
        return {"mu": dict.fromkeys(params), "history": torch.zeros(0), "last": None}

    def update(updates: Params, state: Any, params: Any = None) -> tuple[Any, Any]:
        mu = {k: updates[k] + (0 if x is None else 0.9 * x) for k, x in state["mu"].items()}
        norm = sum(x.square().sum() for x in mu.values()).sqrt()
        history = torch.cat([state["history"].double(), norm[None]])
        made = {k: x / history.sum() for k, x in mu.items()}
        return type(updates)(made), {"mu": mu, "history": history, "last": norm.item()}

    tx = fo.chain(fo.GradientTransformation(init, update), fo.scale(-RATE))
    params = make_params()
    pure = {k: p.detach().clone() for k, p in params.items()}
    state = tx.init(pure)
    opt = TransformOptimizer(params.items(), tx)
    for step in range(STEPS):
        grads = make_grads(step, missing=False)
        pure, state = fo.apply_gradients(tx, pure, grads, state)
        give(params, grads)
        opt.step()
        if step == STEPS // 2:
            saved = copied(opt)
            opt = TransformOptimizer(params.items(), tx)
            opt.load_state_dict(saved)
    assert_same_bits({k: p.detach() for k, p in params.items()}, pure)


def momentum_rule(factor: float) -> Any:
    """A rule as a cell of a notebook makes it anew each time that it is run."""

    @fo.elementwise(state={"m": fo.zeros})
    def momentum(u: Any, m: Any, *, step: Any, decay: Any = 0.5) -> Any:
        m = decay * m + factor * u
        return m / (1 - decay**step), m

    return momentum


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("wrap", [fo.chain, lambda tx: fo.chain(fo.masked(tx, True), fo.scale(1.0))])
def test_a_rule_that_is_written_anew_goes_on_with_its_state(wrap: Any, donate: bool) -> None:
    first, second = (wrap(momentum_rule(factor)()) for factor in (1.0, 3.0))
    params, grads = make_tree(0), make_tree(1)
    params, state = fo.apply_gradients(first, params, grads, first.init(params), donate=donate)
    params, state = fo.apply_gradients(second, params, grads, state, donate=donate)

    expected = {k: (0.5 * g + 3 * g) for k, g in grads.items()}
    torch.testing.assert_close(fo.slots(second, state)["m"], expected)
    assert fo.hyperparams(second, state)["decay"] == 0.5


CELL = """
@fo.elementwise(state={"m": fo.zeros})
def rule_of_a_cell(u, m, *, step, decay=0.5):
    m = decay * m + FACTOR * u
    return m / (1 - decay**step), m
"""


TWO = """
@fo.elementwise(state={"m": fo.zeros, "n": fo.zeros})
def rule_of_a_cell(u, m, n, *, step, decay=0.5):
    m = decay * m + u
    return m / (1 - decay**step) + n, m, n + u * u
"""
TURNED = """
@fo.elementwise(state={"n": fo.zeros, "m": fo.zeros})
def rule_of_a_cell(u, n, m, *, step, decay=0.5):
    m = decay * m + u
    return m / (1 - decay**step) + n, n + u * u, m
"""
OTHER_SLOT = """
@fo.elementwise(state={"n": fo.zeros})
def rule_of_a_cell(u, n, *, step):
    return u / step, n + u
"""


def run_cell(text: str) -> Any:
    """The rule of a cell of a notebook that is run in this module."""
    exec(text, globals())
    return globals()["rule_of_a_cell"]()


@pytest.mark.parametrize("donate", [None, False, True], ids=["no step", "pure", "donated"])
def test_a_state_from_before_its_rule_was_written_anew_can_be_saved(donate: bool | None) -> None:
    first = run_cell(CELL.replace("FACTOR", "1.0"))
    params, grads = make_tree(0), make_tree(1)
    params, state = fo.apply_gradients(first, params, grads, first.init(params))
    second = run_cell(CELL.replace("FACTOR", "3.0"))
    if donate is not None:
        params, state = fo.apply_gradients(second, params, grads, state, donate=donate)

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)

    assert type(found) is type(second.init(params))
    assert type(pickle.loads(pickle.dumps(state))) is type(found)
    assert type(copy.deepcopy(state)) is type(state)
    torch.testing.assert_close(found.m, state.m, rtol=0, atol=0)
    assert found.count == state.count
    stepped = [fo.apply_gradients(second, params, grads, own)[0] for own in (state, found)]
    torch.testing.assert_close(*stepped, rtol=0, atol=0)


def test_a_state_whose_rule_has_other_slots_now_is_not_saved_as_one_of_the_new_rule() -> None:
    first = run_cell(CELL.replace("FACTOR", "1.0"))
    state = first.init(make_tree(0))
    run_cell(OTHER_SLOT)

    with pytest.raises(pickle.PicklingError, match=r"rule_of_a_cell has the slots m, but .* with the slots n, .* name"):
        pickle.dumps(state)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("times", [1, 6])
def test_slots_of_a_file_go_by_name(weights_only: bool, times: int) -> None:
    """The rule has been written anew with its slots in another order, or some times with more and with fewer."""
    first, params = run_cell(TWO), make_tree(0)
    params, state = fo.apply_gradients(first, params, make_tree(1), first.init(params))
    file = io.BytesIO()
    torch.save(state, file)
    for _ in range(times):
        run_cell(CELL)
        second = run_cell(TURNED)
    file.seek(0)

    found = torch.load(file, weights_only=weights_only)

    assert type(found) is type(second.init(params))
    torch.testing.assert_close((found.m, found.n, found.count), (state.m, state.n, state.count), rtol=0, atol=0)
    torch.testing.assert_close(
        fo.apply_gradients(second, params, make_tree(2), found)[0],
        fo.apply_gradients(first, params, make_tree(2), state)[0],
    )


def test_a_file_of_a_rule_with_other_slots_is_refused() -> None:
    first = run_cell(CELL)
    content = pickle.dumps(first.init(make_tree(0)))
    run_cell(OTHER_SLOT)

    with pytest.raises(TypeError, match=r"state of rule_of_a_cell with the slots m, but .* with the slots n; load it"):
        pickle.loads(content)


@pytest.mark.parametrize("module", ["functional_optim._pickles", "functional_optim._compiler.rule"])
def test_a_file_without_names_of_slots_is_read_in_order(module: str) -> None:
    """Files of earlier versions hold these addresses."""
    state = run_cell(TWO).init(make_tree(0))
    values = pickle.dumps((globals()["rule_of_a_cell"], True, *state), protocol=0)

    found = pickle.loads(f"c{module}\nrestore_state\n".encode() + values.removesuffix(b".") + b"R.")

    assert type(found) is type(state)
    torch.testing.assert_close(found, state, rtol=0, atol=0)


def test_a_file_of_an_empty_state_with_its_first_address_is_read() -> None:
    assert pickle.loads(b"cfunctional_optim._compiler.rule\nEmptyState\n(tR.") == fo.EmptyState()


def test_a_state_is_not_saved_as_that_of_another_rule_with_its_name() -> None:
    state = run_cell(CELL).init(make_tree(0))
    exec(CELL.replace("rule_of_a_cell", "other_rule"), globals())
    globals()["rule_of_a_cell"] = globals()["other_rule"]

    with pytest.raises(pickle.PicklingError):
        pickle.dumps(state)


def test_a_rule_of_the_same_name_with_other_slots_refuses_the_state() -> None:
    @fo.elementwise(state={"n": fo.zeros})
    def momentum(u: Any, n: Any, *, step: Any, decay: Any = 0.5) -> Any:
        return u / step, decay * n

    params = make_tree(0)
    with pytest.raises(TypeError, match=r"is MomentumState\(count, m\), expected the MomentumState\(count, n\) of"):
        fo.apply_gradients(momentum(), params, make_tree(1), momentum_rule(1.0)().init(params))


def test_a_chain_that_is_cut_in_a_message_ends_in_dots() -> None:
    """A number that is cut would be another one."""
    params = make_tree(0)
    tx = fo.chain(fo.clip(1.0), fo.adamw(0.001234567, b1=0.91, b2=0.9993, weight_decay=0.123456))
    with pytest.raises(TypeError, match="state is ScaleByAdamState") as caught:
        fo.apply_gradients(tx, params, params, fo.scale_by_adam().init(params))
    shown = str(caught.value).partition(" of chain(")[2].partition(";")[0]
    assert repr(tx).removeprefix("chain(").startswith(shown.removesuffix("..."))
    assert shown.endswith("...")
