"""State of every form that a transformation of two functions may keep: numbers, memory, files, missing gradients.

The reference keeps the same numbers in dicts by name, in a loop over plain tensors that knows nothing of forms.
"""

import copy
import io
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optree
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as dsd

import functional_optim as fo
from _lib.chains import is_matrix
from _lib.compare import DOUBLE, Snapshot, assert_same_bits
from functional_optim.adapters import TransformOptimizer, load_safetensors, save_safetensors


STEPS = 20
RATE = 0.1
SHAPES = {"scale": (), "in.weight": (3, 2), "in.bias": (3,), "a": (2,), "out.weight": (2, 3)}
Params = Mapping[str, Any]


class Core(NamedTuple):
    """The numbers of a state. Those that a form does not keep are None.

    Args:
      count: how often the transformation has been called.
      steps: how often each parameter had an update.
      mu: the first moment of each parameter.
      nu: the second.
    """

    count: Any
    steps: dict[str, Any]
    mu: dict[str, Any]
    nu: dict[str, Any]


class Form(NamedTuple):
    """A form of state.

    Args:
      pack: makes a state of numbers.
      unpack: the numbers of a state of parameters with these names.
    """

    pack: Callable[[Core], Any]
    unpack: Callable[[Any, Sequence[str]], Core]


class Pair(NamedTuple):
    """The state of a parameter."""

    first: Any
    second: Any


class Moments(NamedTuple):
    """The state of a tree."""

    count: Any
    mu: Any
    nu: Any


def nothing(names: Iterable[str]) -> dict[str, Any]:
    return dict.fromkeys(names)


def by_name(pack: Callable[[Any, Any, Any], Any], unpack: Callable[[Any], tuple[Any, Any, Any]]) -> Form:
    """A dict with an entry per parameter, made of its steps and moments."""

    def unpack_all(state: Any, names: Sequence[str]) -> Core:
        found = {k: unpack(state[k]) for k in names}
        return Core(None, *({k: each[i] for k, each in found.items()} for i in range(3)))

    return Form(lambda c: {k: pack(c.steps[k], c.mu[k], c.nu[k]) for k in c.mu}, unpack_all)


def of_trees(pack: Callable[[Core], Any], unpack: Callable[[Any], tuple[Any, Any, Any]]) -> Form:
    """A container of a counter and two trees."""

    def unpack_all(state: Any, names: Sequence[str]) -> Core:
        count, mu, nu = unpack(state)
        return Core(count, nothing(names), {k: mu[k] for k in names}, {k: nu[k] for k in names})

    return Form(pack, unpack_all)


def in_order(container: Callable[[Iterable[Any]], Any], key: str | None = None) -> Form:
    """A list or tuple in the order of the parameters, by itself or under a key beside a counter."""

    def pack(c: Core) -> Any:
        own = container((c.mu[k], c.nu[k]) for k in c.mu)
        return own if key is None else {"count": c.count, key: own}

    def unpack(state: Any, names: Sequence[str]) -> Core:
        own = state if key is None else state[key]
        return Core(
            None if key is None else state["count"],
            nothing(names),
            {k: x[0] for k, x in zip(names, own, strict=True)},
            {k: x[1] for k, x in zip(names, own, strict=True)},
        )

    return Form(pack, unpack)


def alone(pack: Callable[[Any], Any], unpack: Callable[[Any], Any]) -> Form:
    """A counter and nothing for parameters."""
    return Form(lambda c: pack(c.count), lambda s, names: Core(unpack(s), *(nothing(names) for _ in range(3))))


def reverse(tree: Mapping[str, Any], kind: Callable[[Any], Any] = dict) -> Any:
    return kind(reversed(list(tree.items())))


def by_shape(c: Core) -> dict[str, Any]:
    """Another form for each number of dimensions, and shapes that are not the parameter's."""
    made: dict[str, Any] = {}
    for k, x in c.mu.items():
        if x is None or not x.ndim:
            made[k] = None
        elif x.ndim == 2:
            made[k] = {"mu": x.t().contiguous(), "more": [c.nu[k].flatten(), {"steps": c.steps[k]}]}
        else:
            made[k] = (x, c.nu[k])
    return made


