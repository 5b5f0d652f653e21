"""Numbers: formulas of the papers in NumPy, NaN and infinities, and where half types are rounded."""

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import optree
import pytest
import torch

import functional_optim as fo
from _lib.marks import OPTIMIZED
from _lib.records import ATOL, BACKENDS, RTOL, gradients, normal, run_params, stack, use
from _lib.trees import Tree


pytestmark = OPTIMIZED

HALF = (torch.bfloat16, torch.float16)
backends = pytest.mark.parametrize("backend", BACKENDS)


# ---- the papers' formulas, in NumPy's double precision, for all leaves of a tree at once

STEPS = 30
Leaves = list[np.ndarray]


def adam(x: Leaves, gradients: list[Leaves]) -> Iterator[Leaves]:
    """Kingma & Ba 2015, algorithm 1."""
    alpha, b1, b2, eps = 1e-2, 0.9, 0.999, 1e-8
    m, v = ([0 * a for a in x] for _ in range(2))
    for t, g in enumerate(gradients, 1):
        m = [b1 * a + (1 - b1) * b for a, b in zip(m, g, strict=True)]
        v = [b2 * a + (1 - b2) * b**2 for a, b in zip(v, g, strict=True)]
        m_hat = [a / (1 - b1**t) for a in m]
        v_hat = [a / (1 - b2**t) for a in v]
        x = [a - alpha * b / (np.sqrt(c) + eps) for a, b, c in zip(x, m_hat, v_hat, strict=True)]
        yield x


def rmsprop(x: Leaves, gradients: list[Leaves]) -> Iterator[Leaves]:
    """Tieleman & Hinton 2012, lecture 6.5, with a term in the root against division by 0."""
    alpha, eps = 1e-2, 1e-8
    mean_square = [0 * a for a in x]
    for g in gradients:
        mean_square = [0.9 * a + 0.1 * b**2 for a, b in zip(mean_square, g, strict=True)]
        x = [a - alpha * b / np.sqrt(c + eps) for a, b, c in zip(x, g, mean_square, strict=True)]
        yield x


def lion(x: Leaves, gradients: list[Leaves]) -> Iterator[Leaves]:
    """Chen et al. 2023, algorithm 2."""
    eta, b1, b2, weight_decay = 1e-3, 0.9, 0.99, 0.1
    m = [0 * a for a in x]
    for g in gradients:
        c = [b1 * a + (1 - b1) * b for a, b in zip(m, g, strict=True)]
        x = [a - eta * (np.sign(b) + weight_decay * a) for a, b in zip(x, c, strict=True)]
        m = [b2 * a + (1 - b2) * b for a, b in zip(m, g, strict=True)]
        yield x


def lamb(x: Leaves, gradients: list[Leaves]) -> Iterator[Leaves]:
    """You et al. 2020, algorithm 2, with phi the identity."""
    eta, b1, b2, eps, weight_decay = 1e-2, 0.9, 0.999, 1e-6, 0.1
    m, v = ([0 * a for a in x] for _ in range(2))
    for t, g in enumerate(gradients, 1):
        m = [b1 * a + (1 - b1) * b for a, b in zip(m, g, strict=True)]
        v = [b2 * a + (1 - b2) * b**2 for a, b in zip(v, g, strict=True)]
        r = [a / (1 - b1**t) / (np.sqrt(b / (1 - b2**t)) + eps) for a, b in zip(m, v, strict=True)]
        u = [a + weight_decay * b for a, b in zip(r, x, strict=True)]
        x = [a - eta * np.linalg.norm(a.ravel()) / np.linalg.norm(b.ravel()) * b for a, b in zip(x, u, strict=True)]
        yield x


