"""Laying a transformation out over a tree: which leaves share a program, and whether everything fits.

This is where wrong shapes, dtypes and devices are refused, with the path of the leaf.
"""

import functools
import itertools
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ._base import GradientTransformation, Link
from ._fuse import Recipe, Source, fuse_all
from ._spec import Bound, Slot
from ._tree import Tree, View, at, check_fit, check_leaf, difference, flatten, leaves_like, paths
from .kernels import Column
from .kernels.guard import Guard
from .kernels.layout import Extents, compute_dtype, repeats, span, walk_together
from .kernels.plan import Signature
from .kernels.program import Level


SlotKey = tuple[int, str]
Lists = dict[Any, Column]  # "updates", "params" and slots -> a leaf's tensor at its position in the tree


class Places(NamedTuple):
    """Which tensors make a column: for each leaf of a group, the list that its tensor is in and the position there.

    Args:
      pairs: lists and positions.
      whole: the list, if the column is all of it.
    """

    pairs: tuple[tuple[Any, int], ...]
    whole: Any = None

    @classmethod
    def of(cls, pairs: Sequence[tuple[Any, int]], n_leaves: int) -> "Places":
        whole = [i for _, i in pairs] == list(range(n_leaves)) and len({key for key, _ in pairs}) == 1
        return cls(tuple(pairs), pairs[0][0] if whole else None)

    def gather(self, lists: Lists) -> Column:
        if self.whole is not None:
            return lists[self.whole]
        return Column(lists[key][i] for key, i in self.pairs)

    def scatter(self, column: Column, lists: Lists) -> None:
        if self.whole is not None:
            lists[self.whole] = column
        else:
            for x, (key, i) in zip(column, self.pairs, strict=True):
                lists[key][i] = x


def locate(lists: Lists, keys: Sequence[Any], addresses: Sequence[int]) -> None:
    """Keeps addresses that have been found with the columns that they are of, one after another."""
    start = 0
    for key in keys:
        lists[key] = Column.located(lists[key], addresses[start : start + len(lists[key])])
        start += len(lists[key])


class Group(NamedTuple):
    """Leaves that share a program, its dtypes and a device.

    Args:
      signature: the program and its dtypes.
      device: the device.
      leaves: positions of the leaves in the tree.
      inputs: where each input of the program is.
      outputs: where each output goes.
      sources: for each row of the scalar table, where its numbers come from.
      rows: each leaf's row.
      sizes: each leaf's number of elements.
      copied: places in the group of leaves whose arrays a kernel cannot walk side by side, so that they are copied.
    """

    signature: Signature
    device: torch.device
    leaves: tuple[int, ...]
    inputs: tuple[Places, ...]
    outputs: tuple[Places, ...]
    sources: tuple[tuple[Source, ...], ...]
    rows: tuple[int, ...]
    sizes: tuple[int, ...]
    copied: tuple[int, ...]


class Segment:
    """Neighbouring rule-made transformations: one program for each kind of leaf.

    Args:
      links: the transformations and their positions in the chain.
      apply: whether the programs end by adding updates to parameters.
      n_leaves: number of leaves of the tree.
    """

    def __init__(self, links: Mapping[int, Link], apply: bool, n_leaves: int) -> None:
        self.links, self.apply, self.n_leaves = links, apply, n_leaves
        self.bounds: dict[int, Bound] = {k: link.bound for k, link in links.items() if link.bound is not None}
        self.slots: list[SlotKey] = [(k, name) for k, bound in self.bounds.items() for name in bound.rule.slots]
        self.recent: list[Prepared] = []

    @functools.cached_property
    def active(self) -> list[tuple[int, ...]]:
        """For each leaf, the transformations that see it."""
        positions, seen = tuple(self.links), [link.seen for link in self.links.values()]
        if not seen:
            return [()] * self.n_leaves
        return [tuple(itertools.compress(positions, column)) for column in zip(*seen, strict=True)]

    @functools.cached_property
    def recipes(self) -> dict[tuple[int, ...], Recipe]:
        """The program of each kind of leaf."""
        kinds = dict.fromkeys(self.active)
        return fuse_all({kind: [(k, self.bounds[k]) for k in kind] for kind in kinds}, self.apply)

    def states(self, state: Any) -> dict[int, Any]:
        """The state of each transformation.

        Raises:
          TypeError: the state was made by another transformation.
        """
        states = {}
        for k, bound in self.bounds.items():
            path = self.links[k].path
            try:
                found = get_state(state, path)
            except (KeyError, IndexError, TypeError):
                found = None
            if type(found) is not bound.state_type:
                where = "".join(f"[{key!r}]" for key in path)
                raise TypeError(
                    f"state{where} is {type(found).__name__}, expected the {bound.state_type.__name__} of "
                    f"{bound.rule.name}; make the state with `init` of the same transformation."
                )
            if bound.counted:
                _check_count(f"state {bound.rule.name}.count", found.count)
            states[k] = found
        return states


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
    spans: tuple[int, ...]


