"""A stand-in for a CUDA device: the calls of the host side are counted, and graphs are captured and replayed.

Launches run in Triton's interpreter, on tensors of the CPU.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from functional_optim._compiler.passes import Signature
from functional_optim._runtime.cuda import launch, streams
from functional_optim._runtime.cuda.loaded import Loaded, load_kernels


class StandIn(streams.Streams):
    """A device that counts.

    Attributes:
      current: the current stream.
      copies: the sizes of all copies to the device, in words.
      followed: how often a stream waited for the tables of a binding.
      graph: the copies and launches that have been captured; None if nothing is being captured.
    """

    captures = True

    def __init__(self) -> None:
        self.current = 0
        self.copies: list[int] = []
        self.followed = 0
        self.graph: list[Callable[[], Any]] | None = None
        self.pool: list[Any] = []

    def stream(self, device: torch.device) -> int:
        return self.current

    def is_capturing(self) -> bool:
        return self.graph is not None

    def wait_for(self, mark: None, tensors: Any, device: torch.device) -> None:
        assert self.graph is None, "a captured stream waits for an event from outside"
        self.followed += 1

    def staging(self, n: int) -> torch.Tensor:
        assert self.graph is None, "pinned memory is allocated while a stream is capturing"
        return super().staging(n)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if self.graph is not None:
            self.graph.append(lambda: target.copy_(source))
        else:
            self.copies.append(source.numel())
            target.copy_(source)

    @contextlib.contextmanager
    def capture(self) -> Iterator[list[Callable[[], Any]]]:
        """Captures the copies and launches within the block."""
        self.graph = graph = []
        try:
            yield graph
        finally:
            self.graph = None

    def load(self, signature: Signature, device: torch.device, aligned: bool) -> tuple[Loaded, ...]:
        """`load_kernels`, whose kernels are captured."""
        return tuple(
            Loaded(*(None if kernel is None else _Kernel(self, kernel) for kernel in stage))
            for stage in load_kernels(signature, device, aligned)
        )


class _Kernel:
    """A kernel whose launches are captured while a stream is capturing."""

    def __init__(self, device: StandIn, kernel: Any) -> None:
        self.device, self.kernel = device, kernel

    def bind(self, programs: int, arguments: Any) -> Callable[[], None]:
        launch = self.kernel.bind(programs, arguments)

        def run() -> None:
            if self.device.graph is None:
                launch()
            else:
                self.device.graph.append(launch)

        return run


@contextlib.contextmanager
def stand_in() -> Iterator[StandIn]:
    """Has launches on the CPU go to a stand-in."""
    device = StandIn()
    make = launch.DeviceMemory

    def kept(*arguments: Any) -> Any:
        """Memory that is not freed, as that of a graph's pool is not, in which addresses stay good."""
        device.pool.append(make(*arguments))
        return device.pool[-1]

    with (
        mock.patch.object(streams, "HOST", device),
        mock.patch.object(launch, "load_kernels", device.load),
        mock.patch.object(launch, "DeviceMemory", kept),
    ):
        yield device


def replay(graph: list[Callable[[], Any]]) -> None:
    """Runs what has been captured."""
    for call in graph:
        call()
