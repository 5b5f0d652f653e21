"""Chunks of leaves, and the partial results of reductions over them."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .._compiler.call import ReductionKey
from .._compiler.ops import REDUCTIONS
from .groups import Group
from .join import Joins, Vector


class Chunks(NamedTuple):
    """Leaves cut into chunks, as lists of numbers: a chunk's leaf, its bounds, and each leaf's first chunk."""

    leaf: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]
    first: tuple[int, ...]


def cut(sizes: Sequence[int], chunk: int) -> Chunks:
    """Cuts leaves into chunks of at most `chunk` elements. A leaf without elements has one chunk, which is empty.

    Example:
      >>> cut([5, 0], 3)
      Chunks(leaf=(0, 0, 1), start=(0, 3, 0), stop=(3, 5, 0), first=(0, 2, 3))
    """
    leaf, start, stop, first = [], [], [], [0]
    for k, n in enumerate(sizes):
        for s in range(0, max(n, 1), chunk):
            leaf.append(k)
            start.append(s)
            stop.append(min(s + chunk, n))
        first.append(len(leaf))
    return Chunks(tuple(leaf), tuple(start), tuple(stop), tuple(first))


def chunk_table(sizes: Sequence[int], chunk: int) -> torch.Tensor:
    """A row per chunk of at most `chunk` elements: its leaf, and its number within the leaf, of 32 bits.

    Example:
      >>> chunk_table([5, 0], 3).tolist()
      [[0, 0], [0, 1]]
    """
    counts = (torch.tensor(sizes, dtype=torch.int64, device="cpu") + chunk - 1) // chunk
    firsts = counts.cumsum(0) - counts
    leaf = torch.repeat_interleave(counts)
    return torch.stack([leaf, torch.arange(len(leaf), device="cpu") - firsts[leaf]], 1).to(torch.int32)


def partial_buffers(
    groups: Sequence[Group], cuts: Sequence[Chunks], device: torch.device, n_joined: int = 0
) -> list[list[torch.Tensor]]:
    """A buffer per reduction of each group, with a number per chunk of all groups.

    Tree reductions of one scope share theirs; a group that has no part in one leaves the identity there.

    Args:
      groups: the groups.
      cuts: the chunks of each.
      device: the device.
      n_joined: how many numbers follow for reductions that processes have joined.
    """
    total = sum(len(chunks.leaf) for chunks in cuts) + n_joined
    shared: dict[str, torch.Tensor] = {}
    buffers: list[list[torch.Tensor]] = []
    for g, group in enumerate(groups):
        of_group = []
        for i in group.signature.program.reductions:
            value = group.signature.program.values[i]
            key = value.name if value.spans_tree else f"\0{g}.{i}"
            if key not in shared:
                identity = REDUCTIONS[value.reduction].identity
                shared[key] = torch.full((total,), identity, dtype=torch.float64, device=device)
            of_group.append(shared[key])
        buffers.append(of_group)
    return buffers


class _LeafPart(NamedTuple):
    """The part of a reduction over leaves that one group has.

    Args:
      group: the position of the group.
      reduction: which of its reductions it is.
      firsts: each leaf's first chunk, among those of all groups.
      several: the leaves that have several chunks, with the bounds of these.
      entries: the entry of each leaf in the vector that is joined.
    """

    group: int
    reduction: int
    firsts: torch.Tensor
    several: list[tuple[int, int, int]]
    entries: torch.Tensor


class _TreePart(NamedTuple):
    """The part of a reduction over the tree that groups in parts over the same processes have.

    Args:
      group: the position of a group whose buffer it is in.
      reduction: which of its reductions it is.
      spans: the bounds of the groups' chunks among those of all groups; none if this process has no such leaf.
      entry: the entry in the vector that is joined.
      entries: the same as an index on the device, for which a copy at each step would wait.
      position: that of the joined number in the buffer.
    """

    group: int
    reduction: int
    spans: list[tuple[int, int]]
    entry: int
    entries: torch.Tensor
    position: int


class JoinedChunks:
    """The completion of partial results by other processes, between two passes.

    Args:
      groups: the groups that are launched together.
      cuts: the chunks of each.
      joins: the reductions over processes.
      device: the device of the partial results.
    """

    def __init__(self, groups: Sequence[Group], cuts: Sequence[Chunks], joins: Joins, device: torch.device) -> None:
        starts = [0, *itertools.accumulate(len(chunks.leaf) for chunks in cuts)]
        self.n_joined, self.device = len(joins.shards), device
        self.stages: dict[int, list[tuple[Vector, list[_LeafPart], list[_TreePart]]]] = {}
        for stage, vectors in joins.vectors.items():
            for vector in vectors:
                of_leaves: list[_LeafPart] = []
                trees: dict[str, tuple[int, int]] = {}
                spans: dict[ReductionKey, list[tuple[int, int]]] = {}
                for g, (group, chunks) in enumerate(zip(groups, cuts, strict=True)):
                    program = group.signature.program
                    for k, i in enumerate(program.reductions):
                        value = program.values[i]
                        if (value.stage, value.reduction) != (stage, vector.kind):
                            continue
                        if value.spans_tree:
                            trees.setdefault(value.name, (g, k))
                            spans.setdefault((value.name, group.shard), []).append((starts[g], starts[g + 1]))
                        elif group.shard is not None:
                            firsts = [starts[g] + first for first in chunks.first]
                            bounds = enumerate(itertools.pairwise(firsts))
                            of_leaves.append(
                                _LeafPart(
                                    g,
                                    k,
                                    torch.tensor(firsts[:-1], device=device),
                                    [(leaf, first, last) for leaf, (first, last) in bounds if last - first > 1],
                                    torch.tensor([vector.entries[leaf, i] for leaf in group.leaves], device=device),
                                )
                            )
                of_trees = [
                    _TreePart(
                        *trees[key[0]],
                        spans.get(key, []),
                        entry,
                        torch.tensor([entry], device=device),
                        starts[-1] + joins.shards.index(key[1]),  # type: ignore[arg-type]
                    )
                    for key, entry in vector.entries.items()
                    if isinstance(key[0], str) and key[0] in trees
                ]
                self.stages.setdefault(stage, []).append((vector, of_leaves, of_trees))

    def __call__(self, buffers: Sequence[Sequence[torch.Tensor]], stage: int) -> None:
        """Completes the partial results of reductions that end before a stage.

        Args:
          buffers: the buffers of `partial_buffers`.
          stage: the stage.
        """
        for vector, of_leaves, of_trees in self.stages.get(stage, ()):
            identity, reduce = REDUCTIONS[vector.kind]
            entries: list[torch.Tensor] = []
            values: list[torch.Tensor] = []
            for part in of_leaves:
                buffer = buffers[part.group][part.reduction]
                totals = buffer[part.firsts]
                for leaf, first, last in part.several:
                    totals[leaf] = reduce(buffer[first:last])
                entries.append(part.entries)
                values.append(totals)
            for tree in of_trees:
                buffer = buffers[tree.group][tree.reduction]
                if tree.spans:
                    entries.append(tree.entries)
                    values.append(reduce(torch.cat([buffer[a:b] for a, b in tree.spans])).reshape(1))
            no_entry = torch.empty(0, dtype=torch.int64, device=self.device)
            no_value = torch.empty(0, dtype=torch.float64, device=self.device)
            made = vector.complete(torch.cat([no_entry, *entries]), torch.cat([no_value, *values]))
            for part in of_leaves:
                buffer = buffers[part.group][part.reduction]
                for _, first, last in part.several:
                    buffer[first:last] = identity
                buffer[part.firsts] = made[part.entries]
            for tree in of_trees:
                buffer = buffers[tree.group][tree.reduction]
                for a, b in tree.spans:
                    buffer[a:b] = identity
                buffer[tree.position] = made[tree.entry]
