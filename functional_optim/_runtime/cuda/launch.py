"""A step on the device: its tables are brought up to date, then its kernels launched."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..._compiler.triton.kernels import triton_kernels
from ..._compiler.triton.tuning import chunk_size
from ..chunks import JoinedChunks, cut
from ..groups import Group
from ..join import Joins
from ..numbers import MemberNumbers, Number
from ..pointers import Pointers
from .capture import CaptureError, Reserve, hold, refuse_new_numbers, refuse_numbers
from .loaded import Loaded, load_kernels
from .streams import streams_of
from .tables import StepMemory, Tables


STREAMS = 4  # streams whose memory a thread keeps


class DeviceMemory(StepMemory):
    """The memory of a step in a stream, and the launches of kernels on it.

    Args:
      tables: the tables.
      stream: the stream.
    """

    def __init__(self, tables: Tables, stream: int) -> None:
        super().__init__(tables)
        self.stream = stream
        self.launches: list[Callable[[], None]] = []  # by stage; all in one where nothing happens in between
        self.launched: tuple[bool, ...] = ()  # the variants that they are of


class TritonLaunch:
    """The launches of groups that run together on one device.

    Args:
      groups: the groups, part by part.
      places: for each group, the positions among the pointers where the addresses of its inputs and outputs begin.
      counters: the positions among the pointers of counters on the device, which a step in place moves on by one.
      joins: the reductions over processes, if there are any.
      n_parts: how many parts there are, each with reductions over the tree of its own, as members of ensembles have.

    Attributes:
      moved: the positions of counters that launches move on; none if they are more than the programs of any last pass.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        places: Sequence[Sequence[int]],
        counters: Sequence[int],
        joins: Joins | None,
        n_parts: int = 1,
    ) -> None:
        self.groups, self.device = groups, groups[0].device
        self.streams = streams_of(self.device)
        self.kernels = [triton_kernels(group.signature) for group in groups]
        self.chunk = chunk_size(sum(sum(group.table.sizes) for group in groups))
        cuts = [cut(group.table.sizes, self.chunk) for group in groups]
        self.join = JoinedChunks(groups, cuts, joins, self.device) if joins is not None else None
        n_joined = self.join.n_joined if self.join is not None else 0
        with self.streams.guard(self.device):
            self.tables = self.streams.allocate(
                lambda: Tables(groups, places, counters, self.kernels, self.chunk, n_joined, n_parts), self.device
            )
            self.uploaded = self.streams.mark(self.device)
        ends = [len(kernels.stages) for kernels in self.kernels] + ([] if joins is None else [joins.stages - 1])
        self.n_stages = max(ends)
        end = self.n_stages - 1
        # passes behind all uniform kernels, which read counters: the number of programs, the stage and the group
        passes = [tables.of_pass for tables in self.tables.of_group]
        last = [(of_pass[end][1], end, k) for k, of_pass in enumerate(passes) if len(of_pass) > end]
        programs, *self.counting = max(last, default=(0, end, 0))  # the one that moves counters on
        self.moved = counters if programs >= len(counters) else ()
        self.reserve: Reserve | None = None  # since the first step
        self.numbers_seen = b""  # of the last step that was not captured
        self.loaded: set[tuple[bool, ...]] = set()  # variants of kernels that have been launched

    def prepare(
        self,
        pointers: Pointers,
        numbers: Sequence[Sequence[Number | MemberNumbers]],
        memories: dict[int, DeviceMemory],
    ) -> DeviceMemory:
        """Brings the tables of a step up to date. No tensor of the step is written.

        Args:
          pointers: the data pointers of the tensors of this step.
          numbers: for each group, its scalar table.
          memories: the memory that this thread has for each stream; one that is made is added.

        Returns:
          Memory that is ready for `launch`.

        Raises:
          CaptureError: a stream is capturing, and a graph could not replay this step.
        """
        content, live = self.tables.content(numbers)
        with self.streams.guard(self.device):
            if self.streams.is_capturing():
                memory = self._capture(pointers, numbers, content)
            else:
                memory = self._memory(memories)
                if self.reserve is None:
                    self.reserve = Reserve(self.tables.n_words, self.streams)
                elif self.reserve.used:
                    self.reserve.refill()
                memory.upload(pointers, content, self.streams.staging, self.streams)
                self.numbers_seen = content
            memory.read_numbers(live, self.streams)
            if memory.launched != memory.aligned or not memory.launches:
                memory.launches, memory.launched = self._launches(memory), memory.aligned
        return memory

    def launch(self, memory: DeviceMemory) -> None:
        """Launches all kernels of a step."""
        with self.streams.guard(self.device):
            for stage, launch in enumerate(memory.launches):
                launch()
                if self.join is not None:
                    self.join(memory.buffers, stage + 1)
        self.loaded.add(memory.aligned)

    def _memory(self, memories: dict[int, DeviceMemory]) -> DeviceMemory:
        """The memory of the current stream."""
        stream = self.streams.stream(self.device)
        if stream not in memories:
            self.streams.wait_for(self.uploaded, self.tables.on_device(), self.device)
            memories[stream] = self.streams.allocate(lambda: DeviceMemory(self.tables, stream), self.device)
            if len(memories) > STREAMS:
                del memories[next(iter(memories))]
        return memories[stream]

    def _capture(
        self, pointers: Pointers, numbers: Sequence[Sequence[Number | MemberNumbers]], content: bytes
    ) -> DeviceMemory:
        """Memory of the graph that is being captured.

        Raises:
          CaptureError: a graph could not replay this step.
        """
        if self.reserve is None or not self.loaded:
            raise CaptureError("no step over these tensors was taken before", "take one before the capture")
        if self.join is not None:
            raise CaptureError("its reductions span processes", "capture the step of each process without them")
        refuse_numbers([x for table in numbers for x in table], [self.device])
        if content != self.numbers_seen:
            refuse_new_numbers()
        memory, staged = DeviceMemory(self.tables, self.streams.stream(self.device)), list[torch.Tensor]()

        def staging(n: int) -> torch.Tensor:
            assert self.reserve is not None
            staged.append(self.reserve.take(n))
            return staged[-1]

        def accept(aligned: tuple[bool, ...]) -> None:
            if aligned not in self.loaded:
                raise CaptureError(
                    "a tensor does not begin at a multiple of 16 bytes, or all do, other than in the step before",
                    "take a step over tensors of that kind before the capture",
                )
            # before the graph has the copy, which reads staged memory
            for kept in (self.tables, *staged):
                hold(kept)

        memory.upload(pointers, content, staging, self.streams, accept)
        return memory

    def _launches(self, memory: DeviceMemory) -> list[Callable[[], None]]:
        """The launches of all kernels on a step's memory, by stage; all in one where nothing happens in between."""
        kernels_of = self._kernels_of(memory.aligned)
        counters = memory.words[slice(*self.tables.counters)]
        stages: list[list[Any]] = []
        for stage in range(self.n_stages):
            uniform: list[Any] = []
            elements: list[Any] = []
            for k, group in enumerate(self.groups):
                if stage >= len(self.kernels[k].stages):
                    continue
                tables, n = self.tables.of_group[k], len(group.leaves)
                first, total = self.tables.firsts[k], self.tables.totals[k]
                table, loaded = self.kernels[k].stages[stage], kernels_of[k][stage]
                words, uniforms = memory.words, memory.uniforms[k]
                addresses, partials = words[slice(*tables.addresses)], words[slice(*tables.partials)]
                scalars = words[slice(*tables.scalars)].view(torch.float64)
                if table.uniform is not None and loaded.uniform is not None:
                    leaves = (tables.leaf_row, tables.leaf_whole, tables.leaf_chunk)
                    arguments = (*leaves, addresses, scalars, uniforms, partials, n, total, first)
                    programs = -(-n // table.uniform.block)
                    uniform.append(loaded.uniform.bind(programs, arguments))
                chunks, count = tables.of_pass[stage]
                if table.elements is not None and loaded.elements is not None and count:
                    blocks = self.chunk // table.elements.block if table.reduces else 1
                    n_counters = len(self.moved) if [stage, k] == self.counting else 0
                    tensors = (chunks, tables.leaf_size, addresses, uniforms, partials, counters)
                    elements.append(loaded.elements.bind(count, (*tensors, n, blocks, first, n_counters)))
            stages.append(uniform + elements)
        if self.join is None:
            stages = [[*itertools.chain(*stages)]]
        return [self.streams.sequence(launches, self.device, memory.stream) for launches in stages]

    def _kernels_of(self, aligned: Sequence[bool]) -> list[tuple[Loaded, ...]]:
        """The kernels of each group, in the variant for a step's addresses."""
        return [load_kernels(g.signature, self.device, a) for g, a in zip(self.groups, aligned, strict=True)]
