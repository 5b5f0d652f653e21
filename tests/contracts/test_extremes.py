"""Every transformation of the table over zero, tiny, huge, equal and mixed numbers, and at the bounds of its numbers.

Values are held against the same steps in float64, whose range all of these numbers are far from leaving; the tests of
`test_transforms.py` hold float64 against optax.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import optree
import pytest
import torch

import functional_optim as fo
from _lib.extremes import BF16, BOUNDS, F16, F32, F64, KINDS, cancels, cast, gradients, stores_squares, tree
from _lib.records import BACKENDS, use
from _lib.transforms import CASES, IDS
from _lib.trees import Tree
from functional_optim.adapters import LAMB, RMSprop, TransformOptimizer


STEPS = 3
backends = pytest.mark.parametrize("backend", BACKENDS)
rows = pytest.mark.parametrize("row", range(len(CASES)), ids=IDS)


def run(tx: Any, kind: str, dtype: torch.dtype, compute: torch.dtype, backend: str) -> Iterator[tuple[Tree, Any]]:
    """Updates and states of steps from numbers of `dtype`, taken in `compute`."""
    params = cast(tree((1.0, 0.5, 2.0), dtype), compute)
    state = tx.init(params)
    for step in range(STEPS):
        with use(backend):
            updates, state = tx.update(cast(gradients(kind, tx, dtype, step), compute), state, params)
        yield updates, state


@functools.cache
def run_wide(row: int, kind: str, dtype: torch.dtype) -> list[tuple[Tree, Any]]:
    """The same steps in float64."""
    return list(run(CASES[row].ours, kind, dtype, F64, "reference"))


# ---- values

# Each of three steps does some twenty operations in float32, each off by half of 2**-23, and stores up to three
# numbers, each off by half a unit of its dtype. None of the formulas cancels, so relative errors add up: to 64 units
# of 2**-24, or 8 of a half type. Below the smallest normal number fewer digits are left, or none.
RTOL = {F32: 64 * 2.0**-24, BF16: 8 * 2.0**-8, F16: 8 * 2.0**-11}


def dtypes_of(tx: Any, backend: str) -> tuple[torch.dtype, ...]:
    """The dtypes that a backend computes a row in.

    A kernel of a half type differs from that of float32 in loads and stores, and in float16 squares are stored in
    float32. Triton's interpreter is slow.
    """
    if backend == "reference":
        return F32, BF16, F16
    if backend == "c":
        return F32, F16 if stores_squares(tx) else BF16
    return (F32,)


def kinds_of(tx: Any, backend: str) -> tuple[str, ...]:
    """The numbers that a backend gets: where elements do not meet in a sum, mixed ones are all in Triton's kernel."""
    params = tree((1.0,), F32)
    return KINDS if backend != "triton" or fo.explain(tx, params).passes > 1 else ("equal", "mixed")


@backends
@rows
def test_values_are_those_of_float64(row: int, backend: str) -> None:
    case = CASES[row]
    for kind, dtype in itertools.product(kinds_of(case.ours, backend), dtypes_of(case.ours, backend)):
        found = run(case.ours, kind, dtype, dtype, backend)
        for (u, s), (wide_u, wide_s) in zip(found, run_wide(row, kind, dtype), strict=True):
            actual, wide = optree.tree_leaves((u, s)), optree.tree_leaves((wide_u, wide_s))
            assert not any(x.isnan().any() for x in (*actual, *wide)), kind
            for x, y in zip(actual, wide, strict=True) if not cancels(case) else ():
                assert y.isfinite().all(), kind
                atol = 8 * torch.finfo(dtype).smallest_normal
                torch.testing.assert_close(
                    x.to(y.dtype), y, rtol=RTOL[dtype], atol=atol, msg=lambda m, kind=kind: f"{kind}: {m}"
                )


@fo.elementwise
def sum_of_squares(u: Any) -> Any:
    return u / torch.sqrt(fo.tree_sum(u * u))


@fo.elementwise
def mean_of_squares(u: Any) -> Any:
    return u / torch.sqrt(fo.leaf_mean(u * u))


@fo.elementwise
def norm_of_a_sum(u: Any, p: Any) -> Any:
    return (u + p) / fo.leaf_norm(u + p)


@fo.elementwise
def sum_of_cubes(u: Any) -> Any:
    return u / fo.cbrt(fo.leaf_sum(torch.abs(u) ** 3))


@fo.elementwise
def largest_square(u: Any) -> Any:
    return u / torch.sqrt(fo.tree_amax(torch.where(u * u > 0, u * u, 0.0)))


