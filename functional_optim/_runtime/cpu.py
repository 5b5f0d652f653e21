"""Launches of C kernels: structures that are filled once, apart from the numbers and the data pointers."""

import ctypes
import functools
import itertools
import struct
from collections.abc import Sequence
from typing import Any

import torch

from .._compiler.c.build import load_c
from .._compiler.c.emit import emit_c
from .._compiler.c.threads import MIN_PARALLEL_NUMEL, parallel_address
from .._compiler.cache import BuildError
from .._compiler.passes import Signature, plan
from .._compiler.program import Level
from .chunks import Chunks, JoinedChunks, cut, partial_buffers
from .groups import Group
from .internals import has_members
from .join import Joins
from .library import library
from .numbers import Number
from .pointers import Pointers


CHUNK = 1 << 15  # elements: seven streams of float32 stay within a second-level cache; shorter ones cost 3% of a step


class _Struct(ctypes.Structure):
    """`launch_t` of the emitted C."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n_leaves", "n_rows", "n_partials", "first_partial")),
        *((name, ctypes.c_void_p) for name in ("chunk_leaf", "chunk_start", "chunk_stop", "leaf_chunk")),
        *((name, ctypes.c_void_p) for name in ("leaf_size", "leaf_row")),
        ("addresses", ctypes.c_void_p),
        ("scalars", ctypes.c_void_p),
        ("partials", ctypes.c_void_p),
        ("parallel_for", ctypes.c_void_p),
        ("n_threads", ctypes.c_int64),
        ("runs", ctypes.c_void_p),
        ("n_runs", ctypes.c_int64),
        ("next_run", ctypes.c_int64),
        ("of_row", ctypes.c_void_p),
        ("of_leaf", ctypes.c_void_p),
    ]


@functools.lru_cache(maxsize=512)
def compile_c(signature: Signature) -> tuple[Any, ...]:
    """The passes of a program as C functions.

    Raises:
      BuildError: there is no working compiler.
    """
    starter()  # without it nothing starts a kernel
    loaded = load_c(emit_c(signature))
    try:
        functions = tuple(getattr(loaded, f"pass_{k}") for k in range(len(plan(signature))))
    except AttributeError as error:
        raise BuildError(f"the library that the C compiler made lacks a function: {error}") from None
    for f in functions:
        f.argtypes, f.restype = [ctypes.c_void_p], None
    return functions


class _Pass(ctypes.Structure):
    """`pass_t` of `pointers.c`."""

    _fields_ = [("run", ctypes.c_void_p), ("launch", ctypes.c_void_p)]


@functools.lru_cache(maxsize=1)
def starter() -> Any:
    """The function of `pointers.c` that starts kernels.

    Raises:
      BuildError: there is no working compiler.
    """
    function = library().run_passes
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    return function


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


class ScalarMemory:
    """Memory for a scalar table.

    Args:
      n: how many numbers it has.
    """

    def __init__(self, n: int) -> None:
        self.form, self.memory = struct.Struct(f"{n}d"), (ctypes.c_double * max(n, 1))()
        self.address = ctypes.addressof(self.memory)

    def fill(self, table: Sequence[Number]) -> None:
        """Writes the numbers, row after row.

        Raises:
          ValueError: one of them has no value.
        """
        try:
            self.form.pack_into(self.memory, 0, *table)  # calls `float` on 0-d tensors
        except struct.error:
            tensors = [x for x in table if isinstance(x, torch.Tensor)]
            if any(map(has_members, tensors)):
                raise ValueError(
                    "a hyper-parameter has escaped from a function that `torch.vmap` maps: it stands for the number of "
                    "one member, and only within that function; return it from there, or step there."
                ) from None
            if any(x.is_meta for x in tensors):
                raise ValueError(
                    "a hyper-parameter is a tensor on meta, which holds no number; move it to cpu."
                ) from None
            raise


class CpuLaunches:
    """The launches of groups that run together on the CPU.

    Args:
      groups: the groups.
      places: for each group, the positions among the pointers where the addresses of its inputs and outputs begin.
      pointers: memory that holds the data pointers of every step.
      n_threads: number of threads.
      joins: the reductions over processes, if there are any.
      scalars: for each group, the address of its scalar table, where somebody else fills that.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        places: Sequence[Sequence[int]],
        pointers: Pointers,
        n_threads: int,
        joins: Joins | None,
        scalars: Sequence[int] | None = None,
    ) -> None:
        self.cuts = [cut(group.table.sizes, CHUNK) for group in groups]
        cpu = torch.device("cpu")
        self.join = JoinedChunks(groups, self.cuts, joins, cpu) if joins is not None else None
        n_joined = self.join.n_joined if self.join is not None else 0
        self.buffers = partial_buffers(groups, self.cuts, cpu, n_joined)
        self.kept: list[Any] = [pointers]  # memory that the structures point to
        self.structs: list[_Struct] = []
        self.tables = [ScalarMemory(len(g.sources) * len(g.signature.program.scalars)) for g in groups]
        tables = [table.address for table in self.tables] if scalars is None else scalars
        total = sum(len(chunks.leaf) for chunks in self.cuts) + n_joined
        first = 0
        for group, chunks, partials, at, table in zip(groups, self.cuts, self.buffers, places, tables, strict=True):
            n_elements = sum(group.table.sizes)
            own_threads = min(n_threads, len(chunks.leaf)) if n_elements > MIN_PARALLEL_NUMEL else 1
            runs = _runs(chunks, n_elements, own_threads)
            s = _Struct(n_leaves=len(group.leaves), n_rows=len(group.sources), n_partials=total, first_partial=first)
            s.n_threads, s.n_runs, s.parallel_for = own_threads, len(runs) - 1, parallel_address()
            s.chunk_leaf, s.chunk_start, s.chunk_stop, s.leaf_chunk = map(self._integers, chunks)
            # sizes of whole leaves, also of those of which this process has a part
            s.leaf_size, s.leaf_row = self._integers(group.table.wholes), self._integers(group.table.rows)
            # in the memory that every reading fills with data pointers, so the addresses of these stay as they are
            s.runs, s.addresses = self._integers(runs), self._integers([pointers.address + 8 * place for place in at])
            s.partials = self._integers([x.data_ptr() for x in partials])
            s.of_row = self._uniforms(group)
            s.scalars = table
            self.structs.append(s)
            first += len(chunks.leaf)
        kernels = [compile_c(group.signature) for group in groups]
        n_calls = max([len(passes) for passes in kernels] + ([] if joins is None else [joins.stages - 1]))
        stages = [
            [(passes[k], s) for passes, s in zip(kernels, self.structs, strict=True) if k < len(passes)]
            for k in range(n_calls)
        ]
        if self.join is None:  # nothing happens between stages
            stages = [list(itertools.chain.from_iterable(stages))]
        self.calls = [
            (_Pass * len(stage))(*[_Pass(_address(f), ctypes.addressof(s)) for f, s in stage]) for stage in stages
        ]
        self.run_passes = starter()

    def _integers(self, integers: Sequence[int]) -> int:
        """The address of 64-bit integers in memory of this launch."""
        memory = (ctypes.c_int64 * max(len(integers), 1))(*integers)
        self.kept.append(memory)
        return ctypes.addressof(memory)

    def _uniforms(self, group: Group) -> int:
        """The address of memory for the uniform values that passes keep for each row and leaf of a group."""
        levels = [value.level for value in group.signature.program.values]
        n = len(group.sources) * levels.count(Level.ROW) + len(group.leaves) * levels.count(Level.LEAF)
        memory = (ctypes.c_double * max(n, 1))()
        self.kept.append(memory)
        return ctypes.addressof(memory)

    @property
    def passes(self) -> list[_Pass]:
        """All passes, in order."""
        return list(itertools.chain.from_iterable(self.calls))

    def __call__(self, numbers: Sequence[Sequence[Number]], increments: Sequence[int]) -> None:
        """Runs all passes over the tensors whose data pointers have been read.

        Args:
          numbers: for each group, its scalar table.
          increments: addresses of 64-bit integers that are moved on by one at the end.
        """
        for memory, table in zip(self.tables, numbers, strict=True):
            memory.fill(table)
        addresses = (ctypes.c_int64 * len(increments))(*increments)
        if self.join is None:
            self.run_passes(self.calls[0], len(self.calls[0]), addresses, len(increments))
            return
        for k, passes in enumerate(self.calls):
            last = k + 1 == len(self.calls)
            self.run_passes(passes, len(passes), addresses, len(increments) * last)
            self.join(self.buffers, k + 1)


