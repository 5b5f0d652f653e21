"""Hand leaves to compiled kernels as tables of addresses and numbers. The only file that mutates memory.

A kernel gets raw addresses, so whoever calls `run_c` or `run_triton` has made sure that all arrays of a leaf have
one shape and one dense common layout, on one device, with the dtypes of the signature; `layout.py` has the checks.
"""

import contextlib
import ctypes
import functools
import itertools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .._compiler.c.build import BuildError, load_c
from .._compiler.c.emit import emit_c
from .._compiler.c.threads import SERIAL, parallel_address
from .._compiler.ops import REDUCTIONS
from .._compiler.passes import Signature, plan
from .._compiler.program import Level
from .._compiler.triton.build import load_triton
from .._compiler.triton.emit import emit_triton
from ..kernels import native
from .call import Call, Column, LeafTable
from .layout import span


CHUNK = 1 << 15  # elements: seven streams of float32 stay within a second-level cache; shorter ones cost 3% of a step
TRITON_BLOCK = 1024
TRITON_CHUNKS = 4096  # at most this many partial results per reduction, because every instance adds them up


class _Launch(ctypes.Structure):
    """Mirrors `launch_t` of the emitted C."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n_leaves", "n_rows", "n_partials", "first_partial")),
        *((name, ctypes.c_char_p) for name in ("chunk_leaf", "chunk_start", "chunk_stop", "leaf_chunk")),
        *((name, ctypes.c_char_p) for name in ("leaf_size", "leaf_row")),
        ("columns", ctypes.c_void_p),
        ("scalars", ctypes.c_char_p),
        ("partials", ctypes.c_void_p),
        ("parallel_for", ctypes.c_void_p),
        ("n_threads", ctypes.c_int64),
        ("runs", ctypes.c_char_p),
        ("n_runs", ctypes.c_int64),
        ("next_run", ctypes.c_int64),
        ("of_row", ctypes.c_void_p),
        ("of_leaf", ctypes.c_void_p),
    ]


class Chunks(NamedTuple):
    """How leaves are cut into chunks, as columns of numbers."""

    leaf: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]
    first: tuple[int, ...]


@functools.lru_cache(maxsize=256)
def cut(sizes: tuple[int, ...], chunk: int) -> Chunks:
    """Cuts leaves into chunks of at most `chunk` elements."""
    leaf, start, stop, first = [], [], [], [0]
    for k, n in enumerate(sizes):
        for s in range(0, n, chunk):
            leaf.append(k)
            start.append(s)
            stop.append(min(s + chunk, n))
        first.append(len(leaf))
    return Chunks(tuple(leaf), tuple(start), tuple(stop), tuple(first))


def _pack(numbers: Sequence[int]) -> bytes:
    """64-bit integers as memory that C can read."""
    return struct.pack(f"{len(numbers)}q", *numbers)


@functools.lru_cache(maxsize=256)
def _runs(leaves: LeafTable, chunk: int, n_threads: int) -> tuple[bytes, int]:
    """First chunks of runs, which a thread takes at once, and their number.

    A run has at most `chunk` elements, or is one chunk, and there are some for each thread, lest one should be late.
    """
    table = _tables(leaves, chunk)
    limit = min(chunk, table.n_elements // (8 * n_threads))
    firsts, room = [], 0
    for k, (start, stop) in enumerate(zip(table.chunks.start, table.chunks.stop, strict=True)):
        if stop - start > room:
            firsts.append(k)
            room = limit
        room -= stop - start
    return _pack([*firsts, len(table.chunks.leaf)]), len(firsts)


@functools.lru_cache(maxsize=256)
def _fixed(leaves: LeafTable, chunk: int, n_threads: int) -> _Launch:
    """What is the same in every launch over some leaves."""
    packed = _tables(leaves, chunk).packed
    launch = _Launch(n_leaves=len(leaves.sizes), n_threads=n_threads)
    launch.chunk_leaf, launch.chunk_start, launch.chunk_stop, launch.leaf_chunk = packed[:4]
    launch.leaf_size, launch.leaf_row = packed[4:]
    launch.runs, launch.n_runs = _runs(leaves, chunk, n_threads)
    return launch


class _Tables(NamedTuple):
    chunks: Chunks
    packed: list[bytes]
    n_elements: int


@functools.lru_cache(maxsize=256)
def _tables(leaves: LeafTable, chunk: int) -> _Tables:
    chunks = cut(leaves.sizes, chunk)
    return _Tables(chunks, [_pack(x) for x in (*chunks, leaves.wholes, leaves.rows)], sum(leaves.sizes))


@functools.lru_cache(maxsize=512)
def compile_c(signature: Signature) -> tuple[Any, ...]:
    """The passes of a program as C functions.

    Raises:
      BuildError: there is no working compiler.
    """
    library = load_c(f"{emit_c(signature)}\n{native.SOURCE}")
    try:
        native.use(library)
        functions = tuple(getattr(library, f"pass_{k}") for k in range(len(plan(signature))))
    except AttributeError as error:
        raise BuildError(f"what the C compiler made is not what it was given: {error}") from None
    for f in functions:
        f.argtypes, f.restype = [ctypes.c_void_p], None
    return functions


@functools.lru_cache(maxsize=512)
def compile_triton(signature: Signature) -> tuple[Any, ...]:
    """The passes of a program as Triton kernels.

    Raises:
      BuildError: there is no Triton.
    """
    module = load_triton(emit_triton(signature))
    with contextlib.suppress(BuildError, AttributeError):  # without them a step takes longer, and that is all
        native.use(load_c(native.SOURCE))
    return tuple(getattr(module, f"pass_{k}") for k in range(len(plan(signature))))


def allocate(call: Call) -> list[Column]:
    """The columns to write to: those given, or new tensors laid out like `call.like`."""
    like = call.like
    columns = []
    for output, dtype, given in zip(call.signature.program.outputs, call.signature.outputs, call.outputs, strict=True):
        if given is not None:
            columns.append(given)
        elif output.level is Level.LEAF:
            columns.append(Column(torch.empty((), dtype=dtype, device=x.device) for x in like))
        else:
            columns.append(Column(torch.empty_like(x, dtype=dtype) for x in like))
    return columns


def partial_buffers(calls: Sequence[Call], total: int, device: torch.device) -> list[list[torch.Tensor]]:
    """A buffer per reduction of each call; tree reductions of one scope share theirs."""
    shared: dict[str, torch.Tensor] = {}
    buffers: list[list[torch.Tensor]] = []
    for call in calls:
        own = []
        for i in call.signature.program.reductions:
            value = call.signature.program.values[i]
            key = value.name if value.op.startswith("tree_") else f"\0{len(buffers)}.{i}"
            if key not in shared:
                shared[key] = torch.full(
                    (total,), REDUCTIONS[value.reduction].identity, dtype=torch.float64, device=device
                )
            own.append(shared[key])
        buffers.append(own)
    return buffers


def partials_of(call: Call, chunks: Chunks) -> int:
    """Number of partial results of each reduction; where other processes have some, one even of no elements."""
    return max(len(chunks.leaf), call.shard is not None)


def join_shards(
    calls: Sequence[Call], cuts: Sequence[Chunks], buffers: Sequence[Sequence[torch.Tensor]], stage: int
) -> None:
    """Adds the parts that other processes hold to the partial results of reductions that end before a stage.

    Every process has as many numbers to add, whatever the sizes of its parts: one per leaf, or one for the tree.
    """
    start = 0
    for call, chunks, own in zip(calls, cuts, buffers, strict=True):
        stop = start + partials_of(call, chunks)
        for i, buffer in zip(call.signature.program.reductions, own, strict=True):
            value = call.signature.program.values[i]
            if call.shard is None or value.stage != stage:
                continue
            kind, parts = value.reduction, buffer[start:stop]
            identity, reduce = REDUCTIONS[kind]
            if value.op.startswith("tree_"):
                total = reduce(parts).reshape(1)
                call.shard.combine(total, kind)
                parts.fill_(identity)
                parts[:1] = total
                continue
            pieces = [parts[first:last] for first, last in itertools.pairwise(chunks.first)]
            none = torch.full((), identity, dtype=torch.float64, device=buffer.device)
            totals = torch.stack([reduce(x) if x.numel() else none for x in pieces])
            call.shard.combine(totals, kind)
            parts.fill_(identity)
            for x, total in zip(pieces, totals, strict=True):
                x[:1] = total
        start = stop


def _addresses(call: Call, outputs: Sequence[Column]) -> list[bytes]:
    """Where the tensors of a call are.

    Raises:
      ValueError: one is not within its storage, which has been freed or cut.
    """
    columns = (*call.inputs, *outputs)
    if not all(column.found is not None or column.seen for column in columns):
        _check_memory(call, outputs)
    return [column.addresses for column in columns]


def _check_memory(call: Call, outputs: Sequence[Column]) -> None:
    program = call.signature.program
    names = (*program.arrays, *program.leaves, *[o.name for o in program.outputs])
    own = {id(column) for column, given in zip(outputs, call.outputs, strict=True) if given is None}
    for name, column in zip(names, (*call.inputs, *outputs), strict=True):
        if column.found is not None or column.seen or id(column) in own:
            continue
        for k, x in enumerate(column):
            if span(x) and x.storage_offset() * x.element_size() + span(x) > x.untyped_storage().nbytes():
                raise ValueError(
                    f"{name} of a leaf of shape {tuple(call.like[k].shape)} has no memory: its storage has been freed "
                    f"or cut."
                )


def run_c(calls: Sequence[Call]) -> list[list[Column]]:
    """Runs programs that belong together as C kernels: one function call per pass and program.

    Raises:
      BuildError: there is no working compiler; nothing has been written.
    """
    kernels = [compile_c(call.signature) for call in calls]
    results = [allocate(call) for call in calls]
    tables = [_tables(call.leaves, CHUNK) for call in calls]
    total = sum(partials_of(call, table.chunks) for call, table in zip(calls, tables, strict=True))
    buffers = partial_buffers(calls, total, torch.device("cpu"))
    parallel = parallel_address()
    keep: list[Any] = []  # what the structures point to
    launches = []
    first = 0
    for call, outputs, table, own in zip(calls, results, tables, buffers, strict=True):
        columns = _addresses(call, outputs)
        numbers = list(itertools.chain.from_iterable(call.scalars))  # tensors are asked for theirs by `pack`
        places = (ctypes.c_char_p * len(columns))(*columns)
        partials = (ctypes.c_void_p * len(own))(*[x.data_ptr() for x in own])
        wake = parallel is not None and table.n_elements > SERIAL
        fixed = _fixed(call.leaves, CHUNK, min(torch.get_num_threads(), len(table.chunks.leaf)) if wake else 1)
        launch = _Launch.from_buffer_copy(fixed)
        launch.n_rows, launch.n_partials, launch.first_partial = len(call.scalars), total, first
        launch.parallel_for = parallel
        launch.columns, launch.partials = ctypes.addressof(places), ctypes.addressof(partials)
        launch.scalars = struct.pack(f"{len(numbers)}d", *numbers)
        keep.append((columns, places, partials, fixed))
        launches.append(launch)
        first += partials_of(call, table.chunks)
    for stage in range(max(map(len, kernels), default=0)):
        for passes, launch in zip(kernels, launches, strict=True):
            if stage < len(passes):
                passes[stage](ctypes.addressof(launch))
        join_shards(calls, [table.chunks for table in tables], buffers, stage + 1)
    return results


def run_triton(calls: Sequence[Call]) -> list[list[Column]]:
    """Runs programs that belong together as Triton kernels: one launch per pass and program.

    Raises:
      BuildError: there is no Triton; nothing has been written.
    """
    kernels = [compile_triton(call.signature) for call in calls]
    results = [allocate(call) for call in calls]
    elements = sum(sum(call.leaves.sizes) for call in calls)
    chunk = max(4 * TRITON_BLOCK, -(-elements // (TRITON_CHUNKS * TRITON_BLOCK)) * TRITON_BLOCK)
    cuts = [cut(call.leaves.sizes, chunk) for call in calls]
    total = sum(map(partials_of, calls, cuts))
    device = calls[0].like[0].device
    buffers = partial_buffers(calls, total, device)
    moves: list[tuple[Column, Column]] = []
    launches = []
    first = 0
    for call, outputs, chunks, own in zip(calls, results, cuts, buffers, strict=True):
        # one instance of a leaf may still read a number that another one has already replaced, so numbers are
        # written elsewhere and copied when all instances are done
        written = [
            Column(map(torch.empty_like, column)) if output.level is Level.LEAF else column
            for output, column in zip(call.signature.program.outputs, outputs, strict=True)
        ]
        _addresses(call, outputs)
        places = [memoryview(column.addresses).cast("q").tolist() for column in (*call.inputs, *written)]
        launches.append(
            (
                *_on_device(call.leaves, chunk, device),
                torch.tensor(places, dtype=torch.int64).to(device, non_blocking=True),
                _scalar_table(call.scalars, device),
                torch.tensor([x.data_ptr() for x in own] or [0], dtype=torch.int64).to(device, non_blocking=True),
                *(len(call.leaves.sizes), total, first),
            )
        )
        first += partials_of(call, chunks)
        moves += [(column, new) for column, new in zip(outputs, written, strict=True) if new is not column]
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for stage in range(max(map(len, kernels), default=0)):
            for passes, arguments, chunks in zip(kernels, launches, cuts, strict=True):
                if stage < len(passes) and chunks.leaf:
                    passes[stage][(len(chunks.leaf),)](*arguments, BLOCK=TRITON_BLOCK)
            join_shards(calls, cuts, buffers, stage + 1)
        for column, new in moves:
            torch._foreach_copy_(column, new)
    return results


@functools.lru_cache(maxsize=256)
def _on_device(leaves: LeafTable, chunk: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    chunks = cut(leaves.sizes, chunk)
    return tuple(torch.tensor(x, dtype=torch.int64, device=device) for x in (*chunks, leaves.wholes, leaves.rows))


def _scalar_table(rows: Sequence[Sequence[float | torch.Tensor]], device: torch.device) -> torch.Tensor:
    """The scalar table on the device. Numbers that live there already are copied without waiting for them."""
    numbers = [[0.0 if isinstance(x, torch.Tensor) else float(x) for x in row] or [0.0] for row in rows]
    table = torch.tensor(numbers, dtype=torch.float64).to(device, non_blocking=True)
    for r, row in enumerate(rows):
        for k, x in enumerate(row):
            if isinstance(x, torch.Tensor):
                table[r, k].copy_(x.reshape(()), non_blocking=True)
    return table