@fo.elementwise(state={"square": fo.slot(0.0)})
def square_that_elements_need_too(u: Any, square: Any) -> Any:
    return u / torch.sqrt(fo.leaf_sum(u * u)), u * u


@fo.elementwise(state={"norm": fo.slot(0.0, per="leaf")})
def norm_that_is_kept(u: Any, norm: Any) -> Any:
    norm = torch.maximum(norm, fo.leaf_norm(u))
    return u / norm, norm


@fo.elementwise
def quotient_and_product(u: Any) -> Any:
    return u / fo.leaf_sum(u * u) * fo.leaf_norm(u)


class Own(NamedTuple):
    """A user's rule, and what it divides by, in float64, from all updates and one leaf's."""

    tx: fo.GradientTransformation
    size: Any


OWN = {
    "sum_of_squares": Own(sum_of_squares(), lambda every, own: every.norm()),
    "mean_of_squares": Own(mean_of_squares(), lambda every, own: own.square().mean().sqrt()),
    "norm_of_a_sum": Own(norm_of_a_sum(), lambda every, own: own.norm()),
    "sum_of_cubes": Own(sum_of_cubes(), lambda every, own: own.abs().pow(3).sum().pow(1 / 3)),
    "largest_square": Own(largest_square(), lambda every, own: every.abs().amax()),
    "square_that_elements_need_too": Own(square_that_elements_need_too(), lambda every, own: own.norm()),
    "quotient_and_product": Own(quotient_and_product(), lambda every, own: own.norm()),
    "norm_that_is_kept": Own(norm_that_is_kept(), lambda every, own: own.norm()),
}


@backends
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("size", [1e-30, 3e37])
@pytest.mark.parametrize("name", OWN)
def test_sums_of_a_rule_of_ones_own_are_of_values_in_double(
    name: str, size: float, dtype: torch.dtype, backend: str
) -> None:
    grads = {"a": (torch.linspace(0.5, 1, 700, dtype=F64) * size).to(dtype), "b": torch.tensor([-size]).to(dtype)}
    params = {k: torch.zeros_like(g) for k, g in grads.items()}
    tx, divisor = OWN[name]
    with use(backend):
        actual, _ = tx.update(grads, tx.init(params), params)
    every = torch.cat([g.double() for g in grads.values()])
    expected = {k: (g.double() / divisor(every, g.double())).to(dtype) for k, g in grads.items()}
    # a root, a quotient and the rounding of the result
    torch.testing.assert_close(actual, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("size", [1e-30, 3e37])
def test_norms_and_means_of_tensors_are_computed_in_double(size: float, dtype: torch.dtype) -> None:
    x = torch.full((4,), size).to(dtype)
    assert fo.leaf_norm(x) == 2 * x[0]
    assert fo.leaf_sum(x) == 4 * x[0]
    assert fo.leaf_mean(x) == x[0]
    assert {f(x).dtype for f in (fo.leaf_norm, fo.leaf_sum, fo.leaf_mean)} == {F32}


def _over_numbers(u: Any, *, kind: str = "part") -> Any:
    numbers = {
        "part": lambda: fo.leaf_mean(u > 0),
        "count": lambda: fo.leaf_sum(u > 0),
        "root of a count": lambda: fo.leaf_norm(u > 0),
        "size": lambda: fo.leaf_size(u),
        "sum": lambda: fo.leaf_sum(u),
        "norm": lambda: fo.leaf_norm(u),
        "largest": lambda: fo.leaf_amax(u),
    }
    return u / numbers[kind]()


@pytest.mark.parametrize("kind", ["part", "count", "root of a count", "size", "sum", "norm", "largest"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, torch.float16], ids=str)
def test_numbers_of_a_leaf_are_the_same_in_every_kind_of_rule(dtype: torch.dtype, kind: str) -> None:
    """Conditions are 0 and 1, and sums are as large as they are, where a formula is plain torch, too."""
    # more elements than the largest float16, of a sum beyond it; a third of them negative
    u = torch.where(torch.arange(70_002) % 3 == 0, -16.0, 64.0).to(dtype)
    numbers = {"part": 2 / 3, "count": 46_668.0, "root of a count": 46_668**0.5, "size": 70_002.0, "largest": 64.0}
    numbers |= {"sum": float(u.double().sum()), "norm": float(u.double().norm())}
    expected = (u.double() / numbers[kind]).to(dtype)

    by_element, whole = fo.elementwise(_over_numbers), fo.leafwise(_over_numbers, static=("kind",))
    results = [make(kind=kind).update(u, make(kind=kind).init(u))[0] for make in (by_element, whole)]
    results += [by_element.formula(u, kind=kind), _over_numbers(u, kind=kind)]

    for x in results:  # the number and the quotient are rounded
        assert x.dtype is dtype
        eps = torch.finfo(dtype).eps
        least = torch.finfo(dtype).smallest_normal * eps
        torch.testing.assert_close(x, expected, rtol=2 * eps, atol=least)


@backends
@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (fo.clip_by_global_norm(1e-30), 1e-30),
        (fo.clip_by_block_rms(1e-30), 1e-30),
        (fo.scale_by_trust_ratio(trust_coefficient=1e-30), 1e-30),
        (fo.chain(fo.clip_by_global_norm(1e-30), fo.scale(1e30), fo.clip_by_global_norm(1e-3)), 1e-3),
    ],
    ids=repr,
)
def test_a_ratio_may_lie_outside_of_float32(tx: Any, expected: float, backend: str) -> None:
    # 1e-30 / 3e38 is 3e-69, which times 3e38 is a number again
    grads, params = torch.tensor([3e38]), torch.tensor([1.0])
    with use(backend):
        actual, _ = tx.update(grads, tx.init(params), params)
    torch.testing.assert_close(actual, torch.tensor([expected]), rtol=4 * 2.0**-23, atol=0)


