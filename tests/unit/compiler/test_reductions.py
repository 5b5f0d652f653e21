"""Reductions over leaves and trees, on every backend, against torch itself."""

import functools

import pytest
import torch

import functional_optim as fo
from _lib.marks import INTERPRETER, OPTIMIZED
from _lib.operations import (
    DTYPES,
    F32,
    F64,
    INF,
    LEAF_REDUCTIONS,
    NAN,
    ON_EVERY_BACKEND,
    TREE_REDUCTIONS,
    assert_within,
    run,
)
from _lib.programs import device_of
from functional_optim._compiler import trace


pytestmark = [INTERPRETER, OPTIMIZED]


# around a vector, the blocks of 512, Triton's of 1024 and chunks of 4096, and C's chunks of 32768
SIZES = (1, 2, 7, 8, 9, 511, 512, 513, 1025, 4096, 4097, 32767, 32768, 32769, 2 * 32768 + 5)


@functools.cache
def reduce(backend: str, dtype: torch.dtype, exact: int) -> dict[str, torch.Tensor]:
    """All reductions of leaves of whole numbers, as one program."""
    leaves = whole_numbers(backend, dtype, exact)
    cases = {k: (1, r.of) for k, r in (LEAF_REDUCTIONS | TREE_REDUCTIONS).items() if r.exact == exact}
    results = run(backend, cases, leaves, {"x": leaves}, {}, F64, dtype, per_leaf=True)
    return {name: torch.stack(list(column)) for name, column in results.items()}


def sizes(backend: str) -> tuple[int, ...]:
    """The sizes; Triton's interpreter takes long over chunks that mean nothing to Triton."""
    return (*SIZES[:-4], 16385) if backend == "triton" else SIZES


