"""Numbers that a rule keeps for the whole tree: one in the pure functions, one that parameters share in optimizers."""

import copy
import io
import pickle
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.backends import BACKENDS, only
from _lib.chains import is_matrix
from _lib.compare import DOUBLE, assert_same_bits
from _lib.marks import INTERPRETER
from _lib.trees import clone, make_tree
from functional_optim.adapters import TransformOptimizer


pytestmark = INTERPRETER
STEPS = 20
D0 = 1e-3
TREE = fo.slot(per="tree")


@fo.elementwise(
    state={
        "x0": fo.slot("param"),
        "mu": fo.zeros,
        "nu": fo.zeros,
        "s": fo.zeros,
        "d": fo.slot("d0", per="tree"),
        "r": fo.slot(per="tree"),
    }
)
def prodigy(u, p, x0, mu, nu, s, d, r, *, learning_rate=1.0, b1=0.9, b2=0.81, eps=1e-8, d0=D0):  # type: ignore[no-untyped-def]
    root = torch.sqrt(b2)
    mu = b1 * mu + (1 - b1) * d * u
    nu = b2 * nu + (1 - b2) * d * d * u * u
    r = root * r + (1 - root) * learning_rate * d * d * fo.tree_sum(u * (x0 - p))
    s = root * s + (1 - root) * learning_rate * d * d * u
    larger = torch.maximum(d, r / fo.tree_sum(torch.abs(s)))
    return -learning_rate * d * mu / (torch.sqrt(nu) + d * eps), x0, mu, nu, s, larger, r


@fo.elementwise(state={"norm": TREE})
def watched(u, norm):  # type: ignore[no-untyped-def]
    return u, fo.tree_norm(u)


class ByHand:
    """Prodigy in torch operations, with one `d`; a leaf without gradient is left out of a step."""

    def __init__(self, params: dict[str, Any]) -> None:
        self.params, self.x0, self.d, self.r = clone(params), clone(params), D0, 0.0
        self.mu, self.nu, self.s = ({k: torch.zeros_like(p) for k, p in params.items()} for _ in range(3))

    def step(self, grads: dict[str, Any], rate: float = 1.0) -> None:
        here = {k: g for k, g in grads.items() if g is not None}
        self.r = 0.9 * self.r + 0.1 * rate * self.d**2 * sum(
            float((g * (self.x0[k] - self.params[k])).sum()) for k, g in here.items()
        )
        for k, g in here.items():
            self.mu[k] = 0.9 * self.mu[k] + 0.1 * self.d * g
            self.nu[k] = 0.81 * self.nu[k] + 0.19 * self.d**2 * g * g
            self.s[k] = 0.9 * self.s[k] + 0.1 * rate * self.d**2 * g
            self.params[k] = self.params[k] - rate * self.d * self.mu[k] / (self.nu[k].sqrt() + self.d * 1e-8)
        self.d = max(self.d, self.r / sum(float(self.s[k].abs().sum()) for k in here))


FIRST = make_tree(0)
TARGET = make_tree(1)


def slope(params: dict[str, Any]) -> dict[str, Any]:
    return {k: (p - TARGET[k]).detach() for k, p in params.items()}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_number_for_the_tree(backend: str, donate: bool) -> None:
    tx, params, expected = prodigy(), clone(FIRST), ByHand(FIRST)
    state = tx.init(params)

    with only(backend):
        for _ in range(4 if backend == "triton" else STEPS):  # Triton's interpreter is slow
            grads = slope(params)
            expected.step(grads)
            params, state = fo.apply_gradients(tx, params, grads, state, donate=donate)

    assert (state.d.shape, state.d.dtype) == ((), torch.float64)
    assert expected.d > 10 * D0 or backend == "triton"
    torch.testing.assert_close(params, expected.params, **DOUBLE)
    torch.testing.assert_close([float(state.d), float(state.r)], [expected.d, expected.r], **DOUBLE)


@pytest.mark.parametrize("donate", [False, True])
def test_a_step_without_any_gradient_leaves_it(donate: bool) -> None:
    """After one with all of them, for which the step is bound."""
    tx, params = watched(), clone(FIRST)
    params, state = fo.apply_gradients(tx, params, slope(params), tx.init(params), donate=donate)
    before = clone((params, state))

    after = fo.apply_gradients(tx, params, dict.fromkeys(params), state, donate=donate)

    assert_same_bits(after, before)


def optimizer_of(tx: Any, groups: Callable[[dict[str, Any]], Any] = lambda m: list(m.items())) -> Any:
    model = {k: torch.nn.Parameter(p.clone()) for k, p in FIRST.items()}
    return model, TransformOptimizer(groups(model), tx)


def step(model: dict[str, Any], opt: Any, without: Sequence[str] = ()) -> dict[str, Any]:
    grads = {k: None if k in without else g for k, g in slope(model).items()}
    for k, p in model.items():
        p.grad = grads[k]
    opt.step()
    return grads


def values(model: dict[str, Any]) -> dict[str, Any]:
    return {k: p.detach() for k, p in model.items()}


