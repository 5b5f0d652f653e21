"""The streams of CUDA devices: the calls of torch by which a step does not wait, and memory stays.

There is no device here; a stand-in for `torch.cuda` notes the calls.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from functional_optim._runtime.cuda.streams import CudaStreams


class Cuda:
    """`torch.cuda` with two devices, of which the first is the current one."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.threads: list[int] = []

    def current_device(self) -> int:
        return 0

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.calls.append(("enter", device.index))
        yield
        self.calls.append(("leave", device.index))

    def current_stream(self, device: torch.device) -> "Cuda":
        self.calls.append(("stream of", device.index))
        return self

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.threads.append(threading.get_ident())
        yield

    def wait_event(self, event: Any) -> None:
        self.calls.append(("wait", event))

    def Event(self) -> Any:
        event = mock.Mock()
        event.record.side_effect = lambda stream: self.calls.append(("record", stream))
        return event


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    for name in ("current_device", "device", "current_stream", "stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    return made


FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


def test_a_device_that_is_not_the_current_one_is_made_it(cuda: Cuda) -> None:
    """Triton and the driver launch on the current one."""
    with CudaStreams().guard(SECOND):
        assert cuda.calls == [("enter", 1)]
    with CudaStreams().guard(FIRST):
        assert cuda.calls == [("enter", 1), ("leave", 1)]


def test_another_stream_waits_for_tables_and_keeps_their_memory(cuda: Cuda) -> None:
    """The allocator hands memory of another stream out again as soon as it is freed, unless it is told who uses it."""
    streams, tensors = CudaStreams(), [mock.Mock(), mock.Mock()]

    mark = streams.mark(SECOND)
    streams.wait_for(mark, tensors, FIRST)

    assert cuda.calls == [("stream of", 1), ("record", cuda), ("stream of", 0), ("wait", mark)]
    for x in tensors:
        x.record_stream.assert_called_once_with(cuda)


def test_copies_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """One from memory that is not pinned would, and so would one that is not told."""
    empty, target, source = mock.Mock(), mock.Mock(), mock.Mock()
    monkeypatch.setattr(torch, "empty", empty)

    CudaStreams().staging(7)
    CudaStreams().copy(target, source)

    empty.assert_called_once_with(7, dtype=torch.int64, device="cpu", pin_memory=True)
    target.copy_.assert_called_once_with(source, non_blocking=True)


def test_memory_that_stays_is_allocated_in_another_thread_for_this_ones_stream(cuda: Cuda) -> None:
    found = CudaStreams().allocate(threading.get_ident, SECOND)

    assert found != threading.get_ident()
    assert cuda.threads == [found]
    assert cuda.calls == [("stream of", 1)]