def clipped_adamw(x: Leaves, gradients: list[Leaves]) -> Iterator[Leaves]:
    """Pascanu et al. 2013, algorithm 1, before Loshchilov & Hutter 2019, algorithm 2; yields averages too."""
    max_norm, alpha, b1, b2, eps, weight_decay, decay = 5.0, 1e-2, 0.9, 0.999, 1e-8, 0.1, 0.8
    m, v, average = [0 * a for a in x], [0 * a for a in x], x
    for t, g in enumerate(gradients, 1):
        norm = math.sqrt(sum(np.sum(a**2) for a in g))
        g = [a * min(1, max_norm / norm) for a in g]
        m = [b1 * a + (1 - b1) * b for a, b in zip(m, g, strict=True)]
        v = [b2 * a + (1 - b2) * b**2 for a, b in zip(v, g, strict=True)]
        x = [
            a - alpha * (b / (1 - b1**t) / (np.sqrt(c / (1 - b2**t)) + eps) + weight_decay * a)
            for a, b, c in zip(x, m, v, strict=True)
        ]
        average = [decay * a + (1 - decay) * b for a, b in zip(average, x, strict=True)]
        yield [*x, *average]


PAPERS = [
    ("adam", fo.adam(1e-2), adam),
    ("rmsprop", fo.rmsprop(1e-2), rmsprop),
    ("lion", fo.lion(1e-3, weight_decay=0.1), lion),
    ("lamb", fo.lamb(1e-2, weight_decay=0.1), lamb),
]


def by_paper(formula: Callable[[Leaves, list[Leaves]], Iterator[Leaves]]) -> list[torch.Tensor]:
    """The leaves that a formula leads to, with the step as their first dimension."""

    def arrays(tree: Tree) -> Leaves:
        return [x.numpy() for x in optree.tree_leaves(tree)]

    steps = formula(arrays(normal(1000)), [arrays(gradients("normal", step)) for step in range(STEPS)])
    return [torch.from_numpy(np.stack(leaf)) for leaf in zip(*steps, strict=True)]


@backends
@pytest.mark.parametrize(("name", "tx", "formula"), PAPERS, ids=[name for name, _, _ in PAPERS])
def test_parameters_follow_the_paper(name: str, tx: Any, formula: Any, backend: str) -> None:
    actual = optree.tree_leaves(run_params(tx, backend, steps=STEPS))
    torch.testing.assert_close(actual, by_paper(formula), rtol=RTOL, atol=ATOL)


@backends
def test_clipped_and_averaged_adamw_follows_the_papers(backend: str) -> None:
    tx = fo.chain(fo.clip_by_global_norm(5.0), fo.adamw(1e-2, weight_decay=0.1), fo.params_ema(0.8))
    params, records = normal(1000), []
    state = tx.init(params)
    for step in range(STEPS):
        with use(backend, step):
            params, state = fo.apply_gradients(tx, params, gradients("normal", step), state)
        records.append((params, fo.eval_params(state, params)))
    actual = optree.tree_leaves(stack(records))
    torch.testing.assert_close(actual, by_paper(clipped_adamw), rtol=RTOL, atol=ATOL)


# ---- NaN and infinities flow as in torch


def norm_of(*xs: torch.Tensor) -> torch.Tensor:
    return torch.cat(xs).norm()


def trust(u: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return u * (p.norm() / u.norm())


NAN, INF = math.nan, math.inf
PARAMS = [
    torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 2.0, 4.0, 0.25], dtype=torch.float64),
    torch.ones(3, dtype=torch.float64),
]
BAD = {
    "nan": torch.tensor([1.0, NAN, -1.0, 0.0, 2.0, -0.5, 1e300, 0.1], dtype=torch.float64),
    "inf": torch.tensor([1.0, INF, -INF, 0.0, 2.0, -0.5, 1e300, 0.1], dtype=torch.float64),
    "both": torch.tensor([1.0, INF, -INF, NAN, 2.0, -0.5, 0.0, 0.1], dtype=torch.float64),
}
FINE = torch.tensor([1.0, -2.0, 2.0], dtype=torch.float64)