class Prepared:
    """A segment prepared for leaves of certain dtypes, shapes and layouts. Refuses what no kernel may be handed."""

    def __init__(self, segment: Segment, plan: "Plan", lists: Lists) -> None:
        self.present = plan.present
        for key in segment.slots:
            bound = segment.bounds[key[0]]
            for i in self.present:
                if segment.links[key[0]].seen[i]:
                    name = f"state {bound.rule.name}.{key[1]}"
                    _check_slot(name, plan.paths[i], lists[key][i], lists["updates"][i], bound.rule.slots[key[1]])
        self.checked: list[tuple[Any, int]] = [
            (key, i) for key in segment.slots for i in self.present if segment.links[key[0]].seen[i]
        ]
        if plan.later:  # updates that came from another transformation
            self.checked += [("updates", i) for i in self.present]
        keys: list[Any] = list(dict.fromkeys(key for key, _ in self.checked))
        whole = len(self.checked) == len(keys) * len(lists["updates"])
        self.whole: list[Any] | None = keys if whole else None
        tensors = self.tensors(lists)
        self.guard = Guard(tensors)
        self.requires_grad = any(x.requires_grad for x in tensors)
        self.tracks_versions = not any(x.is_inference() for x in tensors)
        members: dict[Any, list[tuple[int, tuple[int, ...], Recipe]]] = {}
        for i in self.present:
            active = segment.active[i]
            recipe = segment.recipes[active]
            u, p = lists["updates"][i], lists["params"][i] if "params" in lists else None
            if u.numel() and (active or segment.apply):
                dtypes = _dtypes(recipe, lists, i, u, p)
                members.setdefault((Signature(recipe.program, *dtypes), u.device), []).append((i, active, recipe))
        self.groups = [_group(signature, device, m, lists) for (signature, device), m in members.items()]
        self.moving = [
            k
            for k, bound in segment.bounds.items()
            if bound.counted and any(segment.links[k].seen[i] for i in self.present)
        ]
        self.disjoint: Disjoint | None = None

    def holds(self, plan: "Plan", lists: Lists) -> bool:
        """Whether these leaves are like those it was prepared for."""
        if self.present != plan.present:
            return False
        addresses = self.guard.addresses(self.tensors(lists))
        if addresses and self.whole is not None:
            locate(lists, self.whole, addresses)
        return addresses is not None

    def tensors(self, lists: Lists) -> list[Any]:
        """The tensors that must stay alike."""
        if self.whole is not None:
            return list(itertools.chain.from_iterable(lists[key] for key in self.whole))
        return [lists[key][i] for key, i in self.checked]

    def check_overlap(self, plan: "Plan", lists: Lists) -> None:
        """Refuses to write to memory that two leaves share.

        Raises:
          ValueError: with the paths of both.
        """
        if any(g.device.type == "meta" for g in self.groups):
            return
        columns = [c.gather(lists) for g in self.groups for c in g.outputs]
        reads = [updates_of(g, lists) for g in self.groups]
        written, read = b"".join(c.addresses for c in columns), b"".join(c.addresses for c in reads)
        known = self.disjoint  # of this or another thread, so looked at once
        if known is not None and known.written == written and known.read == read:
            return
        if known is not None and known.written == written:
            extents, spans = known.extents, known.spans
        else:
            named = [
                (f"{_label(g, k)}{at(plan.paths[i])}", x)
                for g, outs in _per_group(self.groups, columns)
                for k, column in enumerate(outs)
                for i, x in zip(g.leaves, column, strict=True)
            ]
            repeated = next((name for name, x in named if repeats(x)), None)
            if repeated is not None:
                raise ValueError(
                    f"{repeated} is an expanded tensor or a view of windows, several of whose elements share memory, "
                    f"so donate=True cannot write to it; pass `x.clone()`."
                )
            extents, spans = Extents(named), tuple(span(x) for c in reads for x in c)
        clash = extents.clash()
        if clash is None:
            touched = extents.touched(struct.unpack(f"{len(spans)}q", read), spans)
            if touched is not None:
                leaf = [i for g in self.groups for i in g.leaves][touched[0]]
                clash = f"updates{at(plan.paths[leaf])}", touched[1]
        if clash is not None:
            raise ValueError(
                f"{clash[0]} and {clash[1]} share memory, so donate=True, which writes in place, would corrupt them. "
                f"Pass a tied parameter once, clone one of the two, or use donate=False."
            )
        self.disjoint = Disjoint(written, read, extents, spans)


