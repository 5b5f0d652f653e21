"""What and where tensors are, for thousands of them at once.

Asking each tensor from Python takes longer than a kernel takes to update it. So a few lines of C ask torch, by the
functions of its stable C interface (`aoti_torch_get_*`), which take the address of a tensor. What they need to know
of torch besides is where a Python object has its tensor, where that has its dispatch keys, which tell sparse, negated
and wrapped tensors from those that a kernel may be handed, where it points to its version, and where in that the number
is. These are found by looking at a few tensors of which they are known; if they are not found, or there is no compiler,
everything is asked from Python. The lines are compiled as a part of each kernel, and taken from the first one.
"""

import ctypes
import itertools
import struct
from array import array
from collections.abc import Sequence
from operator import attrgetter, is_, itemgetter
from types import MemberDescriptorType
from typing import Any, NamedTuple

import torch

from .build import parallel_address
from .layout import PLAIN, span


FIELDS = ("TYPE", "KEYS", "DTYPE", "DEVICE", "DIM", "ITEMSIZE", "SPAN")  # of a description; sizes and strides follow
SOURCE = """\
#include <stdint.h>
#include <string.h>

typedef struct {
    void *(*item)(void *list, intptr_t i); /* of Python */
    int (*set_item)(void *list, intptr_t i, void *object);
    void (*keep)(void *object), (*let_go)(void *object);
    void *(*ask)(void *object, void *name), *(*look_up)(void *dict, void *key);
    int (*next)(void *dict, intptr_t *position, void **key, void **value);
    void *none, *dict;
    /* of torch; 0 if all is well */
    int32_t (*data_ptr)(void *tensor, void **), (*storage_size)(void *tensor, int64_t *);
    int32_t (*storage_offset)(void *tensor, int64_t *), (*sizes)(void *tensor, int64_t **);
    int32_t (*strides)(void *tensor, int64_t **), (*dim)(void *tensor, int64_t *);
    int32_t (*dtype)(void *tensor, int32_t *), (*device_index)(void *tensor, int32_t *);
    void **(*grad)(const void *tensor), *(*wrap)(void **tensor); /* 0 where torch has no such functions */
    /* where a Python object points to its tensor, and where that has its keys and points to its version, in words;
       and where in that its number is, in bytes */
    int64_t body, keys, version, number;
} torch_t;

enum { FIELDS, NUMBERS };
typedef void (*parallel_t)(void (*)(void *), void *, unsigned, unsigned);
enum { AHEAD = 12 }; /* how many tensors early something is asked for */
enum { PART = 128 }; /* how many tensors a thread takes at once */

/* What a tensor is; how large its elements are, and how far they reach, is left to whoever knows. */
static int describe_one(const torch_t *t, void **object, int64_t width, int64_t *out) {
    void *tensor = object + t->body;
    int64_t *numbers;
    int32_t dtype, device;
    out[TYPE] = (int64_t)(intptr_t)object[1];
    out[KEYS] = ((const int64_t *)object[t->body])[t->keys];
    if (t->dtype(tensor, &dtype) || t->device_index(tensor, &device) || t->dim(tensor, out + DIM)) return 1;
    if (NUMBERS + 2 * out[DIM] > width) return 1;
    out[DTYPE] = dtype, out[DEVICE] = device, out[ITEMSIZE] = out[SPAN] = 0;
    if (t->sizes(tensor, &numbers)) return 1;
    memcpy(out + NUMBERS, numbers, 8 * out[DIM]);
    if (t->strides(tensor, &numbers)) return 1;
    memcpy(out + NUMBERS + out[DIM], numbers, 8 * out[DIM]);
    return 0;
}

/* Describes tensors of torch's own classes; returns how many it could, one after another. */
int64_t describe(const torch_t *t, void *list, int64_t n, int64_t width, int64_t *out) {
    for (int64_t i = 0; i < n; i++)
        if (describe_one(t, t->item(list, i), width, out + i * width)) return i;
    return n;
}

/* A list, which description each of its objects has, -1 for none, and the descriptions; and where it is noted where
   tensors are, and where their versions. */
typedef struct {
    void *list;
    int64_t n, width;
    const int32_t *kind_of;
    const int64_t *kinds;
    int64_t *addresses, *versions;
} column_t;

/* Whether some objects are like their descriptions. A tensor must lie within its storage, which may have been freed or
   cut. Most of the time would be waiting for what is known of each, so it is asked for early. */
static int scan_part(const torch_t *t, const column_t *c, int64_t start, int64_t stop) {
    for (int64_t i = start; i < stop; i++) {
        if (i + 2 * AHEAD < stop) __builtin_prefetch(t->item(c->list, i + 2 * AHEAD));
        if (i + AHEAD < stop && c->kind_of[i + AHEAD] >= 0) {
            void **object = t->item(c->list, i + AHEAD);
            if ((int64_t)(intptr_t)object[1] == c->kinds[c->kind_of[i + AHEAD] * c->width + TYPE])
                for (int line = 0; line < 3; line++) __builtin_prefetch((char *)object[t->body] + 64 * line);
        }
        c->addresses[i] = c->versions[i] = 0;
        if (c->kind_of[i] < 0) continue;
        const int64_t *kind = c->kinds + c->kind_of[i] * c->width;
        void **object = t->item(c->list, i), *tensor = object + t->body, *address;
        if ((int64_t)(intptr_t)object[1] != kind[TYPE] || !object[t->body]) return 0;
        if (((const int64_t *)object[t->body])[t->keys] != kind[KEYS]) return 0;
        int32_t number;
        int64_t dim, *numbers, bytes, offset;
        if (t->dtype(tensor, &number) || number != kind[DTYPE]) return 0;
        if (t->device_index(tensor, &number) || number != kind[DEVICE]) return 0;
        if (t->dim(tensor, &dim) || dim != kind[DIM]) return 0;
        if (t->sizes(tensor, &numbers) || memcmp(numbers, kind + NUMBERS, 8 * dim)) return 0;
        if (t->strides(tensor, &numbers) || memcmp(numbers, kind + NUMBERS + dim, 8 * dim)) return 0;
        if (t->data_ptr(tensor, &address)) return 0;
        if (kind[SPAN] && (t->storage_size(tensor, &bytes) || t->storage_offset(tensor, &offset))) return 0;
        if (kind[SPAN] && offset * kind[ITEMSIZE] + kind[SPAN] > bytes) return 0;
        c->addresses[i] = (int64_t)(intptr_t)address;
        c->versions[i] = ((const int64_t *)object[t->body])[t->version];
    }
    return 1;
}

/* Some lists, which threads take parts of until none is left or something differs. */
typedef struct {
    const torch_t *t;
    const column_t *columns;
    int64_t n_columns, next, differs;
} search_t;

static void search(void *data) {
    search_t *s = data;
    while (!__atomic_load_n(&s->differs, __ATOMIC_RELAXED)) {
        int64_t part = __atomic_fetch_add(&s->next, 1, __ATOMIC_RELAXED), c = 0;
        for (; c < s->n_columns && part * PART >= s->columns[c].n; c++) part -= (s->columns[c].n + PART - 1) / PART;
        if (c == s->n_columns) return;
        const int64_t start = part * PART, stop = start + PART < s->columns[c].n ? start + PART : s->columns[c].n;
        if (!scan_part(s->t, s->columns + c, start, stop)) __atomic_store_n(&s->differs, 1, __ATOMIC_RELAXED);
    }
}

/* Whether all objects of some lists are like their descriptions. No thread but the one that calls does anything with
   Python but to look objects up in lists, which nobody changes meanwhile. */
int scan(const torch_t *t, const column_t *columns, int64_t n_columns, parallel_t parallel, int64_t n_threads) {
    search_t s = {t, columns, n_columns, 0, 0};
    if (n_threads > 1) parallel(search, &s, (unsigned)n_threads, 0);
    else search(&s);
    return !s.differs;
}

/* Counts up versions, which autograd and other threads may be looking at. Inference tensors have none. */
void count_up(const torch_t *t, const int64_t *versions, const int64_t *positions, int64_t n) {
    for (int64_t k = 0; k < n; k++) {
        if (k + AHEAD < n) __builtin_prefetch((const char *)(intptr_t)versions[positions[k + AHEAD]] + t->number, 1);
        char *version = (char *)(intptr_t)versions[positions[k]];
        if (version) __atomic_fetch_add((uint32_t *)(version + t->number), 1, __ATOMIC_RELAXED);
    }
}

/* Puts the gradients of tensors of a class into a list; returns how many, one after another. */
int64_t gradients(const torch_t *t, void *list, int64_t n, void *type, void *name, void *out) {
    if (!t->grad || !t->wrap) return 0;
    for (int64_t i = 0; i < n; i++) {
        void **object = t->item(list, i);
        if (object[1] != type || !object[t->body]) return i;
        void *grad = t->wrap(t->grad(object[t->body]));
        if (grad == t->none) t->let_go(grad), grad = t->ask(object, name); /* which may have something to say */
        if (!grad) return i;
        t->set_item(out, i, grad);
    }
    return n;
}

/* Puts what objects of a class have in a slot into a list; returns how many have something there, one after another. */
int64_t slots(const torch_t *t, void *list, int64_t n, void *type, int64_t word, void *out) {
    for (int64_t i = 0; i < n; i++) {
        if (i + 2 * AHEAD < n) __builtin_prefetch(t->item(list, i + 2 * AHEAD));
        if (i + AHEAD < n) {
            void **later = t->item(list, i + AHEAD);
            if (later[1] == type) __builtin_prefetch(later[word], 1);
        }
        void **object = t->item(list, i);
        if (object[1] != type || !object[word]) return i;
        t->keep(object[word]);
        t->set_item(out, i, object[word]);
    }
    return n;
}

/* Puts what dicts have under some keys into a list for each key; returns how many dicts have all, one after another. */
int64_t items(const torch_t *t, void *dicts, int64_t n, void *keys, int64_t n_keys, void *out) {
    for (int64_t i = 0; i < n; i++) {
        if (i + 2 * AHEAD < n) __builtin_prefetch(t->item(dicts, i + 2 * AHEAD));
        for (int k = 2; k < 6 && i + AHEAD < n; k++) /* whatever they point to */
            __builtin_prefetch(((void **)t->item(dicts, i + AHEAD))[k]);
        void **dict = t->item(dicts, i);
        if (dict[1] != t->dict) return i;
        for (int64_t k = 0; k < n_keys; k++) {
            void *value = t->look_up(dict, t->item(keys, k));
            if (!value) return i;
            t->keep(value);
            t->set_item(t->item(out, k), i, value);
        }
    }
    return n;
}

/* Whether a dict has nothing but keys and values of two lists, in their order. */
int holds(const torch_t *t, void *dict, void *keys, void *values, int64_t n) {
    intptr_t position = 0;
    void *key, *value;
    int64_t i = 0;
    for (; t->next(dict, &position, &key, &value); i++)
        if (i == n || key != t->item(keys, i) || value != t->item(values, i)) return 0;
    return i == n;
}

/* Whether two lists hold the same objects. */
int same(const torch_t *t, void *a, void *b, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (t->item(a, i) != t->item(b, i)) return 0;
    return 1;
}
""".replace("FIELDS", ", ".join(FIELDS))
_QUESTIONS = (
    *("data_ptr", "storage_size", "storage_offset", "sizes"),
    *("strides", "dim", "dtype", "device_index"),
)
# TensorImpl::grad() and THPVariable_Wrap(TensorBase const &): the gradient of a tensor, and what Python sees of it
_GRADIENT = ("_ZNK3c1010TensorImpl4gradEv", "_Z16THPVariable_WrapRKN2at10TensorBaseE")
WORDS = 32  # of a tensor, of which one has the keys, looked through