ABSENT: dict[str, Callable[[int], tuple[str, ...]]] = {
    "never": lambda t: (),
    "a parameter joins later": lambda t: ("bias",) if t < 10 else (),
    "the first one joins later": lambda t: ("weight",) if t < 10 else (),
    "in turns": lambda t: (("weight",), ("bias", "scale"), ())[t % 3],
}


@pytest.mark.parametrize("when", ABSENT)
def test_parameters_of_an_optimizer_share_it(when: str) -> None:
    model, opt = optimizer_of(prodigy())
    expected = ByHand(FIRST)

    for t in range(STEPS):
        expected.step(step(model, opt, ABSENT[when](t)))

    torch.testing.assert_close(values(model), expected.params, **DOUBLE)
    assert len({id(opt.state[p]["d"]) for p in model.values()}) == 1
    torch.testing.assert_close(float(opt.state[model["weight"]]["d"]), expected.d, **DOUBLE)


GROUPS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "numbers": lambda m: [
        {"params": [("weight", m["weight"])]},
        {"params": [(k, m[k]) for k in m if k != "weight"], "d0": 1.0},
    ],
    "switches": lambda m: [
        {"params": [("weight", m["weight"])]},
        {"params": [(k, m[k]) for k in m if k != "weight"], "maximize": True},
    ],
}


@pytest.mark.parametrize("kind", GROUPS)
def test_groups_share_it(kind: str) -> None:
    model, opt = optimizer_of(prodigy(), GROUPS[kind])
    expected = ByHand(FIRST)

    for _ in range(STEPS):
        grads = slope(model)
        expected.step(grads)
        for k, p in model.items():
            p.grad = -grads[k] if kind == "switches" and k != "weight" else grads[k]
        opt.step()

    torch.testing.assert_close(values(model), expected.params, **DOUBLE)
    assert len({id(opt.state[p]["d"]) for p in model.values()}) == 1


def test_a_step_after_one_in_inference_mode() -> None:
    """Copies of the number, which an optimizer keeps, are no tensors of inference mode then."""
    (expected, other), (model, opt) = optimizer_of(prodigy()), optimizer_of(prodigy())
    for mode in (True, False, True, False):
        step(expected, other)
        with torch.inference_mode(mode):
            step(model, opt)
    assert_same_bits(values(model), values(expected))


def test_it_is_set_for_all_parameters() -> None:
    model, opt = optimizer_of(prodigy())
    step(model, opt)
    before = clone(values(model))
    opt.state[model["bias"]]["d"] = torch.tensor(0.5, dtype=torch.float64)

    with pytest.raises(
        ValueError, match=r"'d' is one number for all parameters, but it is tensor\(0.5.* at 'bias' and "
    ):
        step(model, opt)

    assert_same_bits(values(model), before)
    for p in model.values():
        opt.state[p]["d"] = torch.tensor(0.5, dtype=torch.float64)
    step(model, opt)
    assert all(opt.state[p]["d"] is opt.state[model["weight"]]["d"] for p in model.values())


def through_a_file(opt: Any) -> Any:
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_checkpoint_holds_it() -> None:
    model, opt = optimizer_of(prodigy())
    for t in range(10):
        step(model, opt, ("bias",) if t < 9 else ())
    other = {k: torch.nn.Parameter(p.detach().clone()) for k, p in model.items()}
    resumed = TransformOptimizer(list(other.items()), prodigy())

    resumed.load_state_dict(through_a_file(opt))
    for t in range(10):
        step(model, opt, ("scale",) if t < 5 else ())
        step(other, resumed, ("scale",) if t < 5 else ())

    assert_same_bits(values(other), values(model))
    assert_same_bits([opt.state[p] for p in model.values()], [resumed.state[p] for p in other.values()])
    assert len({id(resumed.state[p]["d"]) for p in other.values()}) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alike(copied: Callable[[Any], Any]) -> None:
    model, opt = optimizer_of(prodigy())
    for _ in range(3):
        step(model, opt)
    twin = copied(opt)
    other = dict(zip(model, (p for group in twin.param_groups for p in group["params"]), strict=True))

    for _ in range(3):
        step(model, opt)
        step(other, twin)

    assert_same_bits(values(other), values(model))


def test_a_mask_narrows_the_tree() -> None:
    tx = fo.masked(prodigy(), is_matrix)
    expected = ByHand({"weight": FIRST["weight"]})
    params, state = clone(FIRST), tx.init(FIRST)
    model, opt = optimizer_of(tx)

    for _ in range(3):
        expected.step({"weight": slope(params)["weight"]})
        params, state = fo.apply_gradients(tx, params, slope(params), state, donate=True)
        step(model, opt)

    torch.testing.assert_close(params["weight"], expected.params["weight"], **DOUBLE)
    torch.testing.assert_close(float(state.inner_state.d), expected.d, **DOUBLE)
    torch.testing.assert_close(values(model)["weight"], expected.params["weight"], **DOUBLE)
    assert opt.state[model["bias"]] == {}


