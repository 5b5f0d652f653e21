"""A step that is like the last one: its tensors are taken from where they are, and looked at, all at once."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .._groups import Lists
from .._plan import Prepared, Segment
from ..kernels import Column
from ..kernels.layout import PLAIN
from ..kernels.scan import GRADIENT, ITSELF, Kinds, Search, Take, part_of
from .layout import Layout, Leaves
from .sharding import distributed
from .templates import Template


class Recall:
    """Remembers a step: how its tensors are come to, and what they were.

    Args:
      layout: the layout of its leaves.
      prepared: what its one segment was prepared for them.
      leaves: the leaves, which have their own gradients.
      takes: what each list of tensors is filled with.
      kinds: what the tensors were.
    """

    def __init__(
        self, layout: Layout, prepared: Prepared, leaves: Leaves, takes: Mapping[Any, Take], kinds: Mapping[Any, Kinds]
    ) -> None:
        self.layout, self.prepared, self.leaves = layout, prepared, leaves
        self.params = None if takes["params"].is_outer else Column(leaves.params)
        full = {"params": None} if self.params is not None else {}
        self.search = Search(list(kinds.values()), list({**takes, **full}.values()))
        self.keys, self.nothing = list(kinds), [None] * len(leaves.params)
        self.classes = list(set(map(type, leaves.params)))

    @classmethod
    def of(cls, layout: Layout, prepared: Prepared, leaves: Leaves) -> "Recall | None":
        """Remembers a step, if the next one can be like it.

        Args:
          layout: the layout of its leaves.
          prepared: what its last segment was prepared for them.
          leaves: the leaves.
        """
        segment, *others = layout.plan.segments
        guards = layout.plan.guards.each | prepared.guards.each
        kinds = {key: guard.kinds for key, guard in guards.items() if guard.kinds is not None}
        if others or not isinstance(segment, Segment) or prepared.first or len(kinds) < len(guards):
            return None
        outer = next((leaves.params[k] for k in layout.foreign if distributed(leaves.params[k])), None)
        part = None if outer is None else part_of(outer, "_local_tensor")
        known = {*PLAIN, *([] if part is None else [part[0]])}
        if not {type(p) for p in leaves.params} <= known or any(p.is_complex() for p in leaves.params):
            return None
        takes = {"updates": Take(leaves.params, GRADIENT, part), "params": Take(leaves.params, ITSELF, part)}
        for stored in segment.stored:
            own = None if stored.slot.per_leaf else part
            takes[stored.key] = Take(leaves.states, layout.key(segment, stored), own)
        return cls(layout, prepared, leaves, {key: takes[key] for key in kinds}, kinds)

    def lists(self, templates: Sequence[Template], leaves: Leaves, guarded: bool) -> Lists | None:
        """The tensors of leaves, if these are those of the step remembered, and like it.

        Args:
          templates: the transformations.
          leaves: the leaves.
          guarded: whether the step may be skipped.
        """
        if leaves is not self.leaves or not self.layout.is_for(templates, leaves, guarded):
            return None
        asked = torch.is_grad_enabled() or torch._C._len_torch_function_stack()
        if asked or any(getattr(cls, "grad", None) is not GRAD for cls in self.classes):  # somebody has a say in it
            return None
        columns = [Column(self.nothing) for _ in self.keys]  # type: ignore[arg-type]
        if self.params is not None:
            columns[self.keys.index("params")] = self.params
        found = self.search.find(columns)
        if found is None:
            return None
        for column, places in zip(columns, found, strict=True):
            column.locate(places)
        return dict(zip(self.keys, columns, strict=True))


GRAD = torch.Tensor.grad
