"""Opaque transformations with state in any form."""

import io
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import functional_optim as fo
from _lib.chains import is_matrix
from _lib.compare import DOUBLE


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
    "a tensor by name and a counter": Form(
        lambda c: {**c.mu, "all steps": c.count},
        lambda s, names: Core(s["all steps"], nothing(names), {k: s[k] for k in names}, nothing(names)),
    ),
    "a tuple by name and a nest of trees": Form(
        lambda c: {**{k: (x,) for k, x in c.mu.items()}, "more": {"nu": c.nu, "count": [c.count]}},
        lambda s, names: Core(
            s["more"]["count"][0],
            nothing(names),
            {k: s[k][0] for k in names},
            {k: s["more"]["nu"][k] for k in names},
        ),
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


def assert_close(params: Params, reference: Reference) -> None:
    assert params.keys() == reference.params.keys()
    for k, p in params.items():
        torch.testing.assert_close(p.detach(), reference.params[k], **DOUBLE, msg=lambda m, k=k: f"{k}: {m}")


def copied(opt: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
