"""The backend of a step: the one asked for, or the fastest that applies."""

import contextlib
import contextvars
import functools
import importlib.util
import threading
from collections.abc import Iterator

import torch

from .._compiler.c.build import find_compiler
from .._compiler.triton.build import interprets
from .._warn import warn


BACKENDS = ("reference", "foreach", "c", "triton")
KERNEL_BACKENDS = ("c", "triton")
REQUESTED: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)  # by `use_backend`

# the backend that is asked for where operations of torch take its place, as derivatives of compiled steps do
REPLACED: contextvars.ContextVar[str | None] = contextvars.ContextVar("replaced backend", default=None)


class Asked(threading.local):
    """The backends that the blocks of `use_backend` around this line of this thread ask for, the innermost last.

    A compiler follows no context variables, and guards its graphs by this.
    """

    def __init__(self) -> None:
        self.names: list[str] = []


ASKED = Asked()
_disabled: dict[str, str] = {}  # backends that failed to build a kernel in this process, and the reason
_warned: set[str] = set()  # reasons that a warning has named


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Chooses the backend that computes updates within a `with` block.

    A backend that cannot compute the tensors of a step at all is an error of the step: Triton on the CPU, C on a GPU
    or without a compiler. So is one that cannot serve a transform: kernels in forward mode, for derivatives within
    `vmap` and for second ones, `"foreach"` wherever something is mapped or differentiated. For tensors of other
    classes, on several devices, and after a kernel has failed to build, which a warning says, the next best one takes
    its place; `explain` says which and why.

    Tasks of asyncio may have a block each. Compiled steps are guarded by the block of their thread that was entered
    last, so none of them belongs behind an `await` in a block.

    Args:
      name: `"reference"`, `"foreach"`, `"c"` or `"triton"`.

    Yields:
      Nothing.

    Raises:
      ValueError: the name is unknown.

    Example:
      >>> with use_backend("reference"):
      ...     pass
    """
    _check(name)
    token = None if torch.compiler.is_dynamo_compiling() else REQUESTED.set(name)
    names = ASKED.names
    names.append(name)
    try:
        yield
    finally:
        names.pop()
        if token is not None:
            REQUESTED.reset(token)


@contextlib.contextmanager
def computed_by(name: str | None, reference: bool = False) -> Iterator[None]:
    """Computes by the backend that was asked for where a step was compiled; if none was, by the one asked for here.

    Args:
      name: that backend.
      reference: whether the reference takes its place; a backend that could not compute a leaf is refused all the same.
    """
    if name:  # files may hold any
        _check(name)
    token = REQUESTED.set("reference" if reference else name or REQUESTED.get())
    replaced = REPLACED.set(name if reference else None)
    try:
        yield
    finally:
        REPLACED.reset(replaced)
        REQUESTED.reset(token)


def refuse_replacement(asked: str | None, follower: str) -> None:
    """Refuses operations of torch in the place of a backend that is asked for by name.

    Args:
      asked: the backend, if one is asked for.
      follower: the transform that needs them, for the message.

    Raises:
      RuntimeError: it is another one than the reference, and has not failed to build a kernel, of which a warning told.
    """
    if asked not in (None, "reference", *_disabled):
        raise RuntimeError(
            f"the backend {asked!r} is asked for, but cannot serve {follower}, which follows operations of torch; ask "
            f"for 'reference' there, or for none, and the fastest backend that can is chosen."
        )


def _check(name: str) -> None:
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r:.60}; there are {', '.join(map(repr, BACKENDS))}.")


@functools.lru_cache(maxsize=1)
def _has_triton() -> bool:
    """Whether Triton is installed. Kernels on disk need no import of it; should it be broken, a build says so."""
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # something keeps it from being imported, or stands in its place
        return False


def choose_backend(device: torch.device, where: str = "") -> tuple[str, str]:
    """The backend for plain tensors on a device, and the reason if it is not the fastest or the one asked for.

    Args:
      device: the device.
      where: the place of a leaf on it, for messages.

    Raises:
      RuntimeError: the backend that is asked for never computes tensors on this device, here.
    """
    asked = REQUESTED.get()
    if asked in ("reference", "foreach"):
        return asked, ""
    if asked is not None:
        check_backend(asked, device, where)
    best = "triton" if asked == "triton" or (asked is None and device.type == "cuda") else "c"
    why = _why_never(best, device) or _disabled.get(best, "")
    if not why:
        return best, ""
    if device.type not in ("cpu", "cuda"):
        return "reference", why
    _warn_of(why)
    return "foreach", why


def check_backend(asked: str, device: torch.device, where: str = "") -> None:
    """Refuses a backend that is asked for and never computes tensors on a device, in this process.

    Raises:
      RuntimeError: with the place of a leaf, the reason, and the backends that compute it.
    """
    never = _why_never(asked, device)
    if never:
        others = " or ".join(repr(name) for name in BACKENDS if not _why_never(name, device))
        raise RuntimeError(
            f"the backend {asked!r} is asked for, but cannot compute the leaf{where} on {device}: {never}. Ask for "
            f"{others}, or leave `use_backend` out, and the fastest that applies is chosen."
        )


def _why_never(backend: str, device: torch.device) -> str:
    """The reason for which a backend cannot compute anything on a device in this process; empty if it may."""
    if backend == "triton":
        if not _has_triton():
            return "Triton is not installed"
        if device.type == "cuda" and torch.version.hip is not None:
            return "kernels are compiled for CUDA devices, and this is one of ROCm"
        if device.type == "cuda":
            return "TRITON_INTERPRET is set, and the interpreter reads no memory of a GPU" if interprets() else ""
        if not (device.type == "cpu" and interprets()):
            return "Triton runs on CUDA devices, and on the CPU where TRITON_INTERPRET=1 is set before it is imported"
    if backend == "c":
        if device.type != "cpu":
            return f"there is no C kernel for {device.type}"
        if find_compiler() is None:
            return "there is no C compiler: neither $CC nor cc, gcc or clang is on the PATH"
    return ""


def disable_backend(backend: str, why: str) -> None:
    """Remembers that a backend cannot build kernels, so that it is not tried at every step; warns once."""
    _disabled.setdefault(backend, why)
    _warn_of(_disabled[backend])


def _warn_of(why: str) -> None:
    if why not in _warned:
        _warned.add(why)
        warn(f"Updates are computed without generated kernels, and slower: {why}.")


def enable_backends() -> None:
    """Has backends that could not build a kernel tried anew."""
    _disabled.clear()
    _warned.clear()
    _has_triton.cache_clear()