def _per_group(groups: Sequence[Group], columns: Sequence[Column]) -> Iterator[tuple[Group, Sequence[Column]]]:
    start = 0
    for g in groups:
        yield g, columns[start : start + len(g.outputs)]
        start += len(g.outputs)


def _label(group: Group, output: int) -> str:
    name = group.signature.program.outputs[output].name
    return name if name == "params" else f"state {name}"


def _check_count(name: str, x: Any) -> None:
    """Refuses a counter that is not one number."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is {type(x).__name__} {x!r:.60}, expected a tensor that holds one integer.")
    if x.ndim or x.is_floating_point() or x.is_complex():
        raise ValueError(f"{name} is {x.dtype} of shape {tuple(x.shape)}, expected one integer.")


def _check_slot(name: str, path: str, x: Any, u: torch.Tensor, slot: Slot) -> None:
    """Refuses a stored tensor that does not go with its leaf."""
    if slot.per_leaf and isinstance(x, torch.Tensor):
        if x.ndim:
            raise ValueError(f"{name}{at(path)} has shape {tuple(x.shape)}, expected one number.")
        u = u.new_empty(())
    check_fit(name, "update", path, x, u)


def _dtypes(
    recipe: Recipe, lists: Lists, i: int, u: torch.Tensor, p: torch.Tensor | None
) -> tuple[tuple[torch.dtype, ...], tuple[torch.dtype, ...], torch.dtype]:
    """Storage dtypes of inputs and outputs for one leaf, and the dtype computed in."""
    program = recipe.program
    ins = tuple(lists[recipe.slots.get(n, n)][i].dtype for n in (*program.arrays, *program.leaves))
    new = u.dtype if p is None else torch.promote_types(u.dtype, p.dtype)
    outs = tuple(
        new if o.name == "updates" else lists[recipe.slots.get(o.name, o.name)][i].dtype for o in program.outputs
    )
    return ins, outs, compute_dtype((*ins, *outs))


def _group(
    signature: Signature, device: torch.device, members: Sequence[tuple[int, tuple[int, ...], Recipe]], lists: Lists
) -> Group:
    program = signature.program
    rows: dict[tuple[int, ...], int] = {}
    sources = []
    for _, active, recipe in members:
        if active not in rows:
            rows[active] = len(rows)
            sources.append(recipe.scalars)
    leaves = tuple(i for i, _, _ in members)
    updates = lists["updates"]

    def places(name: str) -> Places:
        return Places.of([(recipe.slots.get(name, name), i) for i, _, recipe in members], len(updates))

    inputs = [places(name) for name in (*program.arrays, *program.leaves)]
    outputs = [places(o.name) for o in program.outputs]
    written = [
        c for c, o in zip(outputs, program.outputs, strict=True) if o.level is Level.ELEMENT and o.name != "updates"
    ]
    copied = []
    if device.type != "meta":
        for k, i in enumerate(leaves):
            # what is written in place counts too, whether or not the program reads it
            columns = [*inputs[: len(program.arrays)], *written]
            tensors = [lists[key][j] for key, j in (column.pairs[k] for column in columns)]
            if not walk_together((updates[i], *tensors)):
                copied.append(k)
    return Group(
        signature,
        device,
        leaves,
        tuple(inputs),
        tuple(outputs),
        tuple(sources),
        tuple(rows[active] for _, active, _ in members),
        tuple(updates[i].numel() for i in leaves),
        tuple(copied),
    )


def get_state(state: Any, path: Sequence[int | str]) -> Any:
    """The state at a path of indices and keys."""
    for k in path:
        state = state[k]
    return state


def updates_of(group: Group, lists: Lists) -> Column:
    updates = lists["updates"]
    return updates if len(group.leaves) == len(updates) else Column(updates[i] for i in group.leaves)


class Plan:
    """A transformation laid out over a tree of certain shapes: segments between barriers."""

    def __init__(self, tx: GradientTransformation, apply: bool, updates: Tree, params: Tree | None) -> None:
        leaves, self.spec = flatten(updates if params is None else params)
        self.paths = paths(self.spec)
        self.lists(updates, params, explain=True)
        lists = self.lists(updates, params)
        us, ps = lists["updates"], lists.get("params")
        self.present = tuple(i for i, x in enumerate(us) if x is not None and leaves[i] is not None)
        self.absent = tuple(i for i, x in enumerate(us) if x is None or leaves[i] is None)
        for i in self.present:
            u = check_leaf("updates", self.paths[i], us[i])
            if ps is not None:
                check_fit("updates", "parameter", self.paths[i], u, check_leaf("params", self.paths[i], ps[i]))
        tensors = self.tensors(lists)
        self.guard = Guard(tensors)
        self.requires_grad = any(x.requires_grad for x in tensors)
        self.tracks_versions = not any(x.is_inference() for x in tensors)
        self.links = tx._links(View(self.spec, tuple(leaves), tuple(x is not None for x in leaves)), ())
        self.segments = self._segments(apply)
        self.later = len(self.segments) > 1
        if ps is None:
            for link in self.links:
                if link.bound is not None and link.bound.rule.uses_params:
                    raise ValueError(
                        f"{link.bound.rule.name} needs the parameters: call `update(updates, state, params)`."
                    )

    def _segments(self, apply: bool) -> list[Segment | tuple[int, Link]]:
        segments: list[Segment | tuple[int, Link]] = []
        numbered = list(enumerate(self.links))
        for fusible, run in itertools.groupby(numbered, key=lambda x: x[1].bound is not None):
            part = list(run)
            if fusible:
                last = part[-1][0] == len(numbered) - 1
                segments.append(Segment(dict(part), apply and last, len(self.paths)))
            else:
                segments.extend(part)
        if apply and not (segments and isinstance(segments[-1], Segment)):
            segments.append(Segment({}, True, len(self.paths)))
        return segments

    def lists(self, updates: Tree, params: Tree | None, explain: bool = False) -> Lists:
        """The leaves of both trees.

        Raises:
          ValueError: a tree has another structure.
        """
        lists: Lists = {}
        for name, tree in (("updates", updates), ("params", params)):
            if name == "updates" or tree is not None:
                try:
                    lists[name] = Column(leaves_like(self.spec, tree))
                except (ValueError, TypeError):
                    if not explain:
                        raise
                    raise ValueError(
                        f"{name} does not have the structure of params: {difference(self.spec, tree)}."
                    ) from None
        return lists

    def tensors(self, lists: Lists) -> list[Any]:
        """The updates that are there, and the parameters they belong to."""
        columns = [lists["updates"], *([lists["params"]] if "params" in lists else [])]
        if not self.absent:
            return list(itertools.chain.from_iterable(columns))
        return [column[i] for column in columns for i in self.present]

    def match(self, updates: Tree, params: Tree | None) -> Lists | None:
        """The leaves of both trees, if they are like those of the trees that this plan was made for."""
        try:
            lists = self.lists(updates, params)
        except (ValueError, TypeError):
            return None
        if any(
            lists["updates"][i] is not None and lists.get("params", lists["updates"])[i] is not None
            for i in self.absent
        ):
            return None
        addresses = self.guard.addresses(self.tensors(lists))
        if addresses is None:
            return None
        if not self.absent:
            locate(lists, list(lists), addresses)
        return lists
