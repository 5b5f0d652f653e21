"""Joins: reductions whose parts are in several processes.

Vectors of numbers, their lengths and their order follow from the parameters alone, never from the gradients that a
process happens to have, so that collectives match.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from .._compiler.call import ReductionKey, reduction_key
from .._compiler.ops import REDUCTIONS
from .._compiler.program import Program
from .shard import MeshShard, VectorJoin


class Vector(NamedTuple):
    """The numbers of all reductions of one kind that end before one stage.

    Args:
      kind: a row of `REDUCTIONS`.
      entries: the entry of each leaf's reduction, and of each part of a reduction over the tree.
      join: completes them.
    """

    kind: str
    entries: Mapping[ReductionKey, int]
    join: VectorJoin

    def complete(self, entries: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """All entries, completed by the parts of other processes.

        Args:
          entries: the entries that have a part here; the others are the identity.
          values: the parts.
        """
        identity = REDUCTIONS[self.kind].identity
        made = torch.full((len(self.entries),), identity, dtype=torch.float64, device=values.device)
        made[entries] = values
        self.join(made, self.kind)
        return made


class Joins:
    """All reductions of programs over leaves some of which are in parts.

    Args:
      programs: the program of each leaf, whether or not it has a gradient.
      shards: the dimensions over which each leaf is in parts.
    """

    def __init__(self, programs: Sequence[Program], shards: Sequence[MeshShard | None]) -> None:
        self.shards = list(dict.fromkeys(shard for shard in shards if shard is not None))
        found: dict[tuple[int, str], dict[ReductionKey, MeshShard]] = {}
        for position, (program, shard) in enumerate(zip(programs, shards, strict=True)):
            if shard is None:
                continue
            for i in program.reductions:
                value = program.values[i]
                found.setdefault((value.stage, value.reduction), {})[reduction_key(value, i, position, shard)] = shard
        self.vectors: dict[int, list[Vector]] = {}
        for (stage, kind), keys in sorted(found.items(), key=lambda x: x[0]):
            entries = {key: k for k, key in enumerate(keys)}
            self.vectors.setdefault(stage, []).append(Vector(kind, entries, VectorJoin(list(keys.values()))))

    @property
    def stages(self) -> int:
        """Number of stages, the first of which has nothing to join."""
        return 1 + max(self.vectors, default=0)

    def __bool__(self) -> bool:
        return bool(self.vectors)

    def __call__(
        self, stage: int, parts: Mapping[ReductionKey, Sequence[torch.Tensor]]
    ) -> dict[ReductionKey, torch.Tensor]:
        """Completes the reductions that end before a stage.

        Args:
          stage: the stage.
          parts: numbers of this process, some for each reduction; none where it has no part.

        Returns:
          A number for every reduction.
        """
        results: dict[ReductionKey, torch.Tensor] = {}
        for vector in self.vectors.get(stage, ()):
            known = {k: parts[key] for key, k in vector.entries.items() if key in parts}
            device = next(iter(known.values()))[0].device if known else torch.device("cpu")
            eager = REDUCTIONS[vector.kind].eager
            values = [eager(torch.stack([x.to(device) for x in xs])) for xs in known.values()]
            here = torch.stack(values) if values else torch.empty(0, dtype=torch.float64, device=device)
            made = vector.complete(torch.tensor(list(known), dtype=torch.int64, device=device), here)
            results |= zip(vector.entries, made.unbind(), strict=True)
        return results