class Flow(NamedTuple):
    """A transformation and its first update, in torch's operations.

    Args:
      tx: the transformation.
      formula: the update of a leaf, from the leaf of the gradient, that of the parameters, and all of the gradient.
    """

    tx: Any
    formula: Callable[[torch.Tensor, torch.Tensor, list[torch.Tensor]], torch.Tensor]


FLOWS = {
    "scale": Flow(fo.scale(0.0), lambda u, p, g: 0.0 * u),
    "scale_by_learning_rate": Flow(fo.scale_by_learning_rate(2.0), lambda u, p, g: -2.0 * u),
    "learning_rate_nan": Flow(fo.scale_by_learning_rate(torch.tensor(NAN)), lambda u, p, g: u * NAN),
    "learning_rate_inf": Flow(fo.scale_by_schedule(lambda count: INF), lambda u, p, g: u * INF),
    "scale_by_sign": Flow(fo.scale_by_sign(), lambda u, p, g: torch.sign(u)),
    "set_to_zero": Flow(fo.set_to_zero(), lambda u, p, g: torch.zeros_like(u)),
    "trace": Flow(fo.trace(0.9, nesterov=True), lambda u, p, g: u + 0.9 * u),
    "ema": Flow(fo.ema(0.9), lambda u, p, g: (0.1 * u) / 0.1),
    "scale_by_adam": Flow(fo.scale_by_adam(), lambda u, p, g: u / (torch.sqrt(u * u) + 1e-8)),
    "scale_by_amsgrad": Flow(fo.scale_by_amsgrad(), lambda u, p, g: u / (torch.sqrt(u * u) + 1e-8)),
    "scale_by_rms": Flow(fo.scale_by_rms(), lambda u, p, g: u * torch.rsqrt(0.1 * u * u + 1e-8)),
    "scale_by_rms_out": Flow(fo.scale_by_rms(eps_in_sqrt=False), lambda u, p, g: u / (torch.sqrt(0.1 * u * u) + 1e-8)),
    "scale_by_stddev": Flow(
        fo.scale_by_stddev(), lambda u, p, g: u * torch.rsqrt(0.1 * u * u - (0.1 * u) * (0.1 * u) + 1e-8)
    ),
    "scale_by_lion": Flow(fo.scale_by_lion(), lambda u, p, g: torch.sign(u)),
    "scale_by_lion_smooth": Flow(fo.scale_by_lion(mode="smooth"), lambda u, p, g: torch.tanh(0.1 * u)),
    "scale_by_lion_refined": Flow(
        fo.scale_by_lion(mode="refined"), lambda u, p, g: torch.where((0.1 * u).abs() < 1, 0.1 * u, torch.sign(u))
    ),
    "scale_by_trust_ratio": Flow(fo.scale_by_trust_ratio(), lambda u, p, g: trust(u, p)),
    "add_decayed_weights": Flow(fo.add_decayed_weights(0.1), lambda u, p, g: u + 0.1 * p),
    "clip": Flow(fo.clip(1.5), lambda u, p, g: torch.clamp(u, -1.5, 1.5)),
    "clip_by_global_norm": Flow(fo.clip_by_global_norm(1.0), lambda u, p, g: u / norm_of(*g)),
    "clip_by_block_rms": Flow(fo.clip_by_block_rms(1.0), lambda u, p, g: u / torch.clamp((u * u).mean().sqrt(), min=1)),
    "zero_nans": Flow(fo.zero_nans(), lambda u, p, g: torch.where(torch.isnan(u), 0.0, u)),
    "params_ema": Flow(fo.params_ema(0.9), lambda u, p, g: u),
    "params_swa": Flow(fo.params_swa(1), lambda u, p, g: u),
}


