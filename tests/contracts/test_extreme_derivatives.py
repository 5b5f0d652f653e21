"""Derivatives of every transformation of the table over zero, tiny, huge, equal and mixed numbers, and at bounds.

They are held against those of the same steps in float64, as values are in `test_extremes.py`.
"""

import functools
import itertools
from typing import Any, NamedTuple

import optree
import pytest
import torch

import functional_optim as fo
from _lib.extremes import BF16, BOUNDS, F32, F64, KINDS, cancels, cast, gradients, tree
from _lib.transforms import CASES, IDS, SPARE


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
    if inner is tx and inner._bound:
        bound = inner._bound
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
