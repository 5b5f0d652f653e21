"""Regions of a chain over parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

from .._leafwise import LeafwiseStep
from .._regions import LeafwiseRegion, Region
from .._runtime.groups import Columns, Key
from .._runtime.join import Joins
from .._runtime.shard import MeshShard, is_in_mesh, own_part, whole_tensor
from .._segments import BoundRegion
from .template import Keys, ParamList


class ParamRegion(BoundRegion):
    """A region over parameters, with the keys of its slots in their states.

    Args:
      region: the region.
      params: the parameters.
      present: the parameters that take part.
      keys: for each transformation, the keys of its slots.
      shards: the mesh dimensions over which each parameter is in parts.
    """

    def __init__(
        self,
        region: Region,
        params: ParamList,
        present: Sequence[int],
        keys: Sequence[Keys],
        shards: Sequence[MeshShard | None],
    ) -> None:
        programs = [region.recipes[kind].program for kind in region.kinds]
        joins = Joins(programs, shards) if programs else None
        rule: LeafwiseStep | None = None
        if isinstance(region, LeafwiseRegion):
            here = [i for i in present if is_in_mesh(params.tensors[i])]  # in another process there is nothing to do
            rule = LeafwiseStep(region, params.names, here, params.tensors)
        there = set(present)  # others may be without a shape yet, as those of a lazy module are
        numels = [p.numel() * (1 + p.is_complex()) if i in there else 0 for i, p in enumerate(params.tensors)]
        super().__init__(region, params.names, present, rule, params.groups, numels, shards, joins or None)
        self.params = params
        self.keys: dict[Key, str] = {}
        for stored in region.stored:
            if isinstance(stored.key, str):
                self.keys[stored.key] = stored.key
            else:
                position, slot = stored.key
                self.keys[stored.key] = keys[position][region.links[position].path, slot]

    def run_leafwise(
        self,
        own: Columns,
        options: Sequence[Mapping[str, Any]],
        extra: Mapping[str, Any],
        first: frozenset[int],
        kinds: Sequence[int] | None = None,
    ) -> Columns:
        """Runs the rule for whole tensors of this region; every process gathers a tensor in parts, and keeps its own.

        Args:
          own: the columns that it reads.
          options: mappings that hyper-parameters are looked up in.
          extra: the extra arguments.
          first: the parameters that take their first step.
          kinds: those of its leaves, if the columns are known to have the specs of the last step.

        Returns:
          The columns that it computes.
        """
        rule, shards = self.leafwise, self.shards
        assert rule is not None
        assert shards is not None
        parts = [i for i in rule.leaves if shards[i] is not None]
        if not parts:
            return rule.compute(own, extra, options, self.params.groups, first, kinds)
        params = self.params.tensors
        like_leaf = {"updates", *(s.key for s in self.region.stored if s.slot is not None and s.slot.like_leaf)}
        whole = dict(own)
        for key in rule.keys:
            if key in like_leaf or key == "params":
                column = list(own[key])
                for i in parts:
                    column[i] = whole_tensor(column[i], params[i])
                whole[key] = column
        results = rule.compute(whole, extra, options, self.params.groups, first)
        for key in like_leaf & results.keys():
            results[key] = [own_part(x, params[i]) if i in parts else x for i, x in enumerate(results[key])]
        return results
