"""The tables of a step: those that stay as they are, and those with addresses and numbers, which follow each step.

Addresses, and then the scalar tables, stand in one buffer on the device. The host compares the bytes of a step with
those of the last one, and copies what has changed in one piece.
"""

import ctypes
import functools
import itertools
import struct
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch

from ..._compiler.program import Level
from ..._compiler.triton.kernels import Kernels
from ..chunks import Chunks, chunk_table, cut, partial_buffers
from ..groups import Group
from ..numbers import MemberNumbers, Number
from ..pointers import PointerOrder, Pointers
from ..spec import PLAIN
from .streams import Streams


ALIGNED = 16  # bytes
NEIGHBOURS = 32  # places behind the first one that may be the second one of a run


class GroupTables(NamedTuple):
    """The tables of a group that are the same at every step, on the device.

    Args:
      chunks: the chunks of passes that reduce, on the host.
      of_pass: the chunks of each stage, and how many there are.
      leaf_size, leaf_row, leaf_whole, leaf_chunk: a number per leaf.
      addresses, partials, scalars: the bounds of its addresses, of those of its partial results, and of its numbers.
      runs: the bounds of the addresses of arrays, and of numbers per leaf, each with whether they are arrays.
    """

    chunks: Chunks
    of_pass: list[tuple[torch.Tensor, int]]
    leaf_size: torch.Tensor
    leaf_row: torch.Tensor
    leaf_whole: torch.Tensor
    leaf_chunk: torch.Tensor
    addresses: tuple[int, int]
    partials: tuple[int, int]
    scalars: tuple[int, int]
    runs: list[tuple[int, int, bool]]


class NumberPlaces(NamedTuple):
    """The places in the scalar tables of numbers that are read on the device: one copy fills them.

    Args:
      first: the first one.
      distance: from each to the next.
      n: how many there are.
    """

    first: int
    distance: int
    n: int

    def of(self, scalars: torch.Tensor) -> torch.Tensor:
        """The numbers there."""
        return scalars[self.first : self.first + self.distance * (self.n - 1) + 1 : self.distance]


@functools.lru_cache(maxsize=256)
def runs_of(positions: tuple[int, ...]) -> tuple[NumberPlaces, ...]:
    """Places of one number, in few runs at constant distances: groups of one chain have it at the same places.

    Args:
      positions: the places, in ascending order.

    Example:
      >>> for run in runs_of((0, 3, 5, 8, 10, 13)):
      ...     print(run)
      NumberPlaces(first=0, distance=5, n=3)
      NumberPlaces(first=3, distance=5, n=3)
    """
    left, found = dict.fromkeys(positions), list[NumberPlaces]()
    while left:
        first, *others = left
        best = NumberPlaces(first, 1, 1)
        for distance in [k - first for k in others[:NEIGHBOURS]]:
            n = next(n for n in itertools.count(2) if first + n * distance not in left)
            best = max(best, NumberPlaces(first, distance, n), key=lambda run: run.n)
        found.append(best)
        for k in range(best.n):
            del left[first + k * best.distance]
    return tuple(found)


