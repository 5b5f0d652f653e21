"""A step that is like the last one: its tensors are taken from where they are, and looked at, all at once."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._device import DeviceContext

from .._groups import Lists
from .._plan import Prepared, Segment
from ..kernels import Column
from ..kernels.collect import are_parts
from ..kernels.layout import PLAIN
from ..kernels.scan import Kinds, Search, Take, What, part_of
from .layout import Layout, Leaves
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
        if others or not isinstance(segment, Segment) or prepared.first or len(kinds) < len(guards) or _listened():
            return None
        part = part_of(leaves.params[0], "_local_tensor") if layout.foreign else None
        if layout.foreign and part is None:  # complex
            return None
        known = set(PLAIN) if part is None else {part[0]}
        if not set(map(type, leaves.params)) <= known:  # of a class of their own, or some distributed and others not
            return None
        takes = {"updates": Take(leaves.params, What.GRADIENT, part), "params": Take(leaves.params, What.ITSELF, part)}
        for stored in segment.stored:
            own = None if stored.slot.per_leaf else part
            takes[stored.key] = Take(leaves.states, layout.key(segment, stored), own)
        return cls(layout, prepared, leaves, {key: takes[key] for key in kinds}, kinds)

    def is_of(self, layout: Layout, prepared: Prepared, leaves: Leaves) -> bool:
        """Whether it was made for this very step."""
        return self.layout is layout and self.prepared is prepared and self.leaves is leaves

    def lists(self, templates: Sequence[Template], leaves: Leaves, guarded: bool) -> Lists | None:
        """The tensors of leaves, if these are those of the step remembered, and like it.

        Args:
          templates: the transformations.
          leaves: the leaves.
          guarded: whether the step may be skipped.
        """
        if leaves is not self.leaves or not self.layout.is_for(templates, leaves, guarded):
            return None
        if _listened() or any(getattr(cls, "grad", None) is not GRADIENT for cls in self.classes):
            return None
        columns = [Column(self.nothing) for _ in self.keys]  # type: ignore[arg-type]
        if self.params is not None:
            if not are_parts([leaves.params], self.params):
                return None
            columns[self.keys.index("params")] = self.params
        found = self.search.find(columns)
        if found is None:
            return None
        for column, places in zip(columns, found, strict=True):
            column.locate(places)
        return dict(zip(self.keys, columns, strict=True))


GRADIENT = torch.Tensor.grad


def _listened() -> bool:
    """Whether autograd or a mode has a say in what is read."""
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    return torch.is_grad_enabled() or any(type(mode) is not DeviceContext for mode in modes)  # a default device has not
