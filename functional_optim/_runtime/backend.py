"""The backend of a step: the one asked for, or the fastest that applies."""

import contextlib
import contextvars
import functools
import os
import warnings
from collections.abc import Iterator

import torch

from .._compiler.c.build import find_compiler


BACKENDS = ("reference", "foreach", "c", "triton")
_requested: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)
# the same as a list, of all threads: a compiler follows no context variables, and guards its graphs by this
ASKED: list[str] = []
_given_up: dict[str, str] = {}  # backends that failed to build a kernel in this process, and the reason


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Chooses the backend that computes updates within a `with` block.

    Where it does not apply (Triton without a GPU, kernels in forward mode), the next best one
    does; `explain` says which and why.

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
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(map(repr, BACKENDS))}.")
    token = None if torch.compiler.is_dynamo_compiling() else _requested.set(name)
    ASKED.append(name)
    try:
        yield
    finally:
        ASKED.pop()
        if token is not None:
            _requested.reset(token)


def requested_backend() -> str | None:
    """The backend that `use_backend` asks for, if any."""
    return _requested.get()


@functools.lru_cache(maxsize=1)
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def choose_backend(device: torch.device) -> tuple[str, str]:
    """The backend for plain tensors on a device, and the reason if it is not the fastest or the one asked for."""
    asked = _requested.get()
    if asked in ("reference", "foreach"):
        return asked, ""
    if asked == "triton" or (asked is None and device.type == "cuda"):
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        runs = device.type == "cuda" or (device.type == "cpu" and interpreted)
        if _has_triton() and runs and "triton" not in _given_up:
            return "triton", ""
        why = f"Triton does not run on {device.type}" if _has_triton() else "Triton is not installed"
        if device.type == "cuda" and not _has_triton():
            give_up("triton", why)
        why = _given_up.get("triton", why)
    elif device.type == "cpu":
        if "c" not in _given_up and find_compiler() is None:
            give_up("c", "there is no C compiler: neither $CC nor cc, gcc or clang is on the PATH")
        if "c" not in _given_up:
            return "c", ""
        why = _given_up["c"]
    else:
        why = f"there is no C kernel for {device.type}"
    return ("foreach" if device.type in ("cpu", "cuda") else "reference"), why


def give_up(backend: str, why: str) -> None:
    """Remembers that a backend cannot build kernels, so that it is not tried at every step; warns once."""
    if backend not in _given_up:
        _given_up[backend] = why
        warnings.warn(f"Updates are computed without generated kernels, and slower: {why}.", stacklevel=2)


def try_again() -> None:
    """Forgets which backends were given up."""
    _given_up.clear()
    _has_triton.cache_clear()
