"""Chunks of leaves, and the partial results of reductions over them."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .._compiler.ops import REDUCTIONS
from .plan import Group


class Chunks(NamedTuple):
    """Leaves cut into chunks, as columns of numbers: a chunk's leaf, its bounds, and each leaf's first chunk."""

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


def partial_buffers(groups: Sequence[Group], cuts: Sequence[Chunks], device: torch.device) -> list[list[torch.Tensor]]:
    """A buffer per reduction of each group, with a number per chunk of all groups.

    Tree reductions of one scope share theirs; a group that has no part in one leaves the identity there.
    """
    total = sum(len(chunks.leaf) for chunks in cuts)
    shared: dict[str, torch.Tensor] = {}
    buffers: list[list[torch.Tensor]] = []
    for g, group in enumerate(groups):
        own = []
        for i in group.signature.program.reductions:
            value = group.signature.program.values[i]
            key = value.name if value.op.startswith("tree_") else f"\0{g}.{i}"
            if key not in shared:
                identity = REDUCTIONS[value.reduction].identity
                shared[key] = torch.full((total,), identity, dtype=torch.float64, device=device)
            own.append(shared[key])
        buffers.append(own)
    return buffers


def join_shards(
    groups: Sequence[Group], cuts: Sequence[Chunks], buffers: Sequence[Sequence[torch.Tensor]], stage: int
) -> None:
    """Adds the parts that other processes hold to the partial results of reductions that end before a stage.

    Every process has as many numbers to add, whatever the sizes of its parts: one per leaf, or one for the tree.
    """
    start = 0
    for group, chunks, own in zip(groups, cuts, buffers, strict=True):
        stop = start + len(chunks.leaf)
        for i, buffer in zip(group.signature.program.reductions, own, strict=True):
            value = group.signature.program.values[i]
            if group.shard is None or value.stage != stage:
                continue
            kind, parts = value.reduction, buffer[start:stop]
            identity, reduce = REDUCTIONS[kind]
            if value.op.startswith("tree_"):
                total = reduce(parts).reshape(1)
                group.shard.combine(total, kind)
                parts.fill_(identity)
                parts[:1] = total
                continue
            totals = torch.stack([reduce(parts[first:last]) for first, last in itertools.pairwise(chunks.first)])
            group.shard.combine(totals, kind)
            parts.fill_(identity)
            parts[torch.tensor(chunks.first[:-1], device=parts.device)] = totals
        start = stop
