"""Launches of Triton kernels: one per pass and group, with tables of pointers and numbers on the device."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .._compiler.passes import Signature, plan
from .._compiler.program import Level
from .._compiler.triton.build import load_triton
from .._compiler.triton.emit import emit_triton
from .chunks import Chunks, JoinedChunks, cut, partial_buffers
from .join import Joins
from .numbers import Number
from .plan import Group
from .pointers import Pointers


BLOCK = 1024
MAX_CHUNKS = 4096  # partial results of a reduction, because every instance of the next pass adds them up


@functools.lru_cache(maxsize=512)
def compile_triton(signature: Signature) -> tuple[Any, ...]:
    """The passes of a program as Triton kernels.

    Raises:
      BuildError: there is no Triton.
    """
    module = load_triton(emit_triton(signature))
    return tuple(getattr(module, f"pass_{k}") for k in range(len(plan(signature))))


class _Tables(NamedTuple):
    """The tables of a group that are the same at every step, on the device."""

    chunks: Chunks
    fixed: tuple[torch.Tensor, ...]


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
        n = sum(sum(group.table.sizes) for group in groups)
        chunk = max(4 * BLOCK, -(-n // (MAX_CHUNKS * BLOCK)) * BLOCK)
        self.tables = []
        for group in groups:
            chunks = cut(group.table.sizes, chunk)
            numbers = (*chunks, group.table.wholes, group.table.rows)
            self.tables.append(_Tables(chunks, tuple(self._upload(x) for x in numbers)))
        cuts = [table.chunks for table in self.tables]
        self.join = JoinedChunks(groups, cuts, joins, self.device) if joins is not None else None
        self.n_joined = self.join.n_joined if self.join is not None else 0
        self.n_stages = max([len(passes) for passes in self.kernels] + ([] if joins is None else [joins.stages - 1]))

    def _upload(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(self.device, non_blocking=True)

    def __call__(
        self, tensors: Sequence[torch.Tensor], pointers: Pointers, numbers: Sequence[Sequence[Number]]
    ) -> None:
        """Launches all passes.

        Args:
          tensors: the tensors of this step.
          pointers: their data pointers.
          numbers: for each group, its scalar table.
        """
        cuts = [table.chunks for table in self.tables]
        buffers = partial_buffers(self.groups, cuts, self.device, self.n_joined)
        total = sum(len(chunks.leaf) for chunks in cuts) + self.n_joined
        launches: list[tuple[Any, ...]] = []
        moves: list[tuple[list[torch.Tensor], torch.Tensor]] = []
        first = 0
        for group, (chunks, fixed), places, own, table in zip(
            self.groups, self.tables, self.places, buffers, numbers, strict=True
        ):
            n = len(group.leaves)
            columns = [pointers.memory[place : place + n] for place in places]
            # an instance of a leaf may still read a number that another one has replaced, so numbers are written
            # elsewhere and copied when all instances are done
            for k, output in enumerate(group.signature.program.outputs):
                if output.level is Level.LEAF:
                    new = torch.empty(n, dtype=group.signature.outputs[k], device=self.device)
                    where = len(group.inputs) + k
                    moves.append((list(tensors[places[where] : places[where] + n]), new))
                    columns[where] = [new.data_ptr() + i * new.element_size() for i in range(n)]
            launches.append(
                (
                    *fixed,
                    torch.tensor(columns, dtype=torch.int64).to(self.device, non_blocking=True),
                    _scalar_table(table, self.device),
                    self._upload([x.data_ptr() for x in own] or [0]),
                    *(n, total, first),
                )
            )
            first += len(chunks.leaf)
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            for stage in range(self.n_stages):
                for passes, arguments, chunks in zip(self.kernels, launches, cuts, strict=True):
                    if stage < len(passes) and chunks.leaf:
                        passes[stage][(len(chunks.leaf),)](*arguments, BLOCK=BLOCK)
                if self.join is not None:
                    self.join(buffers, stage + 1)
            for targets, new in moves:
                torch._foreach_copy_(targets, list(new.unbind()))


def _scalar_table(numbers: Sequence[Number], device: torch.device) -> torch.Tensor:
    """The scalar table on the device. Numbers that live there already are copied without waiting for them."""
    table = torch.tensor([0.0 if isinstance(x, torch.Tensor) else x for x in numbers] or [0.0], dtype=torch.float64)
    table = table.to(device, non_blocking=True)
    for k, x in enumerate(numbers):
        if isinstance(x, torch.Tensor):
            table[k].copy_(x.detach().reshape(()), non_blocking=True)
    return table
