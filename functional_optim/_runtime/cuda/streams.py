"""Streams of devices, by torch.cuda; and the same for the CPU, where an interpreter runs kernels."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from ..internals import current_raw_stream
from .libcuda import KernelSequence


T = TypeVar("T")


class Streams:
    """The streams of one kind of device: memory, copies and launches in the order of the current one.

    By itself that of the CPU, where Triton's interpreter runs kernels at once, and nothing records graphs. None of the
    calls waits for a device.

    Attributes:
      captures: whether streams can record graphs.
    """

    captures = False

    def guard(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """A context in which a device is the current one."""
        return contextlib.nullcontext()

    def stream(self, device: torch.device) -> int:
        """The current stream of a device, as a number."""
        return 0

    def is_capturing(self) -> bool:
        """Whether the current stream records a graph and runs nothing."""
        return False

    def mark(self, device: torch.device) -> Any:
        """A mark in the current stream of a device, behind all that has been enqueued there."""

    def wait_for(self, mark: Any, tensors: Iterable[torch.Tensor], device: torch.device) -> None:
        """Has the current stream wait for a mark, and tensors stay until it has done with them if they are freed."""

    def allocate(self, make: Callable[[], T], device: torch.device) -> T:
        """The result of a function, whose tensors stay behind the step, and are of no memory pool of its caller."""
        return make()

    def staging(self, n: int) -> torch.Tensor:
        """Host memory of `n` 64-bit words, from which a copy to the device does not wait."""
        return torch.empty(n, dtype=torch.int64, device="cpu")

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies to the device, in the order of the current stream."""
        target.copy_(source)

    def sequence(self, launches: Sequence[Any], device: torch.device, stream: int) -> Callable[[], None]:
        """A function that makes launches of kernels in a stream, one after the other.

        Args:
          launches: the launches, as the kernels of the device bind them.
          device: the device, which is the current one where the function is called.
          stream: the stream.
        """

        def run() -> None:
            for launch in launches:
                launch()

        return run


class CudaStreams(Streams):
    """The streams of CUDA devices.

    Staged memory comes from torch's caching allocator of pinned memory. It notes each copy, and hands memory out
    again only after the copies from it are over.
    """

    captures = True

    def guard(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        is_current = torch.cuda.current_device() == device.index
        return contextlib.nullcontext() if is_current else torch.cuda.device(device)

    def stream(self, device: torch.device) -> int:
        return current_raw_stream(device.index)

    def is_capturing(self) -> bool:
        return bool(torch.cuda.is_current_stream_capturing())

    def mark(self, device: torch.device) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    def wait_for(self, mark: torch.cuda.Event, tensors: Iterable[torch.Tensor], device: torch.device) -> None:
        stream = torch.cuda.current_stream(device)
        stream.wait_event(mark)
        for x in tensors:
            x.record_stream(stream)

    def allocate(self, make: Callable[[], T], device: torch.device) -> T:
        """The result of a function that allocates in another thread, for the current stream of this one.

        The first run of `torch.compile(mode="reduce-overhead")` has all memory of its thread come from the pool of
        its graphs, and refuses what stays there.
        """
        stream = torch.cuda.current_stream(device)

        def run() -> T:
            with torch.cuda.stream(stream):
                return make()

        with ThreadPoolExecutor(1) as executor:
            return executor.submit(run).result()

    def staging(self, n: int) -> torch.Tensor:
        return torch.empty(n, dtype=torch.int64, device="cpu", pin_memory=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def sequence(self, launches: Sequence[Any], device: torch.device, stream: int) -> Callable[[], None]:
        return KernelSequence(launches, device, stream)


CUDA, HOST = CudaStreams(), Streams()


def streams_of(device: torch.device) -> Streams:
    """The streams of the kind of a device."""
    return CUDA if device.type == "cuda" else HOST
