"""A plan for leaves, and whether it still is one for those of the next step."""

import functools
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch

from .._backend import transforming
from .._compiler.fuse import Counting
from .._groups import Lists
from .._plan import Plan, Segment, Stored
from .._transform import Link
from .._tree import View
from ..kernels import Column
from ..kernels.layout import PLAIN
from .barriers import Barrier
from .sharding import gradients, local, shard
from .templates import Keys, Template


class Leaves(NamedTuple):
    """What a step works on, a list entry per parameter.

    Args:
      names: makes what messages call the parameters; no name occurs twice.
      params: the parameters.
      grads: their gradients, None for those that the step skips; or None, where it is those that they have.
      states: their states; slots that are not there yet are made.
      templates: which template each has.
      owners: whose options each has.
      ids: what each is known by from step to step.
      tags: anything else that names and masks depend on.
    """

    names: Callable[[], Sequence[str]]
    params: list[torch.Tensor]
    grads: list[torch.Tensor | None] | None
    states: list[dict[str, Any]]
    templates: list[int]
    owners: list[int]
    ids: list[Any]
    tags: Sequence[Any] = ()

    @property
    def gradients(self) -> list[torch.Tensor | None]:
        """The gradients of the parameters."""
        return gradients(self.params) if self.grads is None else self.grads


def view_of(names: Sequence[str], params: Sequence[torch.Tensor]) -> View:
    """Parameters as the tree that masks are asked about."""
    return View.of(OrderedDict(zip(names, params, strict=True)))


def _identity(leaves: Leaves) -> list[list[Any]]:
    return [list(leaves.ids), list(leaves.templates), list(leaves.owners), list(leaves.tags)]


class Layout:
    """A plan, and what it was made for.

    Args:
      templates: the transformations.
      leaves: the leaves.
      guarded: whether steps may be skipped.
      first: whether it is the first one, so that masks that match nothing have not been warned of.
    """

    def __init__(self, templates: Sequence[Template], leaves: Leaves, guarded: bool, first: bool = False) -> None:
        self.templates, self.guarded = tuple(templates), guarded
        self.made_for = _identity(leaves)
        _, self.kinds, self.owners, _ = self.made_for
        self.foreign = [
            k for k, p in enumerate(leaves.params) if p.is_complex() or (type(p) not in PLAIN and local(p) is not p)
        ]
        names, grads = leaves.names(), leaves.gradients
        # DTensors; what is written to the part that is here counts as written to them
        own = (k for k in self.foreign if not leaves.params[k].is_complex() and grads[k] is not None)
        self.wrappers = array("q", own)
        for name, p, g in zip(names, leaves.params, grads, strict=True):
            if g is not None and p.is_meta and not transforming():
                raise RuntimeError(
                    f"{name} is on meta and has no memory; give it some, with `model.to_empty(device=...)` and "
                    f"initial values, before the first step."
                )
        view = view_of(names, leaves.params)
        links: list[Link] = []
        scopes: list[int] = []
        self.keys: list[Keys] = []  # of each link
        steps = [False] * len(leaves.params)
        for t, template in enumerate(templates):
            if first and len(leaves.params) > 1:  # a parameter of its own may well be masked
                template.tx._warn(view)
            part = template.tx._links(view.narrow([k == t for k in self.kinds]), ())
            links += part
            scopes += range(len(part))
            self.keys += [template.keys] * len(part)
            for link in part:
                if link.bound is not None and link.bound.uses_step:
                    steps = [a or b for a, b in zip(steps, link.seen, strict=True)]
        lists = self.lists(leaves)
        self.plan = plan = Plan(view.spec, names, lists, links, True, scopes)
        plan.options = self.owners
        plan.shards = [shard(p) for p in leaves.params]
        plan.wholes = [
            local(p).numel() if s is None else p.numel() * (1 + p.is_complex())
            for p, s in zip(leaves.params, plan.shards, strict=True)
        ]
        last = [s for s in plan.segments if isinstance(s, Segment)][-1]
        for segment in plan.segments:
            if isinstance(segment, Segment):
                segment.counting = [Counting(segment is last and s, guarded) for s in steps]
        plan.counting = last.counting
        self.barriers = {id(s[1]): Barrier(s[1], s[0], view) for s in plan.segments if not isinstance(s, Segment)}
        # leaves that no kernel sees; an empty part of a sharded tensor is seen, lest others should wait for it
        empty = [k for k in plan.present if plan.shards[k] is None and not local(leaves.params[k]).numel()]
        self.counters = [k for k in empty if steps[k]]

    def key(self, segment: Segment, stored: Stored) -> str:
        """What a slot is called in the state of a leaf."""
        if stored.key == "step":
            return "step"
        position, slot = stored.key
        key: str = self.keys[position][segment.links[position].path, slot]
        return key

    @functools.cached_property
    def spans_tree(self) -> bool:
        """Whether something is reduced over all leaves."""
        recipes = (r for s in self.plan.segments if isinstance(s, Segment) for r in s.recipes.values())
        return any(recipe.program.spans_tree for recipe in recipes)

    def lists(self, leaves: Leaves) -> Lists:
        return {"updates": self.local(leaves.gradients), "params": self.local(leaves.params)}

    def local(self, tensors: list[Any]) -> Column:
        """The plain real tensors that hold the elements of one tensor per leaf."""
        if not self.foreign:
            return Column(tensors)
        column = list(tensors)
        for k in self.foreign:
            if column[k] is not None:
                column[k] = local(column[k])
        return Column(column)

    def is_for(self, templates: Sequence[Template], leaves: Leaves, guarded: bool) -> bool:
        """Whether it was made for such leaves, whatever their tensors are like."""
        return (
            self.guarded == guarded
            and len(templates) == len(self.templates)
            and all(map(is_, templates, self.templates))
            and self.made_for == _identity(leaves)
        )

    def match(self, templates: Sequence[Template], leaves: Leaves, guarded: bool) -> Lists | None:
        """The tensors of leaves, if they are like those it was made for."""
        if not self.is_for(templates, leaves, guarded):
            return None
        lists = self.lists(leaves)
        if not self.plan.fits(lists):
            return None
        self.made_for = _identity(leaves)  # the same, but comparing an object with itself takes no time
        return lists
