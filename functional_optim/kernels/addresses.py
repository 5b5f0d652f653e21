"""Where tensors are, and whether they are the same ones, for thousands of them at once.

Asking each tensor from Python takes longer than a kernel takes to update it, so a few lines of C ask torch. They are
compiled as a part of each kernel, and taken from the first one.
"""

import ctypes
import struct
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch


try:  # what torch's own compiled kernels ask for addresses with: a C function of a Python object
    from torch._C._dynamo.guards import _torchinductor_pyobject_tensor_data_ptr as DATA_PTR  # type: ignore[attr-defined]
except ImportError:  # pragma: no cover
    DATA_PTR = 0

BODY = attrgetter("_cdata")
SOURCE = """\
#include <stdint.h>

typedef void *(*item_t)(void *list, intptr_t i);
typedef void *(*address_t)(void *tensor);

void addresses(void *list, int64_t n, item_t item, address_t address, int64_t *out) {
    for (int64_t i = 0; i < n; i++) out[i] = (int64_t)(intptr_t)address(item(list, i));
}

/* With thousands of tensors most of a step is waiting for what is known of each, one after another. This only asks
   for it early. A Python object begins with its count of references and its type; where one of a subclass of torch's
   type points to its tensor is tried. */
void fetch(void *list, int64_t n, item_t item, void *type) {
    for (int64_t i = 0; i < n; i++) __builtin_prefetch(item(list, i));
    for (int64_t i = 0; i < n; i++) {
        char **words = item(list, i);
        if (words[1] != type) continue;
        for (int k = 2; k < 4; k++)
            for (int line = 0; line < 4; line++) __builtin_prefetch(words[k] + 64 * line);
    }
}

void identities(void *list, int64_t n, item_t item, int64_t *out) {
    for (int64_t i = 0; i < n; i++) out[i] = (int64_t)(intptr_t)item(list, i);
}

/* Which tensors of torch some tensors of Python stand for: an object points to its one behind its type. */
void bodies(void *list, int64_t n, item_t item, int64_t *out) {
    for (int64_t i = 0; i < n; i++) {
        const int64_t *words = item(list, i);
        out[2 * i] = words[2];
        out[2 * i + 1] = words[3];
    }
}
"""


class _Functions(NamedTuple):
    addresses: "ctypes._NamedFuncPointer"
    fetch: "ctypes._NamedFuncPointer"
    identities: "ctypes._NamedFuncPointer"
    bodies: "ctypes._NamedFuncPointer"
    item: int | None


_functions: list[_Functions] = []  # at most one


def use(library: ctypes.CDLL) -> None:
    """Has the functions of `SOURCE` that are part of a library used from now on. Before, all is done in Python.

    Raises:
      AttributeError: they are not there.
    """
    if _functions:
        return
    held = ctypes.PyDLL(library._name, handle=library._handle)  # called with the interpreter's lock
    n, pointer, object_ = ctypes.c_int64, ctypes.c_void_p, ctypes.py_object
    item = ctypes.cast(ctypes.pythonapi.PyList_GetItem, pointer).value
    found = _Functions(held.addresses, held.fetch, held.identities, held.bodies, item)
    found.addresses.argtypes, found.addresses.restype = [object_, n, pointer, pointer, pointer], None
    found.fetch.argtypes, found.fetch.restype = [object_, n, pointer, pointer], None
    found.identities.argtypes, found.identities.restype = [object_, n, pointer, pointer], None
    found.bodies.argtypes, found.bodies.restype = [object_, n, pointer, pointer], None
    _functions.append(found)


def addresses(tensors: Sequence[torch.Tensor]) -> bytes:
    """Addresses of tensors, as 64-bit integers."""
    return struct.pack(f"{len(tensors)}q", *map(torch.Tensor.data_ptr, tensors))


def guarded_addresses(tensors: list[torch.Tensor]) -> bytes:
    """The same, of strided tensors that torch's own `data_ptr` works on: with anything else the process ends."""
    if not (_functions and DATA_PTR):
        return addresses(tensors)
    functions = _functions[0]
    out = ctypes.create_string_buffer(8 * len(tensors))
    functions.addresses(tensors, len(tensors), functions.item, DATA_PTR, out)
    return out.raw


def fetch(tensors: list[Any]) -> None:
    """Has what is known of tensors brought near, for whoever looks at them next.

    Other objects may be among them. Those are passed over, and so are tensors of another class than the first.
    """
    if _functions and tensors and issubclass(type(tensors[0]), torch.Tensor):
        _functions[0].fetch(tensors, len(tensors), _functions[0].item, id(type(tensors[0])))


def identities(objects: list[Any]) -> bytes:
    """What tells objects from all others that are alive, as 64-bit integers."""
    if not _functions:
        return struct.pack(f"{len(objects)}q", *map(id, objects))
    out = ctypes.create_string_buffer(8 * len(objects))
    _functions[0].identities(objects, len(objects), _functions[0].item, out)
    return out.raw


def bodies(tensors: list[torch.Tensor]) -> bytes:
    """What shows whether `swap_tensors` has been at tensors: it leaves the objects, but not what they stand for."""
    if not _functions:
        return struct.pack(f"{len(tensors)}q", *map(BODY, tensors))
    out = ctypes.create_string_buffer(16 * len(tensors))
    _functions[0].bodies(tensors, len(tensors), _functions[0].item, out)
    return out.raw


def same(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists hold the very same objects.

    Example:
      >>> x, y = torch.ones(1), torch.ones(1)
      >>> same([x, y], [x, y]), same([x, y], [x, x])
      (True, False)
    """
    return len(a) == len(b) and identities(a) == identities(b)