class CpuLaunchesOfParts:
    """The launches of several parts, by one call. The scalar tables of parts are pieces of one table for each group.

    Args:
      parts: the groups of each part, as many of each.
      places: see `CpuLaunches`, for each part.
      pointers: memory that holds the data pointers of every step.
      n_threads: number of threads.
      rows: for each group, how many numbers all parts have, and how many lie between two.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[Group]],
        places: Sequence[Sequence[Sequence[int]]],
        pointers: Pointers,
        n_threads: int,
        rows: Sequence[tuple[int, int]],
    ) -> None:
        self.tables = [ScalarMemory(n) for n, _ in rows]
        distances = [8 * step for _, step in rows]
        self.parts = []
        for k, (groups, starts) in enumerate(zip(parts, places, strict=True)):
            scalars = [table.address + k * d for table, d in zip(self.tables, distances, strict=True)]
            self.parts.append(CpuLaunches(groups, starts, pointers, n_threads, None, scalars))
        passes = [one for part in self.parts for one in part.passes]
        self.passes, self.run_passes = (_Pass * len(passes))(*passes), starter()

    def __call__(self, numbers: Sequence[Sequence[Number]]) -> None:
        """Runs all passes over the tensors whose data pointers have been read.

        Args:
          numbers: for each group, the scalar tables of all parts.
        """
        for memory, table in zip(self.tables, numbers, strict=True):
            memory.fill(table)
        self.run_passes(self.passes, len(self.passes), None, 0)


def _runs(chunks: Chunks, n_elements: int, n_threads: int) -> list[int]:
    """First chunks of the runs that a thread takes at once, and the number of chunks.

    A run has at most `CHUNK` elements, or is one chunk, and there are some for each thread, lest one should be late.
    """
    limit = min(CHUNK, n_elements // (8 * n_threads))
    firsts, room = [], -1
    for k, (start, stop) in enumerate(zip(chunks.start, chunks.stop, strict=True)):
        if stop - start > room or room < 0:
            firsts.append(k)
            room = limit
        room -= stop - start
    return [*firsts, len(chunks.leaf)]