@backends
@pytest.mark.parametrize(("name", "bad"), list(product(FLOWS, BAD)), ids=map("-".join, product(FLOWS, BAD)))
def test_nan_and_inf_flow_as_in_torch(name: str, bad: str, backend: str) -> None:
    tx, formula = FLOWS[name]
    grads = [BAD[bad], FINE]
    with use(backend):
        actual, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    expected = [formula(u, p, grads) for u, p in zip(grads, PARAMS, strict=True)]
    torch.testing.assert_close(actual, expected, rtol=RTOL, atol=0, equal_nan=True)


@backends
@pytest.mark.parametrize("bad", [NAN, INF])
def test_an_element_gone_bad_stays_bad_and_alone(bad: float, backend: str) -> None:
    tx = fo.chain(fo.trace(0.9), fo.scale_by_amsgrad(), fo.add_decayed_weights(0.1), fo.scale_by_learning_rate(1e-2))

    def final(value: float) -> torch.Tensor:
        params = torch.linspace(-1, 1, 50, dtype=torch.float64)
        state = tx.init(params)
        for step in range(3):
            grads = torch.linspace(-2, 3, 50, dtype=torch.float64)
            grads[17] = value if step == 0 else 1.0
            with use(backend, step):
                params, state = fo.apply_gradients(tx, params, grads, state)
        return params

    actual, expected = final(bad), final(1.0)
    expected[17] = NAN
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@backends
def test_zero_nans_reports_the_leaves_that_held_nan(backend: str) -> None:
    tx = fo.zero_nans()
    state = tx.init(PARAMS)
    found = []
    for step, grads in enumerate(([BAD["nan"], FINE], [BAD["inf"], FINE], [FINE[:1].expand(8), FINE * NAN])):
        with use(backend, step):
            _, state = tx.update(grads, state)
        found.append([x.item() for x in state.found_nan])
    assert found == [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]


# ---- dtypes: computed in float32, or float64 if any tensor of the leaf is, and rounded once, when stored


def cast(tree: Tree, dtype: torch.dtype) -> Tree:
    """A tree with its floating tensors in another dtype; counters stay."""
    return optree.tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, tree)


def cast_like(tree: Tree, like: Tree) -> Tree:
    return optree.tree_map(lambda x, y: x.to(y.dtype), tree, like)


def check_rounded_once(
    narrow: Any, wide: Any, params: torch.dtype, grads: torch.dtype, backend: str, apply: bool = True
) -> None:
    """Holds steps in narrow dtypes against the same steps in the dtype computed in, rounded.

    Both sides do the same operations on the same numbers in the same order, on one backend, so no bit may differ.
    """
    compute = torch.float64 if torch.float64 in (params, grads) else torch.float32
    x = normal(1000, params)
    state = narrow.init(x)
    for step in range(3):
        g = normal(step, grads)
        with use("c" if backend == "triton" and step < 2 else backend):
            if apply:
                new, after = fo.apply_gradients(narrow, x, g, state)
                expected = fo.apply_gradients(wide, cast(x, compute), cast(g, compute), cast(state, compute))
            else:
                new, after = narrow.update(g, state, x)
                expected = wide.update(cast(g, compute), cast(state, compute), cast(x, compute))
        torch.testing.assert_close((new, after), cast_like(expected, (new, after)), rtol=0, atol=0)
        dtype = params if apply else torch.promote_types(params, grads)
        assert {leaf.dtype for leaf in optree.tree_leaves(new)} == {dtype}
        assert [leaf.dtype for leaf in optree.tree_leaves(after)] == [leaf.dtype for leaf in optree.tree_leaves(state)]
        x, state = (new if apply else x), after


OPTIMIZERS = {
    "sgd": fo.sgd(0.1, 0.9, True),
    "adamw": fo.adamw(1e-2, weight_decay=0.1),
    "nadam": fo.nadam(1e-2),
    "amsgrad": fo.amsgrad(1e-2),
    "rmsprop": fo.rmsprop(1e-2, centered=True, momentum=0.9, initial_scale=0.5),
    "lion": fo.lion(1e-2),
    "lars": fo.lars(0.1, 0.1),
    "lamb": fo.lamb(1e-2, weight_decay=0.1),
    "signum": fo.signum(1e-2),
    "recipe": fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(fo.linear_schedule(0.1, 0.0, 9)), fo.params_ema(0.9)),
}


