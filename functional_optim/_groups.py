"""Leaves that share a program: what their tensors mean for it, and where each of its arrays is."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ._compiler.fuse import Recipe, Source
from ._compiler.passes import Signature
from ._compiler.program import Level
from .kernels import Column, LeafTable, Part, Shard
from .kernels.layout import compute_dtype, walk_together


Lists = dict[Any, Column]  # "updates", "params" and slots -> a leaf's tensor at its position in the tree


class Places(NamedTuple):
    """Which tensors make a column: for each leaf of a group, the list that its tensor is in and the position there.

    Args:
      pairs: lists and positions.
      only: the list, if it is the same for all.
      part: which of its tensors; None if they are all of it.
    """

    pairs: tuple[tuple[Any, int], ...]
    only: Any = None
    part: Part | None = None

    @classmethod
    def of(cls, pairs: Sequence[tuple[Any, int]], n_leaves: int) -> "Places":
        positions = [i for _, i in pairs]
        if len({key for key, _ in pairs}) > 1:
            return cls(tuple(pairs))
        if positions == list(range(n_leaves)):
            return cls(tuple(pairs), pairs[0][0])
        return cls(tuple(pairs), pairs[0][0], Part(positions))

    @property
    def whole(self) -> Any:
        """The list that the tensors are all of, if there is one."""
        return self.only if self.part is None else None

    def gather(self, lists: Lists) -> Column:
        if self.only is None:
            return Column.of([(lists[key], i) for key, i in self.pairs])
        return lists[self.only] if self.part is None else lists[self.only].part(self.part)

    def scatter(self, column: Column, lists: Lists) -> None:
        """Puts tensors into the lists, if they are not those that were taken from there."""
        if self.whole is not None:
            lists[self.whole] = column
        elif self.part is None or lists[self.only].parts.get(self.part) is not column:
            for x, (key, i) in zip(column, self.pairs, strict=True):
                lists[key][i] = x


class Fit(NamedTuple):
    """What the tensors of a leaf mean for its program.

    Args:
      signature: the program and its dtypes.
      device: the device.
      size: number of elements.
      copied: whether a kernel cannot walk the leaf's arrays side by side, so that they are copied.
    """

    signature: Signature
    device: torch.device
    size: int
    copied: bool


class Member(NamedTuple):
    """A leaf of a group.

    Args:
      leaf: its position in the tree.
      row: what leaves with the same numbers have in common: kind and owner.
      whole: number of elements, of all parts if it is part of a tensor spread over processes.
      recipe: the program of its kind.
      fit: what its tensors mean for that.
    """

    leaf: int
    row: tuple[tuple[int, ...], tuple[int, bool]]
    whole: int
    recipe: Recipe
    fit: Fit


class Group(NamedTuple):
    """Leaves that share a program, its dtypes and a device.

    Args:
      signature: the program and its dtypes.
      device: the device.
      leaves: positions of the leaves in the tree.
      updates: where their updates are.
      inputs: where each input of the program is.
      outputs: where each output goes.
      sources: for each row of the scalar table, where its numbers come from.
      owners: for each row, the options that its leaves look things up in, and whether it is their first step.
      table: the leaves' sizes and rows.
      copied: places in the group of leaves whose arrays a kernel cannot walk side by side, so that they are copied.
      shard: what joins them to their other parts, if they are parts of tensors spread over processes.
    """

    signature: Signature
    device: torch.device
    leaves: tuple[int, ...]
    updates: Places
    inputs: tuple[Places, ...]
    outputs: tuple[Places, ...]
    sources: tuple[tuple[Source, ...], ...]
    owners: tuple[tuple[int, bool], ...]
    table: LeafTable
    copied: tuple[int, ...]
    shard: Shard | None

    def target(self, output: int, lists: Lists) -> Column | None:
        """What a step in place writes an output to; updates, which may be gradients, are always new tensors."""
        if self.signature.program.outputs[output].name == "updates":
            return None
        return self.outputs[output].gather(lists)


@functools.lru_cache(maxsize=512)
def _same(signature: Signature) -> Signature:
    """The first of equal signatures: every step looks its kernel up, and comparing programs takes long."""
    return signature


def fit_of(recipe: Recipe, lists: Lists, i: int) -> Fit:
    """What the tensors of a leaf, by their looks, mean for the program of its kind."""
    program = recipe.program
    u, p = lists["updates"][i], lists["params"][i] if "params" in lists else None

    def tensor(name: str) -> torch.Tensor:
        return lists[recipe.list_of(name)][i]

    ins = tuple(tensor(n).dtype for n in (*program.arrays, *program.leaves))
    new = u.dtype if p is None else torch.promote_types(u.dtype, p.dtype)
    outs = tuple(new if o.name == "updates" else tensor(o.name).dtype for o in program.outputs)
    # what is written in place counts too, whether or not the program reads it
    written = [o.name for o in program.outputs if o.level is Level.ELEMENT and o.name != "updates"]
    together = u.is_meta or walk_together([u, *map(tensor, (*program.arrays, *written))])
    signature = Signature(program, ins, outs, compute_dtype((*ins, *outs)))
    return Fit(_same(signature), u.device, u.numel(), not together)


def group_of(members: Sequence[Member], shard: Shard | None, n_leaves: int) -> Group:
    signature = members[0].fit.signature
    program = signature.program
    rows: dict[Any, int] = {}
    sources = []
    for m in members:
        if m.row not in rows:
            rows[m.row] = len(rows)
            sources.append(m.recipe.scalars)

    @functools.cache  # what is read and written in the same place is gathered once
    def places(name: str) -> Places:
        return Places.of([(m.recipe.list_of(name), m.leaf) for m in members], n_leaves)

    return Group(
        signature,
        members[0].fit.device,
        tuple([m.leaf for m in members]),
        Places.of([("updates", m.leaf) for m in members], n_leaves),
        tuple(map(places, (*program.arrays, *program.leaves))),
        tuple([places(o.name) for o in program.outputs]),
        tuple(sources),
        tuple(owner for _, owner in rows),
        LeafTable(
            tuple([m.fit.size for m in members]),
            tuple([m.whole for m in members]),
            tuple([rows[m.row] for m in members]),
        ),
        tuple([k for k, m in enumerate(members) if m.fit.copied]),
        shard,
    )
