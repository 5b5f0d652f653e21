"""Refusing to write to memory that two leaves share."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ._groups import Group, Lists
from ._tree import at
from .kernels import Column
from .kernels.alike import map_alike
from .kernels.layout import Extents, repeats, span
from .kernels.scan import Found


class Disjoint(NamedTuple):
    """Addresses that were found not to overlap.

    Args:
      written: addresses of what is written.
      read: addresses of updates.
      extents: the stretches of memory written.
      spans: lengths of the updates in bytes.
    """

    written: bytes
    read: bytes
    extents: Extents
    spans: torch.Tensor


class Overlap:
    """Looks for memory that what a step writes has in common with what it writes or reads elsewhere.

    Args:
      groups: the leaves of the step.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = groups
        self.known: Disjoint | None = None
        self.seen: list[Found | None] = []  # where everything was then

    def check(self, names: Sequence[str], lists: Lists, pure: bool) -> None:
        """Refuses to write to memory that two leaves share.

        Args:
          names: what messages call each leaf.
          lists: the tensors.
          pure: whether it is `donate=True` that writes.

        Raises:
          ValueError: with the paths of both.
        """
        if any(g.device.type == "meta" for g in self.groups):
            return
        seen = [column.found for column in lists.values()]
        if seen == self.seen and None not in seen:
            return
        targets = [[g.target(k, lists) for k in range(len(g.outputs))] for g in self.groups]
        columns = [c for outs in targets for c in outs if c is not None]
        reads = [g.updates.gather(lists) for g in self.groups]
        written, read = b"".join(c.addresses for c in columns), b"".join(c.addresses for c in reads)
        known = self.known  # of this or another thread, so looked at once
        if known is not None and known.written == written and known.read == read:
            self.seen = seen
            return
        if known is not None and known.written == written:
            extents, spans = known.extents, known.spans
        else:
            tensors, looks = [x for c in columns for x in c], [x for c in columns for x in c.looks]
            repeated = map_alike(repeats, tensors, looks)
            if any(repeated):
                name = self.name(names, targets, repeated.index(True))
                raise ValueError(
                    f"{name} is an expanded tensor or a view of windows, several of whose elements share memory, so "
                    f"{'donate=True' if pure else 'a step'} cannot write to it; pass `x.clone()`."
                )
            lengths = [map_alike(span, tensors, looks), [n for c in reads for n in map_alike(span, c, c.looks)]]
            stretches, spans = (torch.tensor(x, dtype=torch.int64, device="cpu") for x in lengths)
            extents = Extents(_integers(written), stretches)
        clash: tuple[str, str] | None = None
        if (two := extents.clash()) is not None:
            clash = self.name(names, targets, two[0]), self.name(names, targets, two[1])
        elif (touched := extents.touched(_integers(read), spans)) is not None:
            leaf = [i for g in self.groups for i in g.leaves][touched[0]]
            clash = f"updates{at(names[leaf])}", self.name(names, targets, touched[1])
        if clash is not None:
            raise ValueError(
                f"{clash[0]} and {clash[1]} share memory, so {'donate=True' if pure else 'a step'}, which writes in "
                f"place, would corrupt them. Pass a tied parameter once, {'' if pure else 'or '}clone one of the two"
                f"{', or use donate=False' if pure else ''}."
            )
        self.known, self.seen = Disjoint(written, read, extents, spans), seen

    def name(self, names: Sequence[str], targets: Sequence[Sequence[Column | None]], position: int) -> str:
        """What messages call one of all the tensors to be written."""
        for group, outs in zip(self.groups, targets, strict=True):
            for k, column in enumerate(outs):
                if column is not None and position < len(column):
                    return f"{_label(group, k)}{at(names[group.leaves[position]])}"
                position -= len(column or ())
        raise IndexError(position)


def _integers(packed: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(packed or 8), dtype=torch.int64)[: len(packed) // 8]


def _label(group: Group, output: int) -> str:
    name = group.signature.program.outputs[output].name
    return name if name == "params" else f"state {name}"
