"""Threads of torch that generated C runs on."""

import ctypes
from collections.abc import Iterator

import pytest
import torch

import functional_optim as fo
from functional_optim._compiler.c.threads import MIN_PARALLEL_NUMEL, parallel_address
from functional_optim._runtime import cpu


WORK = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
PARALLEL_FOR = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 3, WORK, ctypes.c_void_p)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_work_is_shared_by_as_many_threads_as_torch_may_have(n_threads: int, n: int) -> None:
    torch.set_num_threads(n_threads)
    address = parallel_address()
    assert address, "torch has no torch_parallel_for"
    ranges: list[tuple[int, int, int | None]] = []

    status = PARALLEL_FOR(address)(0, n, 1, WORK(lambda *args: ranges.append(args)), 1234)

    assert status == 0
    assert {data for *_, data in ranges} == {1234}
    assert sorted(k for begin, end, _ in ranges for k in range(begin, end)) == list(range(n))
    assert len(ranges) <= min(n, n_threads)


def test_a_torch_that_wakes_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so; all is computed all the same, by the calling thread."""
    calls: list[int] = []
    refusing = PARALLEL_FOR(lambda begin, end, *_: calls.append(end) or 1)
    address = ctypes.cast(refusing, ctypes.c_void_p).value
    monkeypatch.setattr(cpu, "parallel_address", lambda: address)
    torch.set_num_threads(2)
    params = [torch.arange(2.0 * MIN_PARALLEL_NUMEL), torch.ones(3)]
    tx = fo.sgd(0.5)

    with fo.use_backend("c"):
        new, _ = fo.apply_gradients(tx, params, [torch.ones_like(p) for p in params], tx.init(params))

    assert calls
    torch.testing.assert_close(new, [p - 0.5 for p in params], rtol=0, atol=0)
