"""C that asks thousands of objects at once, because asking each from Python takes longer than a kernel.

It asks torch by the functions of its stable C interface (`aoti_torch_get_*`), which take the address of a tensor, and
Python by those of its own. What it needs to know of torch besides is found out by `interior.py`; if it cannot be, or
there is no compiler, everything is asked from Python. It is compiled as a part of each kernel, and taken from
the first one.
"""

import ctypes
import functools
import struct
from importlib.resources import files
from typing import Any, NamedTuple

import torch

from .interior import Interior, find_interior
from .layout import PLAIN


FIELDS = ("TYPE", "KEYS", "DTYPE", "DEVICE", "DIM", "ITEMSIZE", "SPAN")  # of a description; sizes and strides follow
SOURCE = f"enum {{ {', '.join(FIELDS)}, NUMBERS }};\n" + files(__package__).joinpath("native.c").read_text("utf-8")

# what a `torch_t` points to, in its order
_PYTHON = (
    *("PyList_Size", "PyList_GetItem", "PyList_SetItem", "Py_IncRef", "Py_DecRef"),
    *("PyDict_GetItem", "PyDict_Next", "PyGC_Disable", "PyGC_Enable"),
)
_TORCH = tuple(
    f"aoti_torch_get_{name}"
    for name in (
        *("data_ptr", "storage_size", "storage_offset", "sizes"),
        *("strides", "dim", "dtype", "device_index"),
    )
)
# TensorImpl::grad() and THPVariable_Wrap(TensorBase const &): the gradient of a tensor, and what Python sees of it
_GRADIENT = ("_ZNK3c1010TensorImpl4gradEv", "_Z16THPVariable_WrapRKN2at10TensorBaseE")

_N, _ADDRESS, _BYTES, _OBJECT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p, ctypes.py_object
# results and arguments, after the `torch_t`
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "describe": (_N, (_OBJECT, _N, _N, _BYTES)),
    "scan": (ctypes.c_int, (_ADDRESS, _N, _ADDRESS, _N)),
    "count_up": (None, (_BYTES, _ADDRESS, _N)),
    "pick": (None, (_BYTES, _BYTES, _N, _BYTES)),
    "items": (_N, (_OBJECT, _N, _OBJECT, _N, _OBJECT)),
    "hold": (ctypes.c_int, (_OBJECT, _N, _OBJECT, _OBJECT, _N)),
    "are_parts": (ctypes.c_int, (_OBJECT, _N, _OBJECT)),
}


class Native(NamedTuple):
    """The functions of `native.c`.

    Args:
      torch: what they know torch and Python by, a `torch_t`.
    """

    torch: bytes
    describe: "ctypes._NamedFuncPointer"
    scan: "ctypes._NamedFuncPointer"
    count_up: "ctypes._NamedFuncPointer"
    pick: "ctypes._NamedFuncPointer"
    items: "ctypes._NamedFuncPointer"
    hold: "ctypes._NamedFuncPointer"
    are_parts: "ctypes._NamedFuncPointer"


loaded: list[Native] = []  # the first is used


def use(library: ctypes.CDLL) -> None:
    """Has the functions of `SOURCE` that are part of a library used from now on. Before, all is asked from Python.

    Raises:
      AttributeError: they are not there.
    """
    if loaded:
        return
    held = ctypes.PyDLL(library._name, handle=library._handle)  # called with the interpreter's lock
    functions = {name: getattr(held, name) for name in _SIGNATURES}
    for name, (result, arguments) in _SIGNATURES.items():
        functions[name].restype, functions[name].argtypes = result, (_BYTES, *arguments)
    interior, theirs = _interior(), ctypes.CDLL(torch._C.__file__)
    if interior is None or not all(hasattr(theirs, name) for name in _TORCH):  # pragma: no cover
        return
    pointers = [_address(ctypes.pythonapi, name) for name in _PYTHON]
    pointers += [*map(id, (list, dict, *PLAIN))]
    pointers += [_address(theirs, name) for name in (*_TORCH, *_GRADIENT)]
    pointers.append(_undefined(theirs))
    loaded.append(Native(struct.pack(f"{len(pointers)}q{len(interior)}q", *pointers, *interior), **functions))


def _undefined(library: ctypes.CDLL) -> int:
    """What torch has in the place of a gradient where there is none; 0 if it does not tell."""
    name, _ = _GRADIENT
    if not hasattr(library, name):
        return 0
    gradient = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)((name, library))
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():  # whatever mode the caller is in
        example = torch.zeros(1, device="cpu")  # held by its name until it has been asked
    return ctypes.c_void_p.from_address(gradient(example._cdata)).value or 0


@functools.cache
def _interior() -> Interior | None:
    try:
        return find_interior()
    except Exception:  # whatever has become of torch, Python can be asked
        return None


def _address(library: ctypes.CDLL, name: str) -> int:
    """Where a function is; 0 if there is none."""
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 if hasattr(library, name) else 0