# ---- bounds


@pytest.mark.parametrize("kind", ["zero", "equal"])
@pytest.mark.parametrize("name", BOUNDS)
def test_values_at_bounds_are_finite(name: str, kind: str) -> None:
    for backend in ("reference", "c"):
        for results in run(BOUNDS[name], kind, F32, F32, backend):
            if "initial_scale=inf" not in name:
                assert all(x.isfinite().all() for x in optree.tree_leaves(results))


@backends
def test_a_clip_whose_bound_reaches_zero_stops(backend: str) -> None:
    tx = fo.chain(fo.clip_by_global_norm(fo.linear_schedule(1.0, 0.0, 2)), fo.sgd(0.1))
    params = torch.ones(1)
    state = tx.init(params)
    for g in (1.0, 1.0, 0.0, 1.0):
        with use(backend):
            params, state = fo.apply_gradients(tx, params, torch.tensor([g]), state)
    # the clip lets through 1, then 1/2, and then nothing
    torch.testing.assert_close(params, torch.tensor([0.85]), rtol=2.0**-22, atol=0)


@backends
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("eps_in_sqrt", [True, False])
def test_a_variance_that_cancels_is_not_negative(eps_in_sqrt: bool, dtype: torch.dtype, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    base = 1 + torch.rand(256, generator=generator, dtype=dtype)
    tx = fo.chain(fo.scale_by_stddev(0.5, eps_in_sqrt=eps_in_sqrt), fo.scale(-1e-3))
    params = torch.zeros(256, dtype=dtype)
    state = tx.init(params)
    for step in range(60):
        noise = torch.finfo(dtype).eps * torch.randn(256, generator=generator, dtype=dtype)
        with use("c" if backend == "triton" and step < 58 else backend):
            params, state = fo.apply_gradients(tx, params, base * (1 + noise), state)
        assert params.isfinite().all()


def test_centered_rmsprop_has_the_bits_of_torch_where_torch_has_a_number() -> None:
    generator = torch.Generator().manual_seed(0)
    base = 1 + torch.rand(256, generator=generator)
    ours, theirs = (torch.nn.Parameter(torch.zeros(256)) for _ in range(2))
    opt = RMSprop([ours], lr=1e-3, alpha=0.9, centered=True)
    twin = torch.optim.RMSprop([theirs], lr=1e-3, alpha=0.9, centered=True, foreach=False)
    for step in range(1, 301):
        grad = base * (1 + 1e-4 * torch.randn(256, generator=generator))
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        opt.step()
        twin.step()
        assert ours.isfinite().all()
        for name in ("square_avg", "grad_avg"):
            torch.testing.assert_close(opt.state[ours][name], twin.state[theirs][name], rtol=0, atol=0)
        # torch's square root on the CPU is off by one unit now and then; then the sum with eps, the quotient and the
        # product may be rounded to neighbours, one more unit each, and steps all have one direction
        number = theirs.isfinite()
        torch.testing.assert_close(ours[number], theirs[number], rtol=4 * step * 2.0**-23, atol=0)
    assert not number.all()  # torch has NaN by now


@backends
@pytest.mark.parametrize("eps_in_sqrt", [True, False])
def test_adagrad_without_eps_stands_still_until_there_is_a_gradient(eps_in_sqrt: bool, backend: str) -> None:
    tx = fo.chain(fo.scale_by_rss(0.0, 0.0, eps_in_sqrt), fo.scale(-1.0))
    params = torch.zeros(2)
    state = tx.init(params)
    for g in ([0.0, 0.0], [0.0, 3.0]):
        with use(backend):
            params, state = fo.apply_gradients(tx, params, torch.tensor(g), state)
    assert params.tolist() == [0.0, -1.0]


def test_rprop_sees_the_sign_of_a_product_that_vanishes() -> None:
    tx, params = fo.rprop(1.0), torch.zeros(2)
    state = tx.init(params)
    for g in (1e-30, 1e-30):
        params, state = fo.apply_gradients(tx, params, torch.tensor([g, -g]), state)
    torch.testing.assert_close(params, torch.tensor([-2.2, 2.2]), rtol=2.0**-22, atol=0)


def test_a_range_that_depends_on_a_switch_is_the_wider_one_without_it() -> None:
    for tx in (fo.ema(1.0, debias=False), fo.scale_by_rms(decay=1.0), fo.scale_by_stddev(decay=1.0)):
        assert tx._bound.values["decay"] == 1.0


@pytest.mark.parametrize("value", [1.0, 1])
def test_a_range_that_depends_on_a_switch_holds_for_options(value: float) -> None:
    tx, w = fo.chain(fo.ema(0.9), fo.scale(-1.0)), torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"`decay` of ema must be in \[0, 1\) if `debias` is True"):
        TransformOptimizer([{"params": [w], "decay": value}], tx)
    opt = TransformOptimizer([{"params": [w], "decay": value, "debias": False}], tx)
    w.grad = torch.ones(2)
    opt.step()
    assert w.tolist() == [1.0, 1.0]  # an average that never leaves 0