class Tables:
    """The tables of groups that run together, and the order of words in the buffer of those that follow each step.

    Args:
      groups: the groups, part by part.
      places: for each group, the positions among the pointers where the addresses of its inputs and outputs begin.
      counters: the positions among the pointers of counters that the last pass moves on.
      kernels: the kernels of each group.
      chunk: elements of a chunk of a pass that reduces.
      n_joined: how many partial results follow for reductions that processes have joined.
      n_parts: how many parts there are, as many groups of each; reductions over the tree end in one.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        places: Sequence[Sequence[int]],
        counters: Sequence[int],
        kernels: Sequence[Kernels],
        chunk: int,
        n_joined: int,
        n_parts: int = 1,
    ) -> None:
        self.groups, self.device, self.n_joined = groups, groups[0].device, n_joined
        self.uniform_words = [max(len(g.leaves) * k.uniform_words, 1) for g, k in zip(groups, kernels, strict=True)]
        widths = [len(starts) * len(group.leaves) for group, starts in zip(groups, places, strict=True)]
        reductions = [len(group.signature.program.reductions) for group in groups]
        scalars = [max(len(group.sources) * len(group.sources[0]), 1) for group in groups]
        words = (*widths, len(counters), *reductions, *scalars)
        bounds = list(itertools.pairwise(itertools.accumulate(words, initial=0)))
        n = len(groups)
        self.counters = bounds.pop(n)
        self.n_pointers = self.counters[1]
        self.n_addresses, self.n_words = self.n_pointers + sum(reductions), bounds[-1][1]
        self.packer = struct.Struct(f"{sum(scalars)}d")
        self.padding = [not len(group.sources[0]) for group in groups]
        order = [
            range(place, place + len(group.leaves))
            for group, starts in zip(groups, places, strict=True)
            for place in starts
        ]
        self.order = PointerOrder([*itertools.chain(*order), *counters])
        self.of_group = [
            self._lay_out(k, kernels[k], chunk, (bounds[k], bounds[n + k], bounds[2 * n + k])) for k in range(n)
        ]
        self.cuts = [tables.chunks for tables in self.of_group]
        size = n // n_parts
        self.parts = [slice(k, k + size) for k in range(0, n, size)]
        # first chunks of groups among those of their part, and numbers of partial results that the part has
        self.firsts: list[int] = []
        self.totals: list[int] = []
        for part in self.parts:
            *firsts, total = itertools.accumulate((len(chunks.leaf) for chunks in self.cuts[part]), initial=0)
            self.firsts += firsts
            self.totals += [total + n_joined] * size

    def _lay_out(
        self, k: int, kernels: Kernels, chunk: int, bounds: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    ) -> GroupTables:
        """The tables of a group."""
        group, addresses = self.groups[k], bounds[0]
        reducing = cut(group.table.sizes, chunk)
        of_pass = []
        for stage in kernels.stages:
            if stage.elements is None:
                table = torch.empty((0, 2), dtype=torch.int32, device="cpu")
            elif stage.reduces:  # a leaf without elements has a partial result as well
                pairs = [[leaf, start // chunk] for leaf, start in zip(reducing.leaf, reducing.start, strict=True)]
                table = torch.tensor(pairs, dtype=torch.int32, device="cpu")
            else:
                table = chunk_table(group.table.sizes, stage.elements.block)
            of_pass.append((table.to(self.device, non_blocking=True), len(table)))
        program, n = group.signature.program, len(group.leaves)
        levels = [Level.ELEMENT] * len(program.arrays) + [Level.LEAF] * len(program.leaves)
        levels += [output.level for output in program.outputs]
        runs, place = [], addresses[0]
        for is_array, run in itertools.groupby(level is Level.ELEMENT for level in levels):
            start, place = place, place + n * len(list(run))
            runs.append((start, place, is_array))
        return GroupTables(
            chunks=reducing,
            of_pass=of_pass,
            leaf_size=self._upload(group.table.sizes),
            leaf_row=self._upload(group.table.rows),
            leaf_whole=self._upload(group.table.wholes),
            leaf_chunk=self._upload(reducing.first),
            addresses=addresses,
            partials=bounds[1],
            scalars=bounds[2],
            runs=runs,
        )

    def write_addresses(self, pointers: Pointers, place: int) -> tuple[bool, ...]:
        """Writes the addresses of a step in the order of inputs and outputs.

        Args:
          pointers: the data pointers of the step.
          place: the address of host memory for them.

        Returns:
          For each group, whether all its arrays begin at multiples of 16 bytes.
        """
        aligned = []
        for tables in self.of_group:
            bits = 0
            for start, stop, is_array in tables.runs:
                found = self.order.copy(pointers, start, stop, place + 8 * start)
                bits |= found if is_array else 0
            aligned.append(bits % ALIGNED == 0)
        first, end = self.counters
        self.order.copy(pointers, first, end, place + 8 * first)
        return tuple(aligned)

    def on_device(self) -> list[torch.Tensor]:
        """The tables that are the same at every step."""
        return [
            x
            for tables in self.of_group
            for x in (
                tables.leaf_size,
                tables.leaf_row,
                tables.leaf_whole,
                tables.leaf_chunk,
                *[x for x, _ in tables.of_pass],
            )
        ]

    def _upload(self, integers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(integers, dtype=torch.int64, device="cpu").to(self.device, non_blocking=True)

    def content(
        self, numbers: Sequence[Sequence[Number | MemberNumbers]]
    ) -> tuple[bytes, list[tuple[NumberPlaces, torch.Tensor]]]:
        """The numbers of a step, as bytes of the scalar tables, and those that are read on the device.

        Args:
          numbers: for each group, its scalar table.

        Returns:
          The bytes, zero in the place of numbers on a device; and these, each with its places.
        """
        flat: list[Any] = []
        for table, is_empty in zip(numbers, self.padding, strict=True):
            flat += table
            if is_empty:
                flat.append(0.0)
        live: list[tuple[NumberPlaces, torch.Tensor]] = []
        shared: dict[Hashable, tuple[torch.Tensor, list[int]]] = {}  # each number once, and where it stands
        for k, x in enumerate(flat):
            if isinstance(x, torch.Tensor) and x.device.type == "cpu" != self.device.type:
                flat[k] = float(x.detach())  # host memory is read without waiting
            elif isinstance(x, torch.Tensor):
                shared.setdefault(_identity(x), (x, []))[1].append(k)
                flat[k] = 0.0
            elif isinstance(x, MemberNumbers):
                live.append((NumberPlaces(k, x.distance, len(x.tensor)), x.tensor))
                flat[k] = 0.0
        for x, positions in shared.values():
            number = x.detach().reshape(1)
            live += [(places, number) for places in runs_of(tuple(positions))]
        return self.packer.pack(*flat), live


def _identity(x: torch.Tensor) -> Hashable:
    """The key of a number, by which views of one memory are the same; one that is more than its memory is its own."""
    return (x.data_ptr(), x.dtype) if type(x) in PLAIN and not x.is_neg() else id(x)


class StepMemory:
    """Memory on the device for one step in progress: tables, uniform values, partial results.

    A stream has its own, because the kernels of its last step may still be running when the next step begins.

    Args:
      tables: the tables.
    """

    def __init__(self, tables: Tables) -> None:
        self.tables, device = tables, tables.device
        with torch.inference_mode(False):  # steps outside of that mode write to it, too
            self.words = torch.empty(tables.n_words, dtype=torch.int64, device=device)
            self.scalars = self.words[tables.n_addresses :].view(torch.float64)
            self.uniforms = [torch.empty(n, dtype=torch.float64, device=device) for n in tables.uniform_words]
            self.buffers = [
                buffers
                for part in tables.parts
                for buffers in partial_buffers(tables.groups[part], tables.cuts[part], device, tables.n_joined)
            ]
            n = tables.n_addresses  # parts to upload, by whether addresses and numbers are new
            self.pieces = {(True, True): self.words, (True, False): self.words[:n], (False, True): self.words[n:]}
        partials = [x.data_ptr() for buffers in self.buffers for x in buffers]
        self.partials = struct.pack(f"{len(partials)}q", *partials)
        self.places: dict[NumberPlaces, torch.Tensor] = {}  # of numbers that are read on the device
        self.aligned: tuple[bool, ...] = ()
        self.addresses_seen = self.numbers_seen = b""  # of the last upload

    def upload(
        self,
        pointers: Pointers,
        numbers: bytes,
        staging: Callable[[int], torch.Tensor],
        streams: Streams,
        accept: Callable[[tuple[bool, ...]], None] = lambda aligned: None,
    ) -> None:
        """Brings the tables up to date: nothing, or one copy.

        Args:
          pointers: the data pointers of this step.
          numbers: its numbers.
          staging: makes host memory of so many words.
          streams: the streams of the device.
          accept: told before the copy for each group whether its addresses are aligned; it may raise.
        """
        addresses = pointers.all_content()
        is_moved, is_new = addresses != self.addresses_seen, numbers != self.numbers_seen
        if not (is_moved or is_new):
            return
        tables, target, aligned = self.tables, self.pieces[is_moved, is_new], self.aligned
        staged = staging(len(target))
        place = staged.data_ptr()
        if is_moved:
            aligned = tables.write_addresses(pointers, place)
            ctypes.memmove(place + 8 * tables.n_pointers, self.partials, len(self.partials))
            place += 8 * tables.n_addresses
        if is_new:
            ctypes.memmove(place, numbers, len(numbers))
        accept(aligned)
        self.addresses_seen = self.numbers_seen = b""  # unknown, should the copy fail
        streams.copy(target, staged)
        self.addresses_seen, self.numbers_seen, self.aligned = addresses, numbers, aligned

    def read_numbers(self, live: Sequence[tuple[NumberPlaces, torch.Tensor]], streams: Streams) -> None:
        """Has numbers that are on a device read there, at this step and at each replay of a graph."""
        for places, numbers in live:
            if places not in self.places:
                self.places[places] = places.of(self.scalars)
            streams.copy(self.places[places], numbers)
