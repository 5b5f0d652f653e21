"""Trees as extra arguments of rules: one more input per element, in the pure functions and in optimizers."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.backends import BACKENDS, only
from _lib.chains import is_matrix
from _lib.compare import DOUBLE, assert_same_bits
from _lib.marks import INTERPRETER
from _lib.trees import clone, like, make_tree
from functional_optim.adapters import TransformOptimizer


pytestmark = INTERPRETER
STEPS = 20


@fo.elementwise(
    state={"mu": fo.zeros, "h": fo.zeros}, extra={"hessian": "element", "value": "number"}, ranges={"b1": "[0, 1)"}
)
def sophia(u, mu, h, *, hessian, value, b1=0.9, b2=0.8, gamma=0.5):  # type: ignore[no-untyped-def]
    mu = b1 * mu + (1 - b1) * u
    h = b2 * h + (1 - b2) * hessian
    return -0.1 * value * torch.clamp(mu / (gamma * torch.abs(h) + 1e-3), -1, 1), mu, h


def by_hand(p: Any, grads: list[Any], hessians: list[Any]) -> Any:
    mu, h = torch.zeros_like(p), torch.zeros_like(p)
    for t, (g, own) in enumerate(zip(grads, hessians, strict=True)):
        mu, h = 0.9 * mu + 0.1 * g, 0.8 * h + 0.2 * own
        p = p - 0.1 * (1 + t) * (mu / (0.5 * h.abs() + 1e-3)).clamp(-1, 1)
    return p


FIRST = make_tree(0)
GRADS = [like(FIRST, seed) for seed in range(1, STEPS + 1)]
HESSIANS = [like(FIRST, 100 + seed) for seed in range(1, STEPS + 1)]
EXPECTED = {k: by_hand(p, [g[k] for g in GRADS], [h[k] for h in HESSIANS]) for k, p in FIRST.items()}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tree_is_one_more_input(backend: str, donate: bool) -> None:
    tx, params = fo.chain(sophia()), clone(FIRST)
    state, steps = tx.init(params), 4 if backend == "triton" else STEPS  # Triton's interpreter is slow
    grads, hessians = GRADS[:steps], HESSIANS[:steps]

    with only(backend):
        for t, (g, h) in enumerate(zip(grads, hessians, strict=True)):
            params, state = fo.apply_gradients(tx, params, g, state, hessian=h, value=1.0 + t, donate=donate)

    expected = {k: by_hand(p, [g[k] for g in grads], [h[k] for h in hessians]) for k, p in FIRST.items()}
    torch.testing.assert_close(params, expected, **DOUBLE)


FORMS: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "list": lambda h, model: list(h.values()),
    "tuple": lambda h, model: tuple(h.values()),
    "by name": lambda h, model: dict(reversed(h.items())),
    "by parameter": lambda h, model: {model[k]: x for k, x in h.items()},
}


def optimizer_of(tx: Any) -> tuple[dict[str, Any], TransformOptimizer]:
    model = {k: torch.nn.Parameter(p.clone()) for k, p in FIRST.items()}
    for k, p in model.items():
        p.grad = GRADS[0][k].clone()
    return model, TransformOptimizer(list(model.items()), tx)


@pytest.mark.parametrize("form", FORMS)
def test_optimizers_take_one_tensor_per_parameter(form: str) -> None:
    model, opt = optimizer_of(sophia())

    for t, (g, h) in enumerate(zip(GRADS, HESSIANS, strict=True)):
        for k, p in model.items():
            p.grad = g[k].clone()
        opt.step(hessian=FORMS[form](h, model), value=1.0 + t)

    torch.testing.assert_close({k: p.detach() for k, p in model.items()}, EXPECTED, **DOUBLE)


NARROW: dict[str, Any] = {
    "masked": fo.masked(sophia(), is_matrix),
    "partition": fo.partition({"a": sophia(), "b": fo.sgd(0.1)}, lambda path, p: "a" if p.ndim > 1 else "b"),
}


@pytest.mark.parametrize("name", NARROW)
def test_masks_say_which_leaves_need_one(name: str) -> None:
    h = {k: x if x.ndim > 1 else None for k, x in HESSIANS[0].items()}
    state = NARROW[name].init(FIRST)
    model, opt = optimizer_of(NARROW[name])

    params, _ = fo.apply_gradients(NARROW[name], FIRST, GRADS[0], state, hessian=h, value=1.0)
    opt.step(hessian=list(h.values()), value=1.0)

    expected = by_hand(FIRST["weight"], [GRADS[0]["weight"]], [h["weight"]])
    torch.testing.assert_close(params["weight"], expected, **DOUBLE)
    assert_same_bits({k: p.detach() for k, p in model.items()}, params)


def test_a_leaf_without_gradient_needs_none() -> None:
    grads = {**GRADS[0], "bias": None}
    h = {**HESSIANS[0], "bias": None}

    params, _ = fo.apply_gradients(sophia(), FIRST, grads, sophia().init(FIRST), hessian=h, value=1.0)

    assert params["bias"] is FIRST["bias"]


def test_derivatives_by_it() -> None:
    tx, state = sophia(), sophia().init(FIRST)

    def loss(h: Any) -> Any:
        params, _ = fo.apply_gradients(tx, FIRST, GRADS[0], state, hessian=h, value=1.0)
        return sum((p * p).sum() for p in params.values())

    found = torch.func.grad(loss)(HESSIANS[0])
    leaf = {k: x.clone().requires_grad_() for k, x in HESSIANS[0].items()}
    by_autograd = torch.autograd.grad(loss(leaf), list(leaf.values()))

    assert any(x.abs().sum() for x in found.values())
    torch.testing.assert_close(list(found.values()), list(by_autograd))


@fo.elementwise(state={"mu": fo.zeros, "h": fo.zeros})
def sophia_without(u, mu, h):  # type: ignore[no-untyped-def]
    return u - h, mu + u, h * 0.5


def test_its_bytes_are_counted() -> None:
    params = {"w": torch.zeros(100)}

    explained, without = fo.explain(sophia(), params), fo.explain(sophia_without(), params)

    assert explained.bytes_read - without.bytes_read == 4
    assert "reads updates, params, hessian, sophia.mu, sophia.h" in str(explained)
    assert "reads updates, params, hessian, sophia.mu, sophia.h" in str(fo.explain(optimizer_of(sophia())[1]))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "none at all": ({"value": 1.0}, "sophia needs the extra argument `hessian`"),
    "a number": (
        {"hessian": 3.0, "value": 1.0},
        "the extra argument `hessian` is 3.0, but sophia takes a tree like the parameters, a tensor for each leaf",
    ),
    "one tensor": ({"hessian": torch.ones(2), "value": 1.0}, "is one tensor of shape (2,), but sophia takes a tree"),
    "another structure": (
        {"hessian": {"weight": FIRST["weight"]}, "value": 1.0},
        "the extra argument `hessian` does not have the structure of params: it lacks 'bias'",
    ),
    "none for a leaf": (
        {"hessian": {**HESSIANS[0], "bias": None}, "value": 1.0},
        "the extra argument `hessian` at 'bias' is None, but sophia computes an update for it",
    ),
    "another shape": (
        {"hessian": {**HESSIANS[0], "bias": torch.ones(9)}, "value": 1.0},
        "the extra argument `hessian` at 'bias' has shape (9,), but its update has",
    ),
    "another dtype": (
        {"hessian": {k: x.long() for k, x in FIRST.items()}, "value": 1.0},
        "has dtype torch.int64, expected float32, float64, bfloat16 or float16; pass `x.float()`",
    ),
    "a tree for a number": (
        {"hessian": HESSIANS[0], "value": HESSIANS[0]},
        "the extra argument `value` is a dict, but sophia takes a number; a rule that takes a tree",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    extra, message = REFUSED[name]
    params, state = clone(FIRST), sophia().init(FIRST)

    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        fo.apply_gradients(sophia(), params, GRADS[0], state, donate=True, **extra)

    assert_same_bits(params, FIRST)
    assert not any(x.any() for x in state.mu.values())


IN_OPTIMIZERS: dict[str, tuple[Any, str]] = {
    "a number": (3.0, "`hessian` is 3.0, but sophia takes a list, or a dict by name or by parameter"),
    "too few": ([torch.ones(2)], "`hessian` has 1 entries, but the optimizer has 3 parameters"),
    "an unknown name": ({"weigth": torch.ones(2)}, "has the key 'weigth', which is no parameter of the optimizer"),
    "a name missing": ({"weight": HESSIANS[0]["weight"]}, "at 'bias' is None, but sophia computes an update"),
    "text": ("weight", "`hessian` is str 'weight', but sophia takes a list"),
}


@pytest.mark.parametrize("name", IN_OPTIMIZERS)
def test_what_does_not_fit_an_optimizer_is_refused(name: str) -> None:
    value, message = IN_OPTIMIZERS[name]
    model, opt = optimizer_of(sophia())

    with pytest.raises(ValueError, match=re.escape(message)):
        opt.step(hessian=value, value=1.0)

    assert_same_bits({k: p.detach() for k, p in model.items()}, FIRST)
    assert not opt.state


def test_a_name_is_of_one_kind() -> None:
    @fo.elementwise(extra=("hessian",))
    def other(u, *, hessian):  # type: ignore[no-untyped-def]
        return u * hessian

    tx = fo.chain(sophia(), other())

    with pytest.raises(TypeError, match="`hessian` is a number for other and a tree for sophia; rename one"):
        fo.apply_gradients(tx, FIRST, GRADS[0], tx.init(FIRST), hessian=HESSIANS[0], value=1.0)


def test_declarations_that_are_refused() -> None:
    def rule(u, *, params):  # type: ignore[no-untyped-def]
        return u

    with pytest.raises(ValueError, match='"number" or "element"'):
        fo.elementwise(extra={"params": "leaf"})(rule)
    with pytest.raises(TypeError, match="`params` of rule is no name for an extra argument"):
        fo.elementwise(extra={"params": "element"})(rule)


def test_a_compiled_step_with_it() -> None:
    model, opt = optimizer_of(sophia())
    other, eager = optimizer_of(sophia())

    torch.compile(opt.step, backend="eager")(hessian=list(HESSIANS[0].values()), value=1.0)
    eager.step(hessian=list(HESSIANS[0].values()), value=1.0)

    assert_same_bits({k: p.detach() for k, p in model.items()}, {k: p.detach() for k, p in other.items()})
    torch.compiler.reset()
    with pytest.raises(Exception, match="with an extra argument that is no number is a graph break"):
        torch.compile(opt.step, backend="eager", fullgraph=True)(hessian=list(HESSIANS[0].values()), value=1.0)