class _Interior(NamedTuple):
    """Words of objects.

    Args:
      body: at which a Python object points to its tensor.
      keys: at which that has its dispatch keys.
      version: at which it points to its version.
      number: at which that has its number, in bytes.
    """

    body: int
    keys: int
    version: int
    number: int


def _interior() -> _Interior | None:
    """Where objects have what is looked for; None if that is not clear."""
    # whatever mode the caller is in
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction(), torch.inference_mode(False):
        plain = torch.zeros(3, dtype=torch.float32, device="cpu")
        with torch.inference_mode():
            inference = torch.zeros(2, 2, dtype=torch.float64, device="cpu")
        meta = torch.zeros(1, dtype=torch.float32, device="meta")
        conjugate = torch.zeros(2, dtype=torch.complex64, device="cpu").conj()
        examples = [plain, torch._neg_view(plain), inference, meta, torch.nn.Parameter(plain), conjugate]
        keys = [torch._C._dispatch_keys(x).raw_repr() for x in examples]
        one_version = [plain, plain[1:], plain.detach()]
        others = [plain.data, torch.zeros_like(plain)]  # the former has the memory in common, but not the version
        for k, x in enumerate(others):
            torch.autograd.graph.increment_version([x] * (1000 + k))  # to what no other number there is
    if {type(x) for x in examples} != set(PLAIN) or len(set(keys)) < 5:
        return None

    def word(address: int, k: int) -> int:
        return ctypes.c_uint64.from_address(address + 8 * k).value

    def is_version(k: int) -> bool:
        shared, own = {word(x._cdata, k) for x in one_version}, {word(x._cdata, k) for x in others}
        return len(shared) == 1 and len(shared | own) == 3 and 0 not in shared

    if any(word(id(x), 1) != id(type(x)) for x in examples):
        return None
    # none is read behind those that are looked for
    size = min(6, torch.Tensor.__basicsize__ // 8)
    body = (k for k in range(2, size) if all(word(id(x), k) == x._cdata for x in examples))
    where = (k for k in range(WORDS) if all(word(x._cdata, k) == y for x, y in zip(examples, keys, strict=True)))
    found = next(body, None), next(where, None)
    version = next(filter(is_version, range(found[1] or 0)), None)
    if version is None:
        return None

    def is_number(k: int) -> bool:
        places = (word(x._cdata, version) + k for x in others)
        return [ctypes.c_uint32.from_address(place).value for place in places] == [x._version for x in others]

    number = next(filter(is_number, range(8, 28, 4)), None)  # behind what all that is counted has
    return None if None in (*found, number) else _Interior(*found, version, number)  # type: ignore[arg-type]


def _address(function: Any) -> int:
    return (function and ctypes.cast(function, ctypes.c_void_p).value) or 0


class _Functions(NamedTuple):
    torch: bytes
    describe: "ctypes._NamedFuncPointer"
    scan: "ctypes._NamedFuncPointer"
    count_up: "ctypes._NamedFuncPointer"
    gradients: "ctypes._NamedFuncPointer"
    slots: "ctypes._NamedFuncPointer"
    items: "ctypes._NamedFuncPointer"
    holds: "ctypes._NamedFuncPointer"
    same: "ctypes._NamedFuncPointer"


_functions: list[_Functions] = []  # the first is used


def use(library: ctypes.CDLL) -> None:
    """Has the functions of `SOURCE` that are part of a library used from now on. Before, all is asked from Python.

    Raises:
      AttributeError: they are not there.
    """
    if _functions:
        return
    held = ctypes.PyDLL(library._name, handle=library._handle)  # called with the interpreter's lock
    describe, scan, count_up, gradients = held.describe, held.scan, held.count_up, held.gradients
    slots, items, holds, same = held.slots, held.items, held.holds, held.same
    interior, theirs = _interior(), ctypes.CDLL(torch._C.__file__)
    names = [f"aoti_torch_get_{x}" for x in _QUESTIONS]
    if interior is None or not all(hasattr(theirs, name) for name in names):  # pragma: no cover
        return
    python = ctypes.pythonapi
    functions = [python.PyList_GetItem, python.PyList_SetItem]
    functions += [
        python.Py_IncRef,
        python.Py_DecRef,
        python.PyObject_GetAttr,
        python.PyDict_GetItem,
        python.PyDict_Next,
    ]
    pointers = [*map(_address, functions), id(None), id(dict)]
    pointers += [_address(getattr(theirs, name, None)) for name in (*names, *_GRADIENT)]
    n, pointer, object_ = ctypes.c_int64, ctypes.c_char_p, ctypes.py_object
    describe.argtypes, describe.restype = [pointer, object_, n, n, pointer], n
    scan.argtypes, scan.restype = [pointer, ctypes.c_void_p, n, ctypes.c_void_p, n], ctypes.c_int
    count_up.argtypes, count_up.restype = [pointer, pointer, ctypes.c_void_p, n], None
    gradients.argtypes, gradients.restype = [pointer, object_, n, ctypes.c_void_p, object_, object_], n
    slots.argtypes, slots.restype = [pointer, object_, n, ctypes.c_void_p, n, object_], n
    items.argtypes, items.restype = [pointer, object_, n, object_, n, object_], n
    holds.argtypes, holds.restype = [pointer, object_, object_, object_, n], ctypes.c_int
    same.argtypes, same.restype = [pointer, object_, object_, n], ctypes.c_int
    packed = struct.pack(f"{len(pointers)}q{len(interior)}q", *pointers, *interior)
    _functions.append(_Functions(packed, describe, scan, count_up, gradients, slots, items, holds, same))


class Found(NamedTuple):
    """Where the tensors of a list are, as 64-bit integers.

    Args:
      addresses: of their elements.
      versions: of their versions, which parts of one tensor share.
    """

    addresses: bytes
    versions: bytes


class Kinds(NamedTuple):
    """What the tensors of a list are: class, dispatch keys, dtype, device, sizes and strides.

    Args:
      n: length of the list.
      width: length of a description in words.
      kind_of: which description each tensor has, as 32-bit integers; -1 for objects that do not count.
      kinds: the descriptions.
    """

    n: int
    width: int
    kind_of: bytes
    kinds: bytes

    @classmethod
    def of(cls, tensors: Sequence[Any], positions: Sequence[int]) -> "Kinds | None":
        """Describes tensors of torch's own classes.

        Args:
          tensors: the list.
          positions: which of its tensors count.

        Returns:
          None, where there is nothing but Python to ask.
        """
        if not _functions:
            return None
        functions = _functions[0]
        chosen = [tensors[i] for i in positions]
        width = len(FIELDS) + 2 * max((x.ndim for x in chosen), default=0)
        out = ctypes.create_string_buffer(8 * width * len(chosen))
        if functions.describe(functions.torch, chosen, len(chosen), width, out) < len(chosen):
            return None
        known: dict[bytes, int] = {}
        kinds: list[int] = []
        raw, size = out.raw, 8 * width
        kind_of = [-1] * len(tensors)
        for k, i in enumerate(positions):
            words = raw[k * size : (k + 1) * size]
            if words not in known:
                known[words] = len(known)
                kind = list(struct.unpack(f"{width}q", words))
                x = tensors[i]
                kind[FIELDS.index("ITEMSIZE")], kind[FIELDS.index("SPAN")] = x.element_size(), span(x)
                kinds += kind
            kind_of[i] = known[words]
        return cls(
            len(tensors), width, struct.pack(f"{len(kind_of)}i", *kind_of), struct.pack(f"{len(kinds)}q", *kinds)
        )


class _Column(ctypes.Structure):
    """Mirrors `column_t`."""

    _fields_ = [
        *(("list", ctypes.py_object), ("n", ctypes.c_int64), ("width", ctypes.c_int64)),
        *(("kind_of", ctypes.c_char_p), ("kinds", ctypes.c_char_p)),
        *(("addresses", ctypes.c_void_p), ("versions", ctypes.c_void_p)),
    ]


SHARE = 256  # tensors; waking a thread for fewer costs more than it saves


def find(kinds: Sequence[Kinds], columns: Sequence[list[Any]]) -> list[Found] | None:
    """Where the tensors of lists are that are what they were described as; None if one is something else.

    Args:
      kinds: what they were.
      columns: the lists.
    """
    if any(len(column) != kind.n for kind, column in zip(kinds, columns, strict=True)):
        return None
    if not columns:
        return []
    functions, total = _functions[0], sum(map(len, columns))
    buffer = ctypes.create_string_buffer(16 * total)
    here = ctypes.addressof(buffer)
    table = (_Column * len(columns))()
    starts = [0, *itertools.accumulate(map(len, columns))]
    for k, (kind, column) in enumerate(zip(kinds, columns, strict=True)):
        places = here + 8 * starts[k], here + 8 * (starts[k] + total)
        table[k] = _Column(column, kind.n, kind.width, kind.kind_of, kind.kinds, *places)
    parallel = parallel_address()
    n_threads = min(torch.get_num_threads(), total // SHARE) if parallel else 1
    if not functions.scan(functions.torch, ctypes.addressof(table), len(columns), parallel, n_threads):
        return None
    numbers = buffer.raw
    parts = [numbers[8 * a : 8 * b] for a, b in itertools.pairwise(starts)]
    versions = [numbers[8 * (total + a) : 8 * (total + b)] for a, b in itertools.pairwise(starts)]
    return list(map(Found, parts, versions))


def count_up(found: Found, positions: "array[int]") -> None:
    """Counts up the versions of tensors, by which autograd notices that they have been written to.

    Args:
      found: where they are; they must still exist.
      positions: which of them, as 64-bit integers.
    """
    functions = _functions[0]
    functions.count_up(functions.torch, found.versions, positions.buffer_info()[0], len(positions))


def addresses(tensors: Sequence[torch.Tensor]) -> bytes:
    """Addresses of tensors, as 64-bit integers."""
    return struct.pack(f"{len(tensors)}q", *map(torch.Tensor.data_ptr, tensors))


def gradients(tensors: list[Any]) -> list[Any]:
    """The gradients of tensors; in half the time if all are of one class, and nothing but torch has a say in it."""
    cls = type(tensors[0]) if tensors else object
    plain = getattr(cls, "grad", None) is torch.Tensor.grad and not torch._C._len_torch_function_stack()
    if _functions and plain and (cls in PLAIN or not torch._C._is_torch_function_enabled()):
        functions, found = _functions[0], [None] * len(tensors)
        if functions.gradients(functions.torch, tensors, len(tensors), id(cls), "grad", found) == len(tensors):
            return found
    return list(map(attrgetter("grad"), tensors))


def attributes(objects: list[Any], name: str) -> list[Any]:
    """An attribute of each of some objects; in a tenth of the time if all are of one class that has a slot for it.

    Raises:
      AttributeError: an object does not have it.
    """
    cls = type(objects[0]) if objects else object
    if _functions and isinstance(getattr(cls, name, None), MemberDescriptorType):
        word, found = _slot(cls, name, objects[0]), [None] * len(objects)
        functions = _functions[0]
        if word and functions.slots(functions.torch, objects, len(objects), id(cls), word, found) == len(objects):
            return found
    return list(map(attrgetter(name), objects))


def _slot(cls: type, name: str, example: Any) -> int:
    """Which word of an object a slot is; 0 if it is not clear."""
    if (cls, name) not in _slots:
        words = (ctypes.c_uint64 * (cls.__basicsize__ // 8)).from_address(id(example))
        places = [k for k, x in enumerate(words) if x == id(getattr(example, name))]
        _slots[cls, name] = places[0] if len(places) == 1 else 0
    return _slots[cls, name]


_slots: dict[tuple[type, str], int] = {}


def items(dicts: list[Any], keys: list[str]) -> list[list[Any] | None]:
    """For each key, what each of some dicts has under it; None where one has nothing.

    Example:
      >>> items([{"a": 1, "b": 2}, {"a": 3}], ["a", "b"])
      [[1, 3], None]
    """
    if _functions:
        found: list[list[Any] | None] = [[None] * len(dicts) for _ in keys]
        functions = _functions[0]
        if functions.items(functions.torch, dicts, len(dicts), keys, len(keys), found) == len(dicts):
            return found
    return [_column(dicts, key) for key in keys]


def _column(dicts: list[Any], key: str) -> list[Any] | None:
    try:
        return list(map(itemgetter(key), dicts))
    except KeyError:
        return None


def holds(mapping: dict[Any, Any], keys: list[Any], values: list[Any]) -> bool:
    """Whether a dict has nothing but these very keys and values, in their order.

    Example:
      >>> key, value = object(), object()
      >>> holds({key: value}, [key], [value]), holds({key: value}, [key], [object()])
      (True, False)
    """
    if not _functions:
        return same(list(mapping), keys) and same(list(mapping.values()), values)
    functions = _functions[0]
    return len(mapping) == len(keys) and bool(functions.holds(functions.torch, mapping, keys, values, len(keys)))


def same(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists hold the very same objects.

    Example:
      >>> x, y = torch.ones(1), torch.ones(1)
      >>> same([x, y], [x, y]), same([x, y], [x, x])
      (True, False)
    """
    if not _functions:
        return len(a) == len(b) and all(map(is_, a, b))
    functions = _functions[0]
    return len(a) == len(b) and bool(functions.same(functions.torch, a, b, len(a)))
