"""Kernels in C on several threads."""

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch

import functional_optim as fo
from _lib.backends import STEPS, only
from _lib.chains import nested
from _lib.marks import OPTIMIZED
from _lib.trees import BF16, F32, F64, tensors
from functional_optim._runtime.cpu import CHUNK


pytestmark = OPTIMIZED


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


RECIPES: Mapping[str, fo.GradientTransformation] = {
    "clipped adamw with average": fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-2), fo.params_ema(0.9)),
    "lamb": fo.lamb(1e-2, weight_decay=0.1),
    "three reductions": nested(),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_c_gives_the_same_bits_for_any_number_of_threads(
    name: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    tx = RECIPES[name]
    generator = torch.Generator().manual_seed(0)
    sizes = (5 * CHUNK + 3, 7, CHUNK, 3 * CHUNK - 1)
    start = [torch.randn(n, generator=generator).to(dtype) for n in sizes]
    grads = [torch.randn(n, generator=generator).to(dtype) for n in sizes]
    results = []
    for n in (1, 2, 4):
        threads(n)
        params, state = start, tx.init(start)
        for _ in range(STEPS):
            with only("c"):
                params, state = fo.apply_gradients(tx, params, grads, state)
        results.append(tensors((params, state)))
    torch.testing.assert_close(results[1:], [results[0]] * 2, rtol=0, atol=0)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("n_threads", [1, 2, 4])
def test_c_takes_many_small_leaves_at_once(name: str, n_threads: int, threads: Callable[[int], None]) -> None:
    """A thread takes the chunks of several leaves, among them some of a leaf that has more than one."""
    tx = RECIPES[name]
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 200, (300,), generator=generator).tolist()
    sizes[100], sizes[299] = CHUNK + 70, 2 * CHUNK + 1
    start = [torch.randn(n, generator=generator, dtype=F64) for n in sizes]
    grads = [torch.randn(n, generator=generator, dtype=F64) for n in sizes]
    threads(n_threads)
    results = []
    for backend in ("reference", "c"):
        params, state = start, tx.init(start)
        for _ in range(STEPS):
            with only(backend):
                params, state = fo.apply_gradients(tx, params, grads, state)
        results.append((params, state))
    # norms of up to 130,000 numbers, added up in another order: 2**-53 for each of 360 roundings that do not cancel,
    # and some ten times that for what follows from them in three steps
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
