"""Where in memory torch has what only Python can be asked for: looked for in a few tensors of which it is known."""

import ctypes
from typing import NamedTuple

import torch

from .layout import PLAIN


WORDS = 32  # of a tensor, of which one has the keys, looked through


class Interior(NamedTuple):
    """Words of objects.

    Args:
      body: at which a Python object points to its tensor.
      object: at which that points back.
      keys: at which that has its dispatch keys.
      version: at which it points to its version.
      number: at which that has its number, in bytes.
    """

    body: int
    object: int
    keys: int
    version: int
    number: int


def find_interior() -> Interior | None:
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
        return len(shared) == 1 and len(shared | own) == 3 and 0 not in shared | own

    if any(word(id(x), 1) != id(type(x)) for x in examples):
        return None
    # none is read behind those that are looked for
    size = min(6, torch.Tensor.__basicsize__ // 8)
    body = (k for k in range(2, size) if all(word(id(x), k) == x._cdata for x in examples))
    where = (k for k in range(WORDS) if all(word(x._cdata, k) == y for x, y in zip(examples, keys, strict=True)))
    back = (k for k in range(WORDS) if all(word(x._cdata, k) == id(x) for x in examples))
    found = next(body, None), next(back, None), next(where, None)
    version = next(filter(is_version, range(found[2] or 0)), None)
    if version is None:
        return None

    def is_number(k: int) -> bool:
        places = (word(x._cdata, version) + k for x in others)
        return [ctypes.c_uint32.from_address(place).value for place in places] == [x._version for x in others]

    number = next(filter(is_number, range(8, 28, 4)), None)  # behind what all that is counted has
    return None if None in (*found, number) else Interior(*found, version, number)  # type: ignore[arg-type]