@pytest.mark.slow
@backends
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_half_types_are_rounded_once(name: str, dtype: torch.dtype, backend: str) -> None:
    check_rounded_once(OPTIMIZERS[name], OPTIMIZERS[name], dtype, dtype, backend)


MIXED = [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16),
    (torch.float64, torch.float32),
    (torch.float32, torch.float64),
    (torch.bfloat16, torch.float64),
]
mixed = pytest.mark.parametrize(("params", "grads"), MIXED, ids=[f"{p}-{g}".replace("torch.", "") for p, g in MIXED])


@pytest.mark.slow
@backends
@mixed
@pytest.mark.parametrize("apply", [True, False], ids=["params", "updates"])
def test_mixed_dtypes_are_rounded_once(params: torch.dtype, grads: torch.dtype, apply: bool, backend: str) -> None:
    check_rounded_once(OPTIMIZERS["recipe"], OPTIMIZERS["recipe"], params, grads, backend, apply)


f32, bf16 = torch.float32, torch.bfloat16
SLOTS = {
    "adam-mu": (fo.adam(1e-2, mu_dtype=bf16), fo.adam(1e-2), {"mu": bf16, "nu": f32}),
    "adam-nu": (fo.adam(1e-2, nu_dtype=bf16), fo.adam(1e-2), {"mu": f32, "nu": bf16}),
    "adamw-both": (
        fo.adamw(1e-2, mu_dtype=bf16, nu_dtype=torch.float16),
        fo.adamw(1e-2),
        {"mu": bf16, "nu": torch.float16},
    ),
    "nadam-mu": (fo.nadam(1e-2, mu_dtype=bf16), fo.nadam(1e-2), {"mu": bf16, "nu": f32}),
    "amsgrad-mu": (fo.amsgrad(1e-2, mu_dtype=bf16), fo.amsgrad(1e-2), {"mu": bf16, "nu": f32, "nu_max": f32}),
    "lion-mu": (fo.lion(1e-2, mu_dtype=bf16), fo.lion(1e-2), {"mu": bf16}),
    "sgd-accumulator": (fo.sgd(0.1, 0.9, True, bf16), fo.sgd(0.1, 0.9, True), {"trace": bf16}),
    "signum-accumulator": (fo.signum(0.1, accumulator_dtype=bf16), fo.signum(0.1), {"ema": bf16}),
    "ema-accumulator": (fo.chain(fo.ema(0.9, True, bf16)), fo.chain(fo.ema(0.9)), {"ema": bf16}),
    "params_ema-accumulator": (
        fo.chain(fo.scale(-0.1), fo.params_ema(0.9, bf16)),
        fo.chain(fo.scale(-0.1), fo.params_ema(0.9)),
        {"ema": bf16},
    ),
    "params_swa-accumulator": (
        fo.chain(fo.scale(-0.1), fo.params_swa(1, accumulator_dtype=bf16)),
        fo.chain(fo.scale(-0.1), fo.params_swa(1)),
        {"swa": bf16, "n_averaged": f32},
    ),
}
slots = pytest.mark.parametrize("name", SLOTS)


@backends
@slots
def test_a_narrow_slot_is_rounded_once_and_the_step_is_not(name: str, backend: str) -> None:
    narrow, wide, _ = SLOTS[name]
    check_rounded_once(narrow, wide, torch.float32, torch.float32, backend)


@slots
def test_a_slot_has_the_dtype_asked_for(name: str) -> None:
    narrow, _, dtypes = SLOTS[name]
    found = {}
    for state in narrow.init(normal(0, torch.float32)):
        for slot in set(state._fields) - {"count"}:
            found[slot], *_ = {x.dtype for x in optree.tree_leaves(getattr(state, slot))}
    assert found == dtypes


