"""Steps within a CUDA graph: what would be wrong at a replay is refused, and memory that graphs read is kept.

A graph replays launches and copies with the addresses and numbers of the capture. A copy reads its host memory anew
at every replay. So a captured step has tables of its own: on the device in the graph's own pool, as temporaries of the
graph, and on the host in pinned memory that nobody writes again. Such memory cannot be allocated while a stream is
capturing; the steps before set it aside.
"""

import contextvars
import threading
from collections.abc import Collection, Iterable, Sequence
from typing import Self

import torch

from .streams import Streams, streams_of


RESERVE = 1 << 13  # words: 64 KiB
TABLES = 4  # tables, at least, that a reserve has room for


class CapturedMemory:
    """The memory that CUDA graphs of steps read: it stays for as long as this object.

    A graph replays launches and copies with addresses, so tables on the device and in pinned memory have to outlive
    it; torch tells nobody when a graph is gone. Captures in a `with` block of an object
    leave them to it: keep it beside the graph, and let both go together, when the device has done with its replays.
    Captures outside of one leave them to the process. They are some tens of bytes for each tensor, and 64 KiB or more
    for each graph. A step that is refused leaves nothing, unless its message says to discard the graph.

    Example:
      >>> memory = CapturedMemory()
      >>> with memory:  # and `torch.cuda.graph(graph)`
      ...     pass
    """

    def __init__(self) -> None:
        self._held: dict[int, object] = {}  # by identity

    def __enter__(self) -> Self:
        _holders.set((*_holders.get(), self))
        return self

    def __exit__(self, *error: object) -> None:
        # blocks in generators may end in another order than they began, or in another context
        holders = _holders.get()
        last = next((k for k in reversed(range(len(holders))) if holders[k] is self), None)
        if last is not None:
            _holders.set((*holders[:last], *holders[last + 1 :]))

    def hold(self, memory: object) -> None:
        """Keeps memory that a graph reads."""
        self._held[id(memory)] = memory

    @property
    def held(self) -> list[object]:
        """The memory that is kept."""
        return [*self._held.values()]

    def clear(self) -> None:
        """Lets go of all memory, when no graph that reads it will be replayed again."""
        self._held.clear()


PROCESS = CapturedMemory()  # of captures that nobody else holds memory of
# the objects in whose `with` blocks the current code runs, the innermost last
_holders: contextvars.ContextVar[tuple[CapturedMemory, ...]] = contextvars.ContextVar("holders", default=(PROCESS,))


def hold(memory: object) -> None:
    """Keeps memory that the graph being captured reads."""
    _holders.get()[-1].hold(memory)


class CaptureError(RuntimeError):
    """A step that a CUDA graph cannot replay, found while it is captured.

    Args:
      reason: the reason.
      advice: the way out.
      partly: whether a part of the step has been captured by then. Otherwise nothing has.
    """

    def __init__(self, reason: str, advice: str, partly: bool = False) -> None:
        end = " A part of it has been captured: discard the graph." if partly else ""
        super().__init__(f"this step cannot be captured in a CUDA graph: {reason}; {advice}.{end}")
        self._arguments = reason, advice, partly

    def behind_a_part(self) -> "CaptureError":
        """The same error of a step of which a part has been captured."""
        return CaptureError(*self._arguments[:2], True)

    def __reduce__(self) -> tuple[type[Self], tuple[str, str, bool]]:
        return type(self), self._arguments


class Reserve:
    """Host memory that is set aside for tables of captured steps.

    Args:
      n: words of a table.
      streams: the streams of the device.
    """

    def __init__(self, n: int, streams: Streams) -> None:
        self.size, self.streams = max(TABLES * n, RESERVE), streams
        self.block = self._make()
        self.used = 0
        self.lock = threading.Lock()

    def refill(self) -> None:
        """Sets other memory aside if graphs have some of it. Not to be called while a stream is capturing."""
        with self.lock:
            if self.used:
                self.block, self.used = self._make(), 0

    def _make(self) -> torch.Tensor:
        with torch.inference_mode(False):  # steps outside of that mode write to it, too
            return self.streams.staging(self.size)

    def take(self, n: int) -> torch.Tensor:
        """Memory of `n` words that a graph may read as long as it lives.

        Raises:
          CaptureError: nothing is left.
        """
        with self.lock:
            start, self.used = self.used, self.used + n
            if self.used > self.size:
                self.used = start
                raise CaptureError(
                    f"the {self.size // n} tables set aside for it are in use by captured steps",
                    "take a step outside of a graph before the next capture, or capture fewer steps at once",
                )
            return self.block[start : start + n]


def can_capture(devices: Iterable[torch.device]) -> bool:
    """Whether steps on some devices can be captured."""
    return any(streams_of(device).captures for device in devices)


def is_capturing(devices: Iterable[torch.device | None]) -> bool:
    """Whether the current stream of one of some devices records a graph."""
    for device in set(devices) - {None}:
        assert device is not None
        with streams_of(device).guard(device):
            if streams_of(device).is_capturing():
                return True
    return False


