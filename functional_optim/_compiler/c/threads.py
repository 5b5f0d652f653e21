"""Threads of torch for generated C: `torch_parallel_for` of its stable C ABI, found by name in the library itself.

A kernel gets the address of the function in its launch structure and calls it as

    parallel_for(0, n_threads, 1, work, data)

`work(begin, end, data)` is then called by at most `n_threads` of torch's threads, the calling one among them, as
often as `torch.set_num_threads` allows; within a parallel region of torch, by the calling thread alone. The result is
0, or another number if torch could not do so.
"""

import ctypes
import functools
import os
import sys

import torch


MIN_PARALLEL_NUMEL = 1 << 14  # elements below which waking other threads costs more than it saves


@functools.lru_cache(maxsize=1)
def parallel_address() -> int | None:
    """Address of `torch_parallel_for`; None if this process has no threads to wake, and work is to be done serially.

    Ask at every step: a child that is forked between two steps would wait for ever for threads of its parent.
    """
    if _forked:
        return None
    library = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "libtorch_cpu.so")
    # in torch's wheels, or wherever a distribution keeps its libraries and the loader has found it already
    for name in (os.path.join(os.path.dirname(torch.__file__), "lib", library), library):
        try:
            return ctypes.cast(ctypes.CDLL(name).torch_parallel_for, ctypes.c_void_p).value
        except (AttributeError, OSError):
            continue
    return None


_forked: list[bool] = []


def _leave_threads() -> None:
    """In a forked child: threads of OpenMP have stayed in the parent."""
    _forked.append(True)
    parallel_address.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_threads)