WIDE_SLOTS = {
    "adam": (
        fo.adam(1e-2, mu_dtype=torch.float32, nu_dtype=torch.float32),
        fo.adam(1e-2),
    ),
    "params_ema": (
        fo.chain(fo.sgd(0.1, 0.9, accumulator_dtype=torch.float32), fo.params_ema(0.9, torch.float32)),
        fo.chain(fo.sgd(0.1, 0.9), fo.params_ema(0.9)),
    ),
}


@backends
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", WIDE_SLOTS)
def test_a_wide_slot_of_a_half_parameter_is_not_rounded(name: str, dtype: torch.dtype, backend: str) -> None:
    narrow, wide = WIDE_SLOTS[name]
    check_rounded_once(narrow, wide, dtype, dtype, backend)


@backends
@pytest.mark.parametrize("step", [1, 2, 10, 1000])
def test_corrections_are_computed_in_double_precision(step: int, backend: str) -> None:
    # A step in float32 takes 12 operations of relative error 2**-24 each, all on positive numbers but for the sign of
    # mu: 24 times that is a bound. 1 - 0.999**step in float32 would be wrong by up to 2**-24 / 0.001 at the first
    # step, 500 times as much.
    tx = fo.scale_by_adam()
    u, nu = torch.linspace(0.5, 2, 100), torch.linspace(0.1, 1, 100)
    state = tx.init(u)._replace(count=torch.tensor(step - 1), mu=u.flip(0), nu=nu)
    with use(backend):
        actual, _ = tx.update(u, state)
    mu = 0.9 * u.flip(0).double() + (1 - 0.9) * u.double()
    nu = 0.999 * nu.double() + (1 - 0.999) * u.double() ** 2
    expected = mu / (1 - 0.9**step) / (torch.sqrt(nu / (1 - 0.999**step)) + 1e-8)
    torch.testing.assert_close(actual.double(), expected, rtol=24 * 2.0**-24, atol=0)


@backends
def test_norms_of_half_types_do_not_overflow(backend: str) -> None:
    # squares of 400 and their sum are beyond 65504, the largest float16
    grads = {"a": torch.full((30, 20), 400.0).half(), "b": torch.full((7,), -300.0).half()}
    params = {"a": torch.full((30, 20), 500.0).half(), "b": torch.full((7,), 600.0).half()}
    tx = fo.chain(fo.clip_by_global_norm(1000.0), fo.clip_by_block_rms(0.5), fo.scale_by_trust_ratio())
    with use(backend):
        actual, _ = tx.update(grads, tx.init(params), params)
    # each leaf is constant, so every rescaling leaves it so, and the last gives it the length of its parameter; the
    # four roundings to float32 on the way are far less than half a unit of float16, on whose grid the results are
    expected = {"a": torch.full((30, 20), 500.0).half(), "b": torch.full((7,), -600.0).half()}
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@backends
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_clipped_half_gradient_is_rounded_once(dtype: torch.dtype, backend: str) -> None:
    grads = {"a": torch.full((30, 20), 400.0).to(dtype), "b": torch.linspace(-300, 500, 7).to(dtype)}
    tx = fo.clip_by_global_norm(10.0)
    with use(backend):
        actual, _ = tx.update(grads, tx.init(grads))
    wide = {k: g.double() for k, g in grads.items()}
    norm = torch.cat([g.flatten() for g in wide.values()]).norm()
    # float32 operations before the last rounding may tip it the other way where a value is near the middle of two
    # neighbours: one unit in the last place, 2**-7 and 2**-10 of the value
    expected = {k: (g / norm * 10.0).to(dtype) for k, g in wide.items()}
    torch.testing.assert_close(actual, expected, rtol=torch.finfo(dtype).eps, atol=0)