def test_before_an_opaque_transformation() -> None:
    tx = fo.chain(watched(), fo.stateless(lambda u, p: u), fo.sgd(0.1))
    model, opt = optimizer_of(tx)
    state = tx.init(FIRST)

    grads = step(model, opt)
    step(model, opt, ("bias",))
    _, state = fo.apply_gradients(tx, FIRST, grads, state, donate=True)

    norm = torch.cat([g.flatten() for g in grads.values()]).norm()
    torch.testing.assert_close(state[0].norm, norm, **DOUBLE)
    assert len({id(opt.state[p]["norm"]) for p in model.values()}) == 1
    assert 0 < opt.state[model["bias"]]["norm"] < norm


def test_a_step_that_autograd_records() -> None:
    model = {k: torch.nn.Parameter(p.clone()) for k, p in FIRST.items()}
    opt = TransformOptimizer(list(model.items()), prodigy(), differentiable=True)
    expected = ByHand(FIRST)
    copies = {k: p.clone() for k, p in model.items()}
    opt.param_groups[0]["params"] = list(copies.values())

    for _ in range(3):
        expected.step(step(copies, opt))

    torch.testing.assert_close(values(copies), expected.params, **DOUBLE)
    assert len({id(opt.state[p]["d"]) for p in copies.values()}) == 1


def test_derivatives_by_it() -> None:
    state = prodigy().init(FIRST)

    def loss(d: Any) -> Any:
        params, _ = fo.apply_gradients(prodigy(), FIRST, slope(FIRST), state._replace(d=d))
        return sum((p * p).sum() for p in params.values())

    d, h = torch.tensor(0.5, dtype=torch.float64), 1e-6
    found = torch.func.grad(loss)(d)

    torch.testing.assert_close(found, (loss(d + h) - loss(d - h)) / (2 * h), rtol=1e-6, atol=1e-6)


def test_a_watched_number_costs_no_bytes_per_element() -> None:
    params = {f"w{k}": torch.zeros(100, 100) for k in range(3)}
    tx = fo.chain(watched(), fo.sgd(0.1))

    explained, without = fo.explain(tx, params), fo.explain(fo.sgd(0.1), params)

    assert explained.bytes_per_element == without.bytes_per_element
    assert explained.state_bytes * explained.parameters == 4
    model = [torch.nn.Parameter(torch.zeros(100, 100)) for _ in range(3)]
    assert fo.explain(TransformOptimizer(model, tx)).state_bytes * explained.parameters == 4


def a_leaf(u, n):  # type: ignore[no-untyped-def]
    return u, fo.leaf_norm(u)


def an_element(u, n):  # type: ignore[no-untyped-def]
    return u, u + n


def a_size(u, n):  # type: ignore[no-untyped-def]
    return u, fo.tree_sum(u) + fo.leaf_mean(u)


def a_slot(u, n, own):  # type: ignore[no-untyped-def]
    return u, n + 2 * own, own + fo.leaf_sum(u)


PARTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a leaf": (a_leaf, {}, "the new value of `n` follows from a reduction of a leaf, which differs from leaf to leaf"),
    "an element": (an_element, {}, "the new value of `n` differs per element, but its slot holds one number per tree"),
    "a size": (a_size, {}, "the new value of `n` follows from"),
    "a slot": (a_slot, {"own": fo.slot(per="leaf")}, "the new value of `n` follows from the slot `own`, which differs"),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_follows_from_one_leaf_is_refused(name: str) -> None:
    fn, others, message = PARTS[name]
    tx = fo.elementwise(state={"n": TREE, **others})(fn)()

    with pytest.raises(fo.RuleError, match=re.escape(message)):
        tx.update(FIRST, tx.init(FIRST))


def test_schedules_and_steps_are_the_same_for_all_leaves() -> None:
    @fo.elementwise(state={"n": TREE})
    def counted(u, n, *, step, rate):  # type: ignore[no-untyped-def]
        return u * n, n + rate * step

    tx = counted(fo.linear_schedule(1.0, 0.0, 2))
    state = tx.init(FIRST)

    for _ in range(2):
        _, state = tx.update(FIRST, state)

    assert float(state.n) == 1.0 * 1 + 0.5 * 2


def test_declarations_and_states_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one number per tree starts from a number, got start='param'"):
        fo.slot("param", per="tree")
    with pytest.raises(ValueError, match='`per` must be "element", "leaf" or "tree"'):
        fo.slot(per="row")  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match="`norm` of watched is declared per element or per tree, but the rule is called"
    ):
        fo.leafwise(state={"norm": TREE})(watched.rule.fn)
    state = prodigy().init(FIRST)
    for bad in (1.0, FIRST, torch.zeros(2), torch.zeros((), dtype=torch.int64)):
        with pytest.raises(
            ValueError, match=r"state prodigy\.d is .*, expected a tensor that holds one floating number"
        ):
            fo.apply_gradients(prodigy(), FIRST, FIRST, state._replace(d=bad))