def whole_numbers(backend: str, dtype: torch.dtype, exact: int) -> list[torch.Tensor]:
    """A leaf of each size."""
    generator = torch.Generator().manual_seed(exact)
    return [torch.randint(-exact // 8, exact, (n,), generator=generator).to(dtype) for n in sizes(backend)]


@ON_EVERY_BACKEND
@DTYPES
@pytest.mark.parametrize("name", LEAF_REDUCTIONS)
def test_leaf_reductions(backend: str, dtype: torch.dtype, name: str) -> None:
    """Of whole numbers, whose sums float64 holds and float32 does not, so any order gives the same."""
    case = LEAF_REDUCTIONS[name]
    expected = torch.stack([case.torch(x.double()) for x in whole_numbers(backend, dtype, case.exact)])
    assert_within(reduce(backend, dtype, case.exact)[name], expected, case.ulp)


@ON_EVERY_BACKEND
@DTYPES
@pytest.mark.parametrize("name", TREE_REDUCTIONS)
def test_tree_reductions(backend: str, dtype: torch.dtype, name: str) -> None:
    case = TREE_REDUCTIONS[name]
    expected = case.torch(torch.cat(whole_numbers(backend, dtype, case.exact)).double())
    assert_within(reduce(backend, dtype, case.exact)[name], expected.expand(len(sizes(backend))), case.ulp)


@ON_EVERY_BACKEND
def test_sums_are_accumulated_in_double_precision(backend: str) -> None:
    """Adding n numbers errs by at most n roundings of the sum of their sizes, on either side."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, generator=generator) for n in sizes(backend)]
    [sums] = run(backend, {"sum": (1, fo.leaf_sum)}, leaves, {"x": leaves}, {}, F64, F32, per_leaf=True).values()
    size = torch.stack([x.double().abs().sum() for x in leaves])
    expected = torch.stack([x.double().sum() for x in leaves])
    torch.testing.assert_close(torch.stack(list(sums)) / size, expected / size, rtol=0, atol=2 * max(SIZES) * 2**-53)


SPECIALS = ((NAN,), (INF,), (-INF,), (INF, -INF), (NAN, INF))


def with_special(n: int, special: tuple[float, ...]) -> torch.Tensor:
    """A leaf of ones but for what is in the middle and at the end."""
    x = torch.ones(n)
    x[n // 2], x[-1] = special[0], special[-1]
    return x


@ON_EVERY_BACKEND
@pytest.mark.parametrize("name", ["leaf_sum", "leaf_norm", "leaf_amax", "amin"])
def test_leaf_reductions_of_what_is_not_finite(backend: str, name: str) -> None:
    case = LEAF_REDUCTIONS[name]
    leaves = [with_special(n, special) for special in SPECIALS for n in (1, 2, 9, 1030)]
    leaves += [with_special(32775, SPECIALS[0]), torch.full((1030,), -INF)]
    [actual] = run(backend, {name: (1, case.of)}, leaves, {"x": leaves}, {}, F64, F32, per_leaf=True).values()
    expected = [case.torch(x.double()) for x in leaves]
    assert_within(torch.stack(list(actual)), torch.stack(expected), case.ulp)


@ON_EVERY_BACKEND
@pytest.mark.parametrize("name", ["tree_sum", "tree_amax"])
@pytest.mark.parametrize("special", SPECIALS, ids=lambda x: ",".join(map(str, x)))
def test_tree_reductions_of_what_is_not_finite(backend: str, name: str, special: tuple[float, ...]) -> None:
    case = TREE_REDUCTIONS[name]
    leaves = [torch.ones(3), with_special(1030, special), torch.ones(1)]
    [actual] = run(backend, {name: (1, case.of)}, leaves, {"x": leaves}, {}, F64, F32, per_leaf=True).values()
    assert_within(torch.stack(list(actual)), case.torch(torch.cat(leaves).double()).expand(3), case.ulp)


@ON_EVERY_BACKEND
def test_uniform_updates_count_once_for_each_element(backend: str) -> None:
    """A rule may reduce what a rule before it has made the same for every element."""
    two = fo.elementwise(lambda u: 2.0)()
    sums = fo.elementwise(lambda u: u * 0 + fo.tree_sum(u) + 10 * fo.leaf_sum(u) + 100 * fo.leaf_amax(-u))()
    params = [torch.zeros(shape, device=device_of(backend)) for shape in ((), (2, 3), (1030,))]
    tx = fo.chain(two, sums)
    with fo.use_backend(backend):
        updates, _ = tx.update(params, tx.init(params), params)
    expected = [torch.full_like(p, 2 * 1037 + 20 * p.numel() - 200) for p in params]
    torch.testing.assert_close(updates, expected, rtol=0, atol=0)  # small whole numbers


def test_torch_norm_is_the_norm_of_a_leaf() -> None:
    tracer = trace.Tracer()
    x = tracer.input("array", "x")
    assert tracer.values[torch.norm(x).index] == tracer.values[fo.leaf_norm(x).index]


@ON_EVERY_BACKEND
def test_empty_leaves_are_left_out_of_reductions(backend: str) -> None:
    tx = fo.chain(fo.zero_nans(), fo.clip_by_global_norm(1.0), fo.clip_by_block_rms(10.0))
    with device_of(backend):
        params = {"empty": torch.zeros(0, 3), "full": torch.zeros(2)}
        grads = {"empty": torch.zeros(0, 3), "full": torch.tensor([3.0, 4.0])}
        expected = {"empty": torch.zeros(0, 3), "full": torch.tensor([0.6, 0.8])}
    with fo.use_backend(backend):
        updates, _ = tx.update(grads, tx.init(params), params)
    torch.testing.assert_close(updates, expected, rtol=2e-7, atol=0)  # 3 / 5 and 4 / 5 round twice


@ON_EVERY_BACKEND
def test_a_tree_of_empty_leaves(backend: str) -> None:
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adam(0.1))
    params = [torch.zeros(shape, device=device_of(backend)) for shape in ((0,), (3, 0))]
    with fo.use_backend(backend):
        new, state = fo.apply_gradients(tx, params, params, tx.init(params))
    torch.testing.assert_close((new, state[1][0].count.item()), (params, 1))