def refuse_other_devices(devices: Collection[torch.device]) -> None:
    """Refuses leaves on devices whose streams are not capturing while that of another one is.

    Raises:
      CaptureError: there are some.
    """
    captured = [device for device in devices if is_capturing([device])]
    apart = next((device for device in devices if device not in captured), None)
    if captured and apart is not None:
        raise CaptureError(
            f"some of its leaves are on {apart}, whose stream is not capturing, and replays would leave them out",
            f"capture a step of the leaves on {captured[0]}, and take one of the others outside of the graph",
        )


def refuse_numbers(hypers: Iterable[object], devices: Collection[torch.device]) -> None:
    """Refuses hyper-parameters in captured steps that are tensors elsewhere than on some devices.

    Raises:
      CaptureError: one of them is.
    """
    apart = next((x.device for x in hypers if isinstance(x, torch.Tensor) and x.device not in devices), None)
    if apart is not None:
        raise CaptureError(
            f"a hyper-parameter is a tensor on {apart}, and a graph would keep its value",
            f"move it to {next(iter(devices))}, where replays read it",
        )


def refuse_new_numbers() -> None:
    """Refuses Python numbers in a captured step that are not those of the step before.

    Raises:
      CaptureError: always.
    """
    raise CaptureError(
        "a hyper-parameter that is a Python number has another value than in the step before, and a graph would "
        "keep it",
        "pass it as a tensor on the device, or take a step with this value before the capture",
    )


class NumberWatch:
    """The Python numbers of steps that operations of torch take, which a graph keeps as constants."""

    def __init__(self) -> None:
        self.seen: list[int | float] = []  # of the last step that was not captured

    def check(self, hypers: Sequence[object], devices: Collection[torch.device]) -> None:
        """Notes the numbers of a step outside of a graph; refuses others while a stream is capturing.

        Args:
          hypers: the hyper-parameters, tensors among them.
          devices: the devices of the step.

        Raises:
          CaptureError: a graph could not replay this step.
        """
        constants = [x for x in hypers if isinstance(x, (int, float))]
        if not is_capturing(devices):
            self.seen = constants
            return
        refuse_numbers(hypers, devices)
        if constants != self.seen:
            refuse_new_numbers()


def refuse_binding(devices: Iterable[torch.device]) -> None:
    """Refuses a first step while a stream is capturing.

    Raises:
      CaptureError: a stream is capturing.
    """
    if is_capturing(devices):
        raise CaptureError(
            "it is the first one over these tensors (shapes, dtypes, groups, which gradients are there)",
            "take two such steps before the capture, with gradients for the same parameters",
        )


def refuse_new_state(devices: Iterable[torch.device | None]) -> None:
    """Refuses to make the state of a parameter while a stream is capturing.

    Raises:
      CaptureError: a stream is capturing.
    """
    if is_capturing(devices):
        raise CaptureError(
            "it is the first one of a parameter, whose state each replay would start anew",
            "take two such steps before the capture, with gradients for the same parameters",
        )


def refuse_state_of_python(key: str) -> None:
    """Refuses an entry of state that a graph cannot move on, after the capture of the operations that compute it.

    Raises:
      CaptureError: always.
    """
    raise CaptureError(
        f"the entry {key!r} of its state changes in Python, or is a tensor of another shape, dtype or device than "
        f"before, and replays would not change it",
        "keep it in a tensor on the device, of one shape and dtype",
    ).behind_a_part()


def refuse_new_trees(device: torch.device | None) -> None:
    """Refuses a donated step whose state is in new tensors while a stream is capturing.

    Raises:
      CaptureError: a stream is capturing.
    """
    if is_capturing([device]):
        raise CaptureError(
            "it is donated, but rules for whole tensors, or Python code, have a part in it, whose state is in new "
            "tensors at each step, so that each replay would start from the old ones",
            "capture a step that is not donated, and copy its results to its arguments there, or use an optimizer of "
            "functional_optim.adapters",
        )


def refuse_counter(name: str, count: object, device: torch.device) -> None:
    """Refuses a counter that a graph would keep as it is.

    Raises:
      CaptureError: always.
    """
    place = f"on {count.device}" if isinstance(count, torch.Tensor) else "a number of Python"
    raise CaptureError(f"{name} is {place}, and a graph would keep its value", f"move it to {device}")


def refuse_work_of_the_host(work: str, devices: Iterable[torch.device | None]) -> None:
    """Refuses a step in which the host reads tensors and decides by them, while a stream is capturing.

    Args:
      work: the part of the step that does so.
      devices: the devices of the step.

    Raises:
      CaptureError: a stream is capturing.
    """
    if is_capturing(devices):
        raise CaptureError(
            f"{work} on the host, which reads numbers of the device",
            "capture the computation of the loss and of its gradients alone, and take the step outside of the graph",
        )


def refuse_host_schedule(name: str, devices: Iterable[torch.device | None]) -> None:
    """Refuses a schedule that Python evaluates while a stream is capturing.

    Raises:
      CaptureError: a stream is capturing.
    """
    if is_capturing(devices):
        raise CaptureError(
            f"the schedule of {name} is evaluated in Python, and a graph would keep its value",
            "write it with operators and functions of torch, so that it can be traced, or pass a tensor on the "
            "device and write to it between replays",
        )
