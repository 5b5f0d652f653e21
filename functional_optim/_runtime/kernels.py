"""The kernels of groups, built once and kept by the cache of their backend, where launches find them."""

from collections.abc import Callable, Iterable
from typing import Any

from .._compiler.cache import BuildError
from .backend import disable_backend
from .cpu import compile_c
from .cuda.loaded import load_kernels
from .groups import Group


_COMPILE: dict[str, Callable[[Group], Any]] = {
    "c": lambda group: compile_c(group.signature),
    "triton": lambda group: load_kernels(group.signature, group.device, aligned=True),
}


def build_kernels(backend: str, groups: Iterable[Group]) -> bool:
    """Builds the kernels of groups; returns False, and disables the backend, if one cannot be built."""
    try:
        for group in groups:
            _COMPILE[backend](group)
    except BuildError as error:
        disable_backend(backend, str(error))
        return False
    return True
