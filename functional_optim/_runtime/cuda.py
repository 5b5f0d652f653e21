"""Launches of Triton kernels: a uniform kernel and a pass per stage and group, with tables on the device."""

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .._compiler.program import Level
from .._compiler.triton.kernels import Kernel, compile_triton
from .._compiler.triton.tuning import chunk_size
from .chunks import Chunks, JoinedChunks, chunk_table, cut, partial_buffers
from .join import Joins
from .numbers import Number
from .plan import Group
from .pointers import Pointers


ALIGNED = 16  # bytes


class _Tables(NamedTuple):
    """The tables of a group that are the same at every step, on the device.

    Args:
      chunks: the chunks of passes that reduce.
      of_pass: the chunks of each stage, and how many there are.
      leaf_size, leaf_row, leaf_whole, leaf_chunk: a number per leaf.
    """

    chunks: Chunks
    of_pass: list[tuple[torch.Tensor, int]]
    leaf_size: torch.Tensor
    leaf_row: torch.Tensor
    leaf_whole: torch.Tensor
    leaf_chunk: torch.Tensor


class TritonLaunch:
    """The launches of groups that run together on one device.

    Args:
      groups: the groups.
      places: for each group, the positions among the pointers where its kernel columns begin.
      joins: the reductions over processes, if there are any.
    """

    def __init__(self, groups: Sequence[Group], places: Sequence[Sequence[int]], joins: Joins | None) -> None:
        self.groups, self.places, self.device = groups, places, groups[0].device
        self.kernels = [compile_triton(group.signature) for group in groups]
        self.chunk = chunk_size(sum(sum(group.table.sizes) for group in groups))
        self.tables = [self._lay_out(k) for k in range(len(groups))]
        cuts = [table.chunks for table in self.tables]
        self.join = JoinedChunks(groups, cuts, joins, self.device) if joins is not None else None
        self.n_joined = self.join.n_joined if self.join is not None else 0
        ends = [len(kernels.stages) for kernels in self.kernels] + ([] if joins is None else [joins.stages - 1])
        self.n_stages = max(ends)

    def _lay_out(self, k: int) -> _Tables:
        """The tables of a group."""
        group, stages = self.groups[k], self.kernels[k].stages
        reducing = cut(group.table.sizes, self.chunk)
        of_pass = []
        for stage in stages:
            block = stage.elements.block if stage.elements is not None else self.chunk
            table = chunk_table(group.table.sizes, block)
            if stage.reduces:  # a leaf without elements has a partial result as well
                pairs = [[leaf, start // self.chunk] for leaf, start in zip(reducing.leaf, reducing.start, strict=True)]
                table = torch.tensor(pairs, dtype=torch.int32)
            of_pass.append((table.to(self.device), len(table)))
        return _Tables(
            chunks=reducing,
            of_pass=of_pass,
            leaf_size=self._upload(group.table.sizes),
            leaf_row=self._upload(group.table.rows),
            leaf_whole=self._upload(group.table.wholes),
            leaf_chunk=self._upload(reducing.first),
        )

    def _upload(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(self.device, non_blocking=True)

    def __call__(self, pointers: Pointers, numbers: Sequence[Sequence[Number]]) -> None:
        """Launches all kernels.

        Args:
          pointers: the data pointers of the tensors of this step.
          numbers: for each group, its scalar table.
        """
        cuts = [table.chunks for table in self.tables]
        buffers = partial_buffers(self.groups, cuts, self.device, self.n_joined)
        total = sum(len(chunks.leaf) for chunks in cuts) + self.n_joined
        firsts = itertools.accumulate([len(chunks.leaf) for chunks in cuts], initial=0)
        launches = []
        for k, first in zip(range(len(self.groups)), firsts, strict=False):
            group, tables, n = self.groups[k], self.tables[k], len(self.groups[k].leaves)
            columns = [pointers.memory[place : place + n] for place in self.places[k]]
            table = torch.tensor(columns, dtype=torch.int64).to(self.device, non_blocking=True)
            partials = self._upload([x.data_ptr() for x in buffers[k]] or [0])
            leaves = (tables.leaf_row, tables.leaf_whole, tables.leaf_chunk)
            scalars = _scalar_table(numbers[k], self.device)
            # memory of this call, because several threads may be in a step
            words = max(n * self.kernels[k].uniform_words, 1)
            uniforms = torch.empty(words, dtype=torch.float64, device=self.device)
            uniform = (*leaves, table, scalars, uniforms, partials, n, total, first)
            elements = (tables.leaf_size, table, uniforms, partials, n)
            launches.append((uniform, elements, first, self._aligned(group, columns)))
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            for stage in range(self.n_stages):
                for k, (uniform, *_) in enumerate(launches):
                    kernel = self.kernels[k].stages[stage].uniform if stage < len(self.kernels[k].stages) else None
                    if kernel is not None:
                        _run(kernel, -(-len(self.groups[k].leaves) // kernel.block), *uniform)
                for k, (_, elements, first, aligned) in enumerate(launches):
                    kernel = self.kernels[k].stages[stage].elements if stage < len(self.kernels[k].stages) else None
                    if kernel is not None:
                        chunks, count = self.tables[k].of_pass[stage]
                        blocks = self.chunk // kernel.block if self.kernels[k].stages[stage].reduces else 1
                        _run(kernel, count, chunks, *elements, blocks, first, ALIGNED=aligned)
                if self.join is not None:
                    self.join(buffers, stage + 1)

    @staticmethod
    def _aligned(group: Group, columns: Sequence[Sequence[int]]) -> bool:
        """Whether every array begins at a multiple of 16 bytes."""
        program = group.signature.program
        levels = [Level.ELEMENT] * len(program.arrays) + [Level.LEAF] * len(program.leaves)
        levels += [output.level for output in program.outputs]
        arrays = [column for column, level in zip(columns, levels, strict=True) if level is Level.ELEMENT]
        return not any(x % ALIGNED for column in arrays for x in column)


def _run(kernel: Kernel, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launches a kernel."""
    if programs:
        kernel.function[(programs,)](*arguments, **constants, **kernel.options)


def _scalar_table(numbers: Sequence[Number], device: torch.device) -> torch.Tensor:
    """The scalar table on the device. Numbers that live there already are copied without waiting for them."""
    table = torch.tensor([0.0 if isinstance(x, torch.Tensor) else x for x in numbers] or [0.0], dtype=torch.float64)
    table = table.to(device, non_blocking=True)
    for k, x in enumerate(numbers):
        if isinstance(x, torch.Tensor):
            table[k].copy_(x.detach().reshape(()), non_blocking=True)
    return table
