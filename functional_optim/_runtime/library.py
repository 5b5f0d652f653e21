"""The compiled `pointers.c`, and the operations on lists of tensors that it registers with torch."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .._compiler.c.build import load_c
from .._compiler.cache import BuildError
from .internals import library_of_torch


NAMESPACE = "functional_optim"
ABI_VERSION = 2 << 56 | 10 << 48  # torch 2.10, the first with all functions of the C ABI in use
HEAD = 7  # numbers of a row before sizes and strides; `SIZES` of pointers.c
DIM, SPAN, ITEM = 4, 5, 6


def library() -> ctypes.CDLL:
    """The compiled `pointers.c`.

    Raises:
      BuildError: there is no working compiler.
    """
    found = _library()
    if isinstance(found, str):
        raise BuildError(found)
    return found


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | str:
    """The library, or the reason why there is none: a compiler that hangs is waited for once."""
    try:
        return load_c(Path(__file__).with_name("pointers.c").read_text())
    except BuildError as error:
        return str(error)


@functools.lru_cache(maxsize=1)
def operations() -> Any:
    """The operations of `pointers.c`, registered; None where there is no C compiler.

    A registration lasts as long as the process, so it is found again after the cache has been cleared.
    """
    if hasattr(getattr(torch.ops, NAMESPACE), "read_pointers"):
        return getattr(torch.ops, NAMESPACE)
    try:
        loaded = library()
        torch_library = library_of_torch()
        n = ctypes.c_int.in_dll(loaded, "n_functions").value
        names = [(name or b"").decode() for name in (ctypes.c_char_p * n).in_dll(loaded, "function_names")]
        functions = [getattr(ctypes.pythonapi if name.startswith("Py") else torch_library, name) for name in names]
        loaded.resolve((ctypes.c_void_p * n)(*[ctypes.cast(function, ctypes.c_void_p) for function in functions]))
        if loaded.register_operations(NAMESPACE.encode(), ctypes.c_uint64(ABI_VERSION)):
            return None
    except (BuildError, OSError, AttributeError):
        return None
    for name in ("read_pointers", "describe"):
        torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *_: None)  # operations without a result
    return getattr(torch.ops, NAMESPACE)


def spec_rows(tensors: Sequence[torch.Tensor], dims: int) -> torch.Tensor:
    """Rows of `pointers.c` that describe tensors.

    Args:
      tensors: the tensors.
      dims: number of dimensions, at least, that there are columns for.
    """
    table = torch.zeros((len(tensors), HEAD + 2 * dims), dtype=torch.int64, device="cpu")
    with torch.no_grad():
        operations().describe.default(list(tensors), table)
    return table
