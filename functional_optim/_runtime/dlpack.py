"""The tensors of a step as DLPack describes them to C, in a third of the time of an operation, but without storages.

`__dlpack_c_exchange_api__` of a tensor's class is the table of functions that version 1.3 of DLPack asks for. They tell
the data pointer, dtype, device, sizes and strides of a tensor, so they find those that are as they were before.
"""

import ctypes
import functools
import itertools
from collections.abc import Collection, Sequence
from typing import Any

import torch

from .library import library


class _Functions(ctypes.Structure):
    """`dl_functions_t` of `pointers.c`."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        *((name, ctypes.c_void_p) for name in ("previous", "allocate", "own", "wrap", "describe")),
    ]


class _Bound(ctypes.Structure):
    """`bound_t` of `pointers.c`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("item_of", "class_of", "release", "clear_error", "functions")),
        ("classes", ctypes.py_object * 2),
        ("spec_index", ctypes.c_void_p),
        ("specs", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("width", ctypes.c_int64),
    ]


class MovedTensors:
    """The search for tensors that are not where and as they were when their data pointers were read.

    Args:
      functions: the address of DLPack's functions of tensors.
      classes: the classes of tensors, one or two.
      spec_index: for each tensor, its row.
      table: rows of `pointers.c`.

    Attributes:
      find: a function of a list of tensors, `bound`, the address of pointers and an address for positions, which writes
        the positions of those that may have moved, in order, and returns their number.
      bound: the address of what it knows of the tensors.
    """

    def __init__(
        self, functions: int, classes: Collection[type], spec_index: torch.Tensor, table: torch.Tensor
    ) -> None:
        names = ("PyList_GetItem", "PyObject_Type", "Py_DecRef", "PyErr_Clear")
        python = [ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p) for name in names]
        both: list[Any] = list(itertools.islice(itertools.cycle(classes), 2))
        self._tables = spec_index, table  # whose memory is read
        n, width = len(spec_index), table.shape[1]
        self._bound = _Bound(
            *python, functions, (ctypes.py_object * 2)(*both), spec_index.data_ptr(), table.data_ptr(), n, width
        )
        self.bound = ctypes.addressof(self._bound)
        self.find = _find()


def moved_tensors(
    tensors: Sequence[torch.Tensor], spec_index: torch.Tensor, table: torch.Tensor
) -> MovedTensors | None:
    """The search for tensors with classes and specs of some others, with DLPack's numbers of these added to their rows.

    Args:
      tensors: the others.
      spec_index: for each tensor, its row.
      table: rows of `pointers.c`.

    Returns:
      The search, or None if DLPack does not describe these tensors.
    """
    functions = _functions()
    if functions is None:
        return None
    moved = MovedTensors(functions, set(map(type, tensors)), spec_index, table)
    return None if _describe()(list(tensors), moved.bound) else moved


@functools.lru_cache(maxsize=1)
def _functions() -> int | None:
    """The address of DLPack's functions of torch's tensors; None if they are not those that `pointers.c` knows."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    address: int = pointer_of(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, b"dlpack_exchange_api")
    functions = _Functions.from_address(address)
    return address if functions.major == 1 and functions.minor >= 3 and functions.describe else None


@functools.lru_cache(maxsize=1)
def _describe() -> Any:
    """`describe_for_dlpack` of `pointers.c`, which is called with the interpreter's lock."""
    return ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)(("describe_for_dlpack", library()))


@functools.lru_cache(maxsize=1)
def _find() -> Any:
    """`find_moved` of `pointers.c`, which is called with the interpreter's lock."""
    addresses = [ctypes.c_void_p] * 3
    return ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.py_object, *addresses)(("find_moved", library()))
