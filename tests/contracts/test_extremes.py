"""Every transformation of the table over zero, tiny, huge, equal and mixed numbers, and at the bounds of its numbers.

Values are held against the same steps in float64, whose range all of these numbers are far from leaving; the tests of
`test_transforms.py` hold float64 against optax. Derivatives are held against those of these steps, too.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import optree
import pytest
import torch

import functional_optim as fo
from _lib.records import BACKENDS, tree_of, use
from _lib.transforms import CASES, IDS, SPARE
from _lib.trees import Tree
from functional_optim.adapters import LAMB, RMSprop, TransformOptimizer


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
STEPS = 3
backends = pytest.mark.parametrize("backend", BACKENDS)
rows = pytest.mark.parametrize("row", range(len(CASES)), ids=IDS)


# ---- numbers


def rules_of(tx: Any) -> list[Any]:
    """The rules of a transformation, inside a mask or not."""
    tx = getattr(tx, "inner", tx)
    return [tx.bound.rule] if hasattr(tx, "bound") else []


def stores_squares(tx: Any) -> bool:
    return any(slot.square for rule in rules_of(tx) for slot in rule.slots.values())


def multiplies_by_a_norm(tx: Any) -> bool:
    """Whether updates become some twenty times as large, the norm of the largest leaf."""
    return any(rule.name == "scale_by_param_block_norm" for rule in rules_of(tx))


def magnitude(kind: str, tx: Any, dtype: torch.dtype) -> tuple[float, ...]:
    """The numbers that elements take in turn.

    A slot of squares is stored per element, so its numbers are those whose squares float32 holds. float16 has numbers
    that three steps of momentum do not carry out of its range, and whose squares are far outside of it.
    """
    huge = 1e4 if dtype is F16 else 1e18 if stores_squares(tx) else 1e37
    huge /= 100 if multiplies_by_a_norm(tx) else 1
    tiny = 1e-3 if dtype is F16 else 1 / huge
    return {"zero": (0.0,), "tiny": (tiny,), "huge": (huge,), "equal": (1.0,), "mixed": (0.0, tiny, 1.0, huge)}[kind]


KINDS = ("zero", "tiny", "huge", "equal", "mixed")


def tree(numbers: tuple[float, ...], dtype: torch.dtype) -> Tree:
    """A tree whose elements take numbers in turn; squares of 1e18 add up to more than float32 holds.

    Signs differ between leaves and nowhere else: no sum of the formulas cancels, and every element is compared.
    """
    signs = iter((1.0, -1.0, 1.0))

    def make(*shape: int) -> torch.Tensor:
        n = math.prod(shape)
        x = torch.tensor(numbers, dtype=F64).repeat(-(-n // len(numbers)))[-n:]
        return (next(signs) * x).reshape(shape).to(dtype)

    return tree_of(make)


def gradients(kind: str, tx: Any, dtype: torch.dtype, step: int) -> Tree:
    growth = 1.0 if kind == "equal" else 1 + step / 4
    return tree(tuple(growth * x for x in magnitude(kind, tx, dtype)), dtype)


def cast(x: Tree, dtype: torch.dtype) -> Tree:
    return optree.tree_map(lambda y: y.to(dtype) if y.is_floating_point() else y, x)


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


def cancels(case: Any) -> bool:
    """Whether formulas take a difference, of which rounding leaves another number than float64 does."""
    return case.id.startswith("scale_by_stddev")


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


def at_bounds() -> dict[str, Any]:
    """The rules of the table with one number at a bound that it may have.

    Not `eps`: who sets it to 0 asks for 0 / 0 at a gradient of 0.
    """
    found: dict[str, Any] = {}
    for case in CASES:
        for rule in rules_of(case.ours) if hasattr(case.ours, "bound") else []:
            for hyper in sorted({key.partition(" if ")[0] for key in rule.ranges} - {"eps"}):
                interval = rule.ranges.get(hyper)
                for x in (interval.low, interval.high) if hasattr(interval, "low") else ():
                    try:
                        found[f"{case.id}-{hyper}={x:g}"] = case.ours.replace(**{hyper: x})
                    except ValueError:
                        continue  # an open end
    return found


BOUNDS = at_bounds()


@pytest.mark.parametrize("kind", ["zero", "equal"])
@pytest.mark.parametrize("name", BOUNDS)
def test_values_at_bounds_are_finite(name: str, kind: str) -> None:
    for backend in ("reference", "c"):
        for tree in run(BOUNDS[name], kind, F32, F32, backend):
            if "initial_scale=inf" not in name:
                assert all(x.isfinite().all() for x in optree.tree_leaves(tree))


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
        assert tx.bound.values["decay"] == 1.0


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


# ---- derivatives


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_()


class Derivatives(NamedTuple):
    """Derivatives of the mean updates of two steps, and the sizes of the terms that they are sums of.

    Args:
      values: by updates, parameters and the numbers of the rule.
      terms: sizes; those by a number x of a mean update m are about |m / x|, and by a decay b |m / (1 - b)|, too.
    """

    values: dict[str, list[torch.Tensor]]
    terms: dict[str, list[torch.Tensor]]


def reciprocal(x: torch.Tensor) -> torch.Tensor:
    """The reciprocals of sizes; 0 where a number is 0, by which nothing was divided."""
    return torch.where(x == 0, 0.0, 1 / x.detach().double().abs())


def derivatives(tx: Any, kind: str, dtype: torch.dtype, compute: torch.dtype) -> Derivatives:
    """Derivatives of two steps from numbers of `dtype`, taken in `compute`."""
    inner = getattr(tx, "inner", tx)
    numbers = {}
    if hasattr(inner, "bound") and inner is tx:
        bound = inner.bound
        numbers = {k: leaf(torch.tensor(x, dtype=F64)) for k, x in bound.values.items() if bound.is_scalar(k)}
        fixed = {slot.start for slot in bound.rule.slots.values()}  # a first value is no number of the formula
        numbers = {k: x for k, x in numbers.items() if k not in fixed}
        tx = tx.replace(**numbers)
    params = optree.tree_map(leaf, cast(tree((1.0, 0.5, 2.0), dtype), compute))
    grads = [optree.tree_map(leaf, cast(gradients(kind, tx, dtype, step), compute)) for step in range(2)]
    state, total = tx.init(params), torch.zeros((), dtype=F64)
    means = [torch.zeros_like(p, dtype=F64) for p in optree.tree_leaves(params)]
    for g in grads:
        updates, state = tx.update(g, state, params)
        parts = [x.double() / x.numel() for x in optree.tree_leaves(updates)]
        total = total + sum(x.sum() for x in parts)
        means = [mean + x.detach().abs() for mean, x in zip(means, parts, strict=True)]
    leaves = [optree.tree_leaves(g) for g in (*grads, params)]
    inputs = {"updates": [*leaves[0], *leaves[1]], "params": leaves[2], **{k: [x] for k, x in numbers.items()}}
    flat = [x for xs in inputs.values() for x in xs]
    found = iter(
        torch.autograd.grad(total, flat, allow_unused=True, materialize_grads=True)
        if total.requires_grad
        else map(torch.zeros_like, flat)
    )
    whole = sum(mean.sum() for mean in means)
    terms = {
        "updates": [mean * reciprocal(x) for own in leaves[:2] for mean, x in zip(means, own, strict=True)],
        "params": [mean * reciprocal(x) for mean, x in zip(means, leaves[2], strict=True)],
        **{k: [whole * torch.maximum(reciprocal(x), reciprocal(1 - x))] for k, x in numbers.items()},
    }
    return Derivatives({k: [next(found) for _ in xs] for k, xs in inputs.items()}, terms)


@functools.cache
def wide_derivatives(row: int, kind: str, dtype: torch.dtype) -> Derivatives:
    """The same derivatives in float64."""
    with fo.use_backend("reference"):
        return derivatives(CASES[row].ours, kind, dtype, F64)


# torch follows the operations of the reference, and kernels have derivatives of their own, which a half type changes in
# loads and stores only
BY_KERNELS = [pytest.param(k, F32, "c", id=f"{name}-float32-c") for k, name in enumerate(IDS) if name not in SPARE]
BY_KERNELS += [
    pytest.param(IDS.index(name), BF16, "c", id=f"{name}-bfloat16-c")
    for name in ("scale_by_adam-nesterov=False-eps_root=0.0", "scale_by_trust_ratio", "clip_by_global_norm-1.0")
]
BY_TORCH = [
    pytest.param(k, dtype, "reference", id=f"{name}-{dtype}-reference")
    for k, name in enumerate(IDS)
    for dtype in (F64, BF16)
]


# Of two steps, forwards and backwards, some 120 operations are off by half a unit of the dtype that they are computed
# in, and 12 numbers are stored, each off by half a unit of its own; a decay multiplies earlier errors by up to 10.
UNITS = {F32: 120 * 2.0**-24, BF16: 60 * 2.0**-8}


@pytest.mark.parametrize(("row", "dtype", "backend"), BY_KERNELS + BY_TORCH)
def test_derivatives_are_those_of_float64(row: int, dtype: torch.dtype, backend: str) -> None:
    """To a part of the terms that they are sums of, which may cancel."""
    for kind in KINDS:
        if cancels(CASES[row]) and dtype is not F64 and kind in ("huge", "mixed"):
            continue  # terms of 1e48 cancel, which float32 does not hold
        with fo.use_backend(backend):
            found, _ = derivatives(CASES[row].ours, kind, dtype, dtype)
        for name, own in found.items():
            assert all(d.isfinite().all() for d in own), (kind, name)
            if dtype is F64 or cancels(CASES[row]):
                continue
            values, terms = wide_derivatives(row, kind, dtype)
            for d, wide, size in zip(own, values[name], terms[name], strict=True):
                bound = UNITS[dtype] * (wide.abs() + size) + torch.finfo(dtype).smallest_normal
                assert ((d - wide).abs() <= bound).all(), (kind, name, d, wide)


# functions of two numbers whose derivatives are quotients of numbers that may lie outside of float32
QUOTIENTS: dict[str, Any] = {
    "rsqrt": lambda u, p: torch.rsqrt(torch.abs(u)),
    "u * rsqrt": lambda u, p: u * torch.rsqrt(torch.abs(p)),
    "cbrt": lambda u, p: fo.cbrt(u),
    "hypot": lambda u, p: torch.hypot(u, p),
    "atan2": lambda u, p: torch.atan2(u, p),
    "quotient": lambda u, p: u / p,
}


@pytest.mark.parametrize("name", QUOTIENTS)
def test_derivatives_of_quotients_by_kernels_are_those_of_float64(name: str) -> None:
    rule = fo.elementwise(QUOTIENTS[name])()
    sizes = [10.0**e for e in range(-30, 31, 6)]
    pairs = torch.tensor(list(itertools.product(sizes, sizes)), dtype=F32).t()
    found = []
    for dtype, backend in ((F32, "c"), (F64, "reference")):
        u, p = (leaf(x.to(dtype)) for x in pairs)
        with fo.use_backend(backend):
            total = rule.update(u, rule.init(p), p)[0].sum()
        found.append(torch.autograd.grad(total, (u, p), allow_unused=True, materialize_grads=True))
    for d, wide in zip(*found, strict=True):
        stored = wide.abs() < torch.finfo(F32).max
        atol = torch.finfo(F32).smallest_normal  # below it, fewer digits are left
        torch.testing.assert_close(d[stored].double(), wide[stored], rtol=8 * 2.0**-23, atol=atol)


@pytest.mark.parametrize("kind", ["zero", "equal"])
@pytest.mark.parametrize("name", BOUNDS)
def test_derivatives_at_bounds_are_finite(name: str, kind: str) -> None:
    for backend, dtype in (("c", F32), ("reference", F64)):
        if backend == "c" and any(map(name.startswith, SPARE)):
            continue
        with fo.use_backend(backend):
            for number, found in derivatives(BOUNDS[name], kind, dtype, dtype).values.items():
                assert all(d.isfinite().all() for d in found), (backend, number)


AT_ZERO = {
    # an update of 0 is not clipped: the identity
    "clip_by_global_norm": (fo.clip_by_global_norm(1.0), 1.0),
    "clip_by_block_rms": (fo.clip_by_block_rms(1.0), 1.0),
    "scale_by_trust_ratio": (fo.scale_by_trust_ratio(), 1.0),
    # g / (|g| + eps)
    "scale_by_adam": (fo.scale_by_adam(eps=0.5), 2.0),
    "scale_by_amsgrad": (fo.scale_by_amsgrad(eps=0.5), 2.0),
    "scale_by_rms": (fo.scale_by_rms(eps=0.5, eps_in_sqrt=False), 2.0),
    "scale_by_rms in root": (fo.scale_by_rms(eps=0.25), 2.0),
    "scale_by_stddev": (fo.scale_by_stddev(eps=0.5, eps_in_sqrt=False), 2.0),
    "scale_by_rss": (fo.scale_by_rss(0.0, eps=0.25), 2.0),
    "scale_by_adamax": (fo.scale_by_adamax(eps=0.5), 2.0),
    "scale_by_adadelta": (fo.scale_by_adadelta(eps=0.5), 1.0),
    "scale_by_radam": (fo.scale_by_radam(), 1.0),
}


@pytest.mark.parametrize("name", AT_ZERO)
def test_derivatives_at_zero(name: str) -> None:
    tx, slope = AT_ZERO[name]
    params = torch.ones(3, dtype=F64)
    jacobian = torch.func.jacrev(lambda u: tx.update(u, tx.init(params), params)[0])(torch.zeros(3, dtype=F64))
    torch.testing.assert_close(jacobian, slope * torch.eye(3, dtype=F64), rtol=1e-15, atol=0)