def of_shapes(state: Any, names: Sequence[str]) -> Core:
    core = Core(None, nothing(names), nothing(names), nothing(names))
    for k in names:
        own = state[k]
        if isinstance(own, dict):
            core.mu[k] = own["mu"].t()
            core.nu[k], core.steps[k] = own["more"][0].reshape(core.mu[k].shape), own["more"][1]["steps"]
        elif own is not None:
            core.mu[k], core.nu[k] = own
    return core


FORMS: dict[str, Form] = {
    "a tensor by name": by_name(lambda n, mu, nu: mu, lambda s: (None, s, None)),
    "a number by name": by_name(lambda n, mu, nu: n, lambda s: (s, None, None)),
    "a tuple by name": by_name(lambda n, mu, nu: (mu, nu), lambda s: (None, *s)),
    "a list by name": by_name(lambda n, mu, nu: [mu, nu, n], lambda s: (s[2], s[0], s[1])),
    "a dict by name": by_name(lambda n, mu, nu: {"b": mu, "a": nu}, lambda s: (None, s["b"], s["a"])),
    "a NamedTuple by name": by_name(lambda n, mu, nu: Pair(mu, nu), lambda s: (None, s.first, s.second)),
    "a nest by name": by_name(
        lambda n, mu, nu: {"x.y": (mu, [{"x": nu}]), "x": {"y": Pair(n, None)}},
        lambda s: (s["x"]["y"].first, s["x.y"][0], s["x.y"][1][0]["x"]),
    ),
    "None by name": by_name(lambda n, mu, nu: None, lambda s: (None, None, None)),
    "other forms for other parameters": Form(by_shape, of_shapes),
    "another order of keys": Form(
        lambda c: reverse({k: (c.mu[k], c.nu[k]) for k in c.mu}),
        lambda s, names: Core(None, nothing(names), {k: s[k][0] for k in names}, {k: s[k][1] for k in names}),
    ),
    "another order of keys that counts": Form(
        lambda c: reverse(c.mu, OrderedDict),
        lambda s, names: Core(None, nothing(names), {k: s[k] for k in names}, nothing(names)),
    ),
    "a list in order": in_order(list),
    "a tuple in order": in_order(tuple),
    "a list in order and a counter": in_order(list, "moments"),
    "a NamedTuple of trees": of_trees(lambda c: Moments(c.count, c.mu, c.nu), lambda s: s),
    "a tuple of trees": of_trees(lambda c: (c.mu, c.count, c.nu), lambda s: (s[1], s[0], s[2])),
    "a nest of trees": of_trees(
        lambda c: {"outer": [c.count, {"nu": reverse(c.nu)}], "mu": ((c.mu,), (), {})},
        lambda s: (s["outer"][0], s["mu"][0][0], s["outer"][1]["nu"]),
    ),
    "entries of both": of_trees(
        lambda c: {"per": {k: {"mu": c.mu[k]} for k in c.mu}, "all": Pair(c.count, c.nu)},
        lambda s: (s["all"].first, {k: x["mu"] for k, x in s["per"].items()}, s["all"].second),
    ),
    "a number": alone(lambda n: n, lambda s: s),
    "a counter": alone(lambda n: {"a": [torch.tensor(float(n)), {"b.c": None}]}, lambda s: int(s["a"][0])),
    "nested counters": alone(lambda n: ((n // 2, [n - n // 2]), {}), lambda s: s[0][0] + s[0][1][0]),
    "nothing": Form(lambda c: (), lambda s, names: Core(None, nothing(names), nothing(names), nothing(names))),
}
FORM = pytest.mark.parametrize("form", FORMS)


def started(params: Params) -> Core:
    """The numbers before the first step; what is not a tensor is not seen."""
    seen = {k: p for k, p in params.items() if isinstance(p, torch.Tensor)}
    zeros = [{k: torch.zeros_like(p, requires_grad=False) for k, p in seen.items()} for _ in range(2)]
    return Core(0, dict.fromkeys(seen, 0), *zeros)


def moved(core: Core, updates: Params) -> tuple[dict[str, Any], Core]:
    """The new updates and numbers; a parameter without an update keeps its numbers."""
    count = None if core.count is None else core.count + 1
    made, steps, mu, nu = dict(updates), dict(core.steps), dict(core.mu), dict(core.nu)
    for k, u in updates.items():
        if isinstance(u, torch.Tensor):
            steps[k] = None if steps[k] is None else steps[k] + 1
            mu[k] = None if mu[k] is None else 0.9 * mu[k] + u
            nu[k] = None if nu[k] is None else 0.8 * nu[k] + u * u
            x = u if mu[k] is None else mu[k]
            x = x if nu[k] is None else x / (nu[k].sqrt() + 0.1)
            x = x if steps[k] is None else x / (1 + steps[k])
            made[k] = x if count is None else x / (1 + count)
    return made, Core(count, steps, mu, nu)


def transformation(form: str) -> fo.GradientTransformation:
    """The formula, with a state of a form."""
    pack, unpack = FORMS[form]

    def init(params: Params) -> Any:
        return pack(started(params))

    def update(updates: Params, state: Any, params: Any = None) -> tuple[Any, Any]:
        names = [k for k, p in params.items() if isinstance(p, torch.Tensor)]
        made, core = moved(unpack(state, names), updates)
        return type(updates)(made), pack(core)

    return fo.GradientTransformation(init, update)


class Reference:
    """Parameters that are stepped in a loop: the formula, a momentum, a learning rate."""

    def __init__(self, form: str, params: Params, seen: Callable[[str, Any], bool]) -> None:
        self.form, self.seen = form, seen
        self.params: dict[str, torch.Tensor] = {}
        self.trace: dict[str, torch.Tensor] = {}
        self.core: Core | None = None
        self.add(params)

    def add(self, params: Params) -> None:
        """Takes parameters up."""
        for k, p in params.items():
            self.params[k] = p.detach().clone()
            self.trace[k] = torch.zeros_like(self.params[k])
        mine = {k: p for k, p in params.items() if self.seen(k, p)}
        pack, unpack = FORMS[self.form]
        new = unpack(pack(started(mine)), list(mine))
        if self.core is None:
            self.core = new
        else:
            for old, more in zip(self.core[1:], new[1:], strict=True):
                old.update(more)

    def step(self, grads: Params, rates: Mapping[str, float] | None = None) -> None:
        assert self.core is not None
        mine = {k: g for k, g in grads.items() if k in self.core.mu}
        made, self.core = moved(self.core, mine)
        for k, u in {**grads, **made}.items():
            if u is not None:
                self.trace[k] = u + 0.9 * self.trace[k]
                self.params[k] = self.params[k] - (rates or {}).get(k, RATE) * self.trace[k]


SCOPES: dict[str, tuple[Callable[[Any], Any], Callable[[str, Any], bool]]] = {
    "all": (lambda tx: tx, lambda k, p: True),
    "masked": (lambda tx: fo.masked(tx, is_matrix), is_matrix),
    "partition": (
        lambda tx: fo.partition({True: fo.identity(), False: fo.chain(tx)}, is_matrix),
        lambda k, p: not is_matrix(k, p),
    ),
    "one parameter": (lambda tx: fo.masked(tx, r"^a$"), lambda k, p: k == "a"),
}
SCOPE = pytest.mark.parametrize("scope", SCOPES)


def make_chain(form: str, scope: str) -> fo.GradientTransformation:
    tx = SCOPES[scope][0](transformation(form))
    return fo.chain(tx, fo.trace(0.9), fo.scale_by_learning_rate(RATE))


def make_params() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        k: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for k, shape in SHAPES.items()
    }


def make_grads(step: int, missing: bool = True) -> dict[str, Any]:
    """Gradients of a step, of which another third is missing each time."""
    generator = torch.Generator().manual_seed(1 + step)
    made: dict[str, Any] = {
        k: torch.randn(shape, generator=generator, dtype=torch.float64) for k, shape in SHAPES.items()
    }
    return {k: None if missing and (step + i) % 3 == 0 else g for i, (k, g) in enumerate(made.items())}


def give(params: Mapping[str, torch.Tensor], grads: Params) -> None:
    for k, p in params.items():
        p.grad = None if grads[k] is None else grads[k].clone()


def train(opt: Any, params: Mapping[str, torch.Tensor], steps: Iterable[int]) -> None:
    for step in steps:
        give(params, make_grads(step))
        opt.step()


def assert_close(params: Params, reference: Reference) -> None:
    assert params.keys() == reference.params.keys()
    for k, p in params.items():
        torch.testing.assert_close(p.detach(), reference.params[k], **DOUBLE, msg=lambda m, k=k: f"{k}: {m}")


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("donate", [False, True])
@SCOPE
@FORM
def test_pure_steps(form: str, scope: str, donate: bool) -> None:
    tx, reference = make_chain(form, scope), Reference(form, make_params(), SCOPES[scope][1])
    params = {k: p.detach() for k, p in make_params().items()}
    state = tx.init(params)
    for step in range(STEPS):
        params, state = fo.apply_gradients(tx, params, make_grads(step), state, donate=donate)
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


@pytest.mark.parametrize("groups", GROUPS)
@SCOPE
@FORM
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


# -- memory -----------------------------------------------------------------------------------------------------------


def n_bytes(tree: Any) -> int:
    leaves = optree.tree_leaves(tree, none_is_leaf=True, namespace="functional_optim")
    return sum(x.nbytes for x in leaves if isinstance(x, torch.Tensor))


@SCOPE
@FORM
def test_an_optimizer_keeps_as_much_as_the_pure_state(form: str, scope: str) -> None:
    """Nothing is copied to several parameters, and nothing kept for those that are not seen."""
    params, tx = make_params(), SCOPES[scope][0](transformation(form))
    opt = TransformOptimizer(params.items(), fo.chain(tx, fo.scale(-RATE)))
    for step in range(4):
        give(params, make_grads(step, missing=False))
        opt.step()
        kept = {k: n_bytes(dict(opt.state[p])) for k, p in params.items()}
        assert sum(kept.values()) == n_bytes(tx.init({k: p.detach() for k, p in params.items()}))
        assert not any(kept[k] for k, p in params.items() if not SCOPES[scope][1](k, p))
        assert n_bytes(opt.state_dict()["state"]) == sum(kept.values())


@pytest.mark.parametrize("form", ["a tensor by name", "another order of keys that counts", "a list in order"])
def test_the_size_of_state_does_not_grow_with_the_square_of_parameters(form: str) -> None:
    params = {}
    for k in range(40):
        params[f"{k}.weight"] = nn.Parameter(torch.ones(8, 8, dtype=torch.float64))
        params[f"{k}.bias"] = nn.Parameter(torch.ones(8, dtype=torch.float64))
    opt = TransformOptimizer(params.items(), fo.chain(fo.masked(transformation(form), is_matrix), fo.scale(-0.1)))
    for p in params.values():
        p.grad = torch.ones_like(p)
    opt.step()
    times = 2 if form == "a list in order" else 1
    for p in params.values():
        assert n_bytes(dict(opt.state[p])) == (times * p.nbytes if p.ndim == 2 else 0)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def copied(opt: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class Bare(nn.Module):
    """A module of parameters by their names."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        super().__init__()
        for k, p in params.items():
            *path, last = k.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(last, p)


def by_position(opt: Any, params: dict[str, Any], resume: Callable[..., Any], folder: Path) -> Any:
    saved = copied(opt)
    resumed = resume(params)
    resumed.load_state_dict(saved)
    return resumed


def by_name_in_another_order(opt: Any, params: dict[str, Any], resume: Callable[..., Any], folder: Path) -> Any:
    saved = copied(opt)
    resumed = resume(reverse(params))
    resumed.load_state_dict(saved, by_name=True)
    return resumed


def by_name_in_other_groups(opt: Any, params: dict[str, Any], resume: Callable[..., Any], folder: Path) -> Any:
    saved = copied(opt)
    resumed = resume(dict(list(params.items())[2:]))
    resumed.add_param_group({"params": list(params.items())[:2]})
    resumed.load_state_dict(saved, by_name=True)
    return resumed


def twice(opt: Any, params: dict[str, Any], resume: Callable[..., Any], folder: Path) -> Any:
    first = by_position(opt, {k: nn.Parameter(p.detach().clone()) for k, p in params.items()}, resume, folder)
    return by_position(first, params, resume, folder)


def in_a_safe_file(opt: Any, params: dict[str, Any], resume: Callable[..., Any], folder: Path) -> Any:
    pytest.importorskip("safetensors")
    save_safetensors(opt.state_dict(), folder / "state.safetensors")
    resumed = resume(params)
    resumed.load_state_dict(load_safetensors(folder / "state.safetensors"))
    return resumed


def named(opt: Any) -> dict[str, Any]:
    """The parameters of an optimizer, by name."""
    return {k: p for group in opt.param_groups for k, p in zip(group["param_names"], group["params"], strict=True)}


def in_a_distributed_checkpoint(opt: Any, params: dict[str, Any], resume: Callable[..., Any], folder: Path) -> Any:
    model = Bare(
        {k: p for group in opt.param_groups for k, p in zip(group["param_names"], group["params"], strict=True)}
    )
    dcp.save({"optimizer": dsd.get_optimizer_state_dict(model, opt)}, checkpoint_id=folder / "parts")
    resumed, other = resume(params), Bare(params)
    saved = dsd.get_optimizer_state_dict(other, resumed)
    dcp.load({"optimizer": saved}, checkpoint_id=folder / "parts")
    dsd.set_optimizer_state_dict(other, resumed, saved)
    return resumed


WAYS = {
    way.__name__: way
    for way in (
        by_position,
        by_name_in_another_order,
        by_name_in_other_groups,
        twice,
        in_a_safe_file,
        in_a_distributed_checkpoint,
    )
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scope", ["all", "masked"])
@FORM
def test_training_goes_on_after_a_checkpoint(form: str, scope: str, way: str, tmp_path: Path) -> None:
    params, reference = make_params(), Reference(form, make_params(), SCOPES[scope][1])
    opt = TransformOptimizer(params.items(), make_chain(form, scope))
    train(opt, params, range(STEPS // 2))
    opt.zero_grad()
    others = {k: nn.Parameter(p.detach().clone()) for k, p in params.items()}
    resumed = WAYS[way](opt, others, lambda own: TransformOptimizer(own.items(), make_chain(form, scope)), tmp_path)
    train(opt, params, range(STEPS // 2, STEPS))  # what was saved does not follow
    train(resumed, others, range(STEPS // 2, STEPS))
    for step in range(STEPS):
        reference.step(make_grads(step))
    assert_close(params, reference)
    assert_close(others, reference)


@pytest.mark.parametrize("scope", ["all", "masked"])
@FORM
def test_training_goes_on_in_a_copy(form: str, scope: str) -> None:
    params, reference = make_params(), Reference(form, make_params(), SCOPES[scope][1])
    opt = TransformOptimizer(params.items(), make_chain(form, scope))
    train(opt, params, range(STEPS // 2))
    opt, params = copy.deepcopy((opt, params))
    train(opt, params, range(STEPS // 2, STEPS))
    for step in range(STEPS):
        reference.step(make_grads(step))
    assert_close(params, reference)


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
}  # fmt: skip


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