SQUARES = {
    "adam": fo.adam(1e-3),
    "amsgrad": fo.amsgrad(1e-3),
    "rmsprop": fo.rmsprop(1e-3),
    "centered rmsprop": fo.rmsprop(1e-3, centered=True),
    "lamb": fo.lamb(1e-3),
    "nadam": fo.nadam(1e-3, momentum_decay=4e-3),
    "radam": fo.radam(1e-3),
    "adagrad": fo.adagrad(1e-3, 0.0),
    "adadelta": fo.adadelta(1.0, eps=1e-6),
}


@backends
@pytest.mark.parametrize("name", SQUARES)
def test_squares_of_float16_do_not_vanish(name: str, backend: str) -> None:
    tx = SQUARES[name]
    params = {"w": torch.ones(4, dtype=F16)}
    wide = cast(params, F64)
    state, wide_state = tx.init(params), tx.init(wide)
    for g in (1e-3, 0.0, 0.0):
        with use(backend):
            params, state = fo.apply_gradients(tx, params, {"w": torch.full((4,), g, dtype=F16)}, state)
        wide, wide_state = fo.apply_gradients(tx, wide, {"w": torch.full((4,), g, dtype=F16).double()}, wide_state)
    # steps of 1e-3 from 1, each rounded to a multiple of 2**-11, and moments of 1e-4 to a multiple of 2**-24
    torch.testing.assert_close(params["w"].double(), wide["w"], rtol=0, atol=6 * 2.0**-11)


@pytest.mark.parametrize("make", [lambda w: TransformOptimizer([w], fo.adam(1e-3)), lambda w: LAMB([w])])
def test_squares_of_float16_stay_float32_when_they_are_loaded(make: Any) -> None:
    w = torch.nn.Parameter(torch.ones(4, dtype=F16))
    w.grad = torch.full((4,), 1e-3, dtype=F16)
    opt, other = make(w), make(w)
    opt.step()
    other.load_state_dict(opt.state_dict())
    assert {k: x.dtype for k, x in other.state[w].items()} == {k: x.dtype for k, x in opt.state[w].items()}
    assert sorted(str(x.dtype) for x in opt.state[w].values()) == ["torch.float16", "torch.float32", "torch.float32"]
    for key, x in opt.state[w].items():
        torch.testing.assert_close(other.state[w][key], x, rtol=0, atol=0)


def test_how_squares_are_stored_is_said_by_the_caller() -> None:
    half = torch.ones(2, dtype=F16)
    assert fo.scale_by_adam().init(half).nu.dtype is F32
    assert fo.scale_by_adam().init(half).mu.dtype is F16
    assert fo.scale_by_adam(nu_dtype=F16).init(half).nu.dtype is F16
    assert fo.scale_by_adam().init(half.bfloat16()).nu.dtype is BF16
