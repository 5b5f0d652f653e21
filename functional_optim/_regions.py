"""Regions: a chain laid out over the leaves of a tree, cut into rules that fuse, rules that do not, and other steps."""

import bisect
import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import torch

from ._compiler.fuse import Counting, HostSchedule, Part, Recipe, follows_counter, fuse_all
from ._compiler.rule import Bound, Option, Slot, slot
from ._packed import Form, Packed
from ._runtime.checks import at, check_fit, check_slot, refuse_freed
from ._runtime.cuda.capture import NumberWatch, is_capturing, refuse_binding, refuse_host_schedule
from ._runtime.groups import Columns, Key, Leaf
from ._runtime.internals import MapLevel
from ._runtime.join import Joins
from ._runtime.members import MembersReading, MembersStep
from ._runtime.packed_step import PackedStep
from ._runtime.packing import PackedColumn
from ._runtime.programs import Binding, NoKernels, Programs
from ._runtime.recent import in_front
from ._runtime.shard import MeshShard
from ._runtime.spec import TensorSpec, specs_of
from ._runtime.stacks import find_freed
from ._runtime.step import BoundStep, Reading
from ._schedules.schedule import tensors_of
from ._schedules.traced import has_fixed_key, traced_key
from ._transform import Link
from ._tree import MaskedNode


Kind = tuple[tuple[int, ...], Counting | None]  # the rules that see a leaf, and its counter


class Stored(NamedTuple):
    """A column of state of a region.

    Args:
      key: the column.
      name: its name in messages.
      slot: its declaration; None for a counter that all leaves share.
      seen: for each leaf, whether it has an entry.
    """

    key: Key
    name: str
    slot: Slot | None
    seen: tuple[bool, ...]


def counter_slot(seen: tuple[bool, ...]) -> Stored:
    """The column of the counters of leaves that count their own steps."""
    return Stored("step", "state step", slot(0.0, dtype=torch.float32, per="leaf"), seen)


class Opaque(NamedTuple):
    """A transformation that can only be called: it runs between regions, in torch operations of its own."""

    position: int
    link: Link
    entered: str | None = None


class Region:
    """Neighbouring rules that are computed together: a `FusedRegion`, or a `LeafwiseRegion`.

    Args:
      links: the rules, by position in the chain.
      apply: whether the programs end by adding the updates to the parameters.
      entered: the column that its updates are kept in, for a rule behind other segments.

    Attributes:
      bounds: the rules with their hyper-parameters, by position.
      kinds: the kind of each leaf; none where nothing fuses.
      recipes: the program of each kind.
      hosts: schedules that Python evaluates, by the name of their column.
      traced: functions that have been traced, with the key of all that they refer to.
      stored: the columns of state.
    """

    def __init__(self, links: dict[int, Link], apply: bool, entered: str | None) -> None:
        self.links, self.apply, self.entered = links, apply, entered
        self.bounds: dict[int, Bound] = {k: link.bound for k, link in links.items() if link.bound is not None}
        self.kinds: list[Kind] = []
        self.recipes: dict[Kind, Recipe] = {}
        self.hosts: dict[str, HostSchedule] = {}
        self.traced: list[tuple[Any, Hashable]] = []
        self.stored: list[Stored] = []

    @property
    def by_python(self) -> list[str]:
        """The names of all schedules that Python evaluates."""
        return list(self.hosts)

    @property
    def tree_extras(self) -> dict[str, str]:
        """Extra arguments that are trees, each with a rule that takes it."""
        return {name: bound.rule.name for bound in self.bounds.values() for name in bound.rule.tree_extras}

    @property
    def is_current(self) -> bool:
        """Whether functions that have been traced still refer to the same."""
        return all(traced_key(fn) == key for fn, key in self.traced)

    @property
    def spans_tree(self) -> bool:
        """Whether something is reduced over all leaves."""
        return any(recipe.program.spans_tree for recipe in self.recipes.values())

    def numbers(
        self,
        present: Sequence[int],
        owners: Sequence[int] | None,
        options: Sequence[Mapping[str, Any]],
        extra: Mapping[str, Any],
    ) -> list[Any]:
        """The hyper-parameters and extra arguments of a step, without values of schedules.

        Args:
          present: the leaves that take part.
          owners: whose options each leaf looks up; None if there are no options.
          options: mappings that hyper-parameters are looked up in.
          extra: the extra arguments that are numbers.
        """
        found: list[Any] = []
        for k, bound in self.bounds.items():
            own = [] if owners is None else dict.fromkeys(owners[i] for i in present if self.links[k].seen[i])
            for name, value in bound.values.items():
                if isinstance(value, Option):
                    found += [value.look_up(options[owner]) for owner in own]
                elif bound.is_scalar(name):
                    found.append(value)
            found += tensors_of(bound.values)
            found += [extra[name] for name in bound.rule.extras if name in extra]
        return found


class FusedRegion(Region):
    """Neighbouring rules, which fuse: a program for each kind of leaf.

    Args:
      links, apply, entered: see `Region`.
      n_leaves: number of leaves.
      scopes: each transformation's position as reductions over the tree know it.
      counting: the counter of each leaf; None where transformations count for all leaves.
    """

    def __init__(
        self,
        links: dict[int, Link],
        apply: bool,
        n_leaves: int,
        scopes: Sequence[int],
        counting: Sequence[Counting] | None,
        entered: str | None = None,
    ) -> None:
        super().__init__(links, apply, entered)
        positions, seen = tuple(links), [link.seen for link in links.values()]
        of_leaves = list(zip(*seen, strict=True)) if seen else [()] * n_leaves
        none: list[Counting | None] = [None] * n_leaves
        # leaves of a kind share a program: the same rules see them, and they count alike
        self.kinds = [
            (tuple(itertools.compress(positions, own)), count)
            for own, count in zip(of_leaves, none if counting is None else counting, strict=True)
        ]
        parts = {
            kind: tuple(Part(k, scopes[k], self.bounds[k], *self._entry(k)) for k in kind[0])
            for kind in dict.fromkeys(self.kinds)
        }
        own = None if counting is None else {kind: count for kind in parts if (count := kind[1]) is not None}
        self.recipes = fuse_all(parts, apply, own)
        self.hosts = {name: host for recipe in self.recipes.values() for name, host in recipe.hosts.items()}
        schedules = [
            bound.values[hyper] for bound in self.bounds.values() for hyper in bound.values if bound.is_schedule(hyper)
        ]
        self.traced = [(fn, traced_key(fn)) for fn in schedules if not has_fixed_key(fn)]
        self.stored = self._stored(counting is not None)

    def _stored(self, own_counters: bool) -> list[Stored]:
        stored = []
        if own_counters:
            stored.append(counter_slot(tuple("step" in self.recipes[kind].program.leaves for kind in self.kinds)))
        for k, bound in self.bounds.items():
            for name, declared in bound.rule.slots.items():
                stored.append(Stored((k, name), f"state {bound.rule.name}.{name}", declared, self.links[k].seen))
            if bound.counted and not own_counters:
                stored.append(Stored((k, "count"), f"state {bound.rule.name}.count", None, self.links[k].seen))
        return stored

    def _entry(self, k: int) -> tuple[int | None, str | None]:
        """For a rule that wraps others, the first of them, or the column of the updates that entered them."""
        inside = self.links[k].wraps
        if inside is None:
            return None, None
        return (k - inside, None) if k - inside >= min(self.links) else (None, entered_at(k - inside))


class LeafwiseRegion(Region):
    """One rule for whole tensors, which torch operations compute.

    Args:
      position: its position in the chain.
      link: the rule.
      own_counters: whether each leaf counts its own steps, in the column `step`.
      entered: the column that its updates are kept in; see `Region`.

    Attributes:
      python_hypers: the hyper-parameters that are schedules which Python evaluates.
    """

    def __init__(self, position: int, link: Link, own_counters: bool, entered: str | None = None) -> None:
        assert link.bound is not None
        super().__init__({position: link}, False, entered)
        self.position, self.link, self.bound = position, link, link.bound
        self.counter: Key = "step" if own_counters else (position, "count")
        self.stored = self._stored(own_counters)
        values = self.bound.values
        self.python_hypers = {k for k in values if self.bound.is_schedule(k) and not follows_counter(values[k])}

    @property
    def by_python(self) -> list[str]:
        return [f"{self.bound.rule.name}.{name}" for name in self.python_hypers]

    def _stored(self, own_counters: bool) -> list[Stored]:
        name, seen, stored = self.bound.rule.name, self.link.seen, []
        if own_counters and self.bound.uses_step:
            stored.append(counter_slot(seen))
        for key, declared in self.bound.rule.slots.items():
            lacking = self.link.lacking.get(key, frozenset())
            own = tuple(s and i not in lacking for i, s in enumerate(seen))
            stored.append(Stored((self.position, key), f"state {name}.{key}", declared, own))
        if self.bound.counted and not own_counters:
            stored.append(Stored((self.position, "count"), f"state {name}.count", None, seen))
        return stored


def cut_into_regions(
    links: Sequence[Link],
    apply: bool,
    n_leaves: int,
    scopes: Sequence[int] | None = None,
    counting: Sequence[Counting] | None = None,
) -> list[Region | Opaque]:
    """Cuts a chain into segments: regions, and the opaque transformations between them.

    Args:
      links: the transformations.
      apply: whether to end by adding the updates to the parameters.
      n_leaves: number of leaves.
      scopes: each transformation's position as reductions over the tree know it; by default its own.
      counting: the counter of each leaf, which the last region moves on; None where transformations count for all.

    Returns:
      Regions and opaque transformations, in order. With `apply` the last one is a region.
    """
    segments: list[Region | Opaque] = []
    # a rule that wraps some which do not fuse is given the updates that entered them, from between two segments
    cuts = sorted(
        {k - n for k, link in enumerate(links) if (n := link.wraps) and not all(map(_fuses, links[k - n : k]))}
    )
    numbered = list(enumerate(links))
    parts = itertools.groupby(numbered, key=lambda x: (_fuses(x[1]), bisect.bisect(cuts, x[0])))
    runs = [(fuses, dict(run)) for (fuses, _), run in parts]
    if apply and not (runs and runs[-1][0]):
        runs.append((True, {}))
    still = None if counting is None else [c._replace(advance=False) for c in counting]
    for k, (fuses, run) in enumerate(runs):
        last = k == len(runs) - 1
        if fuses:
            counts = counting if last else still
            entered = next((entered_at(k) for k in run if k in cuts), None)
            segments.append(FusedRegion(run, apply and last, n_leaves, scopes or range(len(links)), counts, entered))
            continue
        for position, link in run.items():
            entered = entered_at(position) if position in cuts else None
            if link.bound is None:
                segments.append(Opaque(position, link, entered))
            else:
                segments.append(LeafwiseRegion(position, link, counting is not None, entered))
    return segments


def entered_at(position: int) -> str:
    """The column of the updates that enter a transformation, which a rule around it and others is given."""
    return f"updates@{position}"


def _fuses(link: Link) -> bool:
    """Whether a transformation is a rule that kernels compute."""
    return link.bound is not None and not link.bound.rule.whole


class Variant(NamedTuple):
    """The part of a binding that tensors do not show.

    Args:
      in_place: whether results are written in place.
      backend: the backend that is asked for, if any.
      first: the leaves that take their first step, where that makes a difference.
      forms: the form of each column that is packed, by its position among the columns.
    """

    in_place: bool
    backend: str | None
    first: frozenset[int] = frozenset()
    forms: tuple[Form | None, ...] = ()


def packed_forms(columns: Iterable[Any]) -> tuple[Form | None, ...]:
    """The form of each column that is packed, and None for others; nothing if none is."""
    columns = tuple(columns)
    if PackedColumn not in map(type, columns):
        return ()
    packed = [x.packed if type(x) is PackedColumn else None for x in columns]
    return tuple([x.form if isinstance(x, Packed) else None for x in packed])


class BoundRegion:
    """A region over the leaves of a tree, and the steps that it is bound to: one for each set of specs.

    Args:
      region: the region.
      paths: the path of each leaf.
      present: the leaves that take part.
      joins: the reductions over processes, if there are any.
    """

    KEEP = 8

    def __init__(
        self, region: Region, paths: Sequence[str], present: Sequence[int], joins: Joins | None = None
    ) -> None:
        self.region, self.paths, self.present, self.joins = region, paths, present, joins
        self.bound: list[tuple[Variant, BoundStep]] = []
        self.of_members: list[tuple[tuple[Form | None, ...], MembersStep]] = []
        self.entered = region.entered

    def find(self, own: Columns, variant: Variant) -> tuple[BoundStep, Reading] | None:
        """A step that is bound to such tensors, and these tensors read.

        Args:
          own: all tensors that the programs read.
          variant: the part of the binding that they do not show.

        Raises:
          ValueError: the storage of a tensor has been freed or cut.
        """
        for entry in self.bound:
            known, bound = entry
            if known != variant or (bound.partners and not bound.has_partners(own)):
                continue
            found = bound.read(own)
            if isinstance(found, Reading):
                if entry is not self.bound[0]:
                    self.bound = in_front(entry, self.bound, self.KEEP)
                return bound, found
            if found.outside:
                self._refuse_freed(own, *bound.name_of(found.position))
        return None

    def _refuse_freed(self, own: Columns, name: str, leaf: int) -> NoReturn:
        refuse_freed(name, self.paths[leaf], own["updates"][leaf].shape)

    def check_memory(self, own: Columns, levels: Sequence[MapLevel]) -> None:
        """Refuses tensors without memory, where operations of torch are to compute members of `vmap`.

        Raises:
          ValueError: the storage of a tensor has been freed or cut.
        """
        found = find_freed(own, levels)
        if found is not None:
            key, leaf = found
            names = {stored.key: stored.name for stored in self.region.stored}
            name = key if isinstance(key, str) else f"the extra argument `{key[1]}`"
            self._refuse_freed(own, names.get(key, name), leaf)

    def find_members(
        self, own: Columns, levels: Sequence[MapLevel], extra: Mapping[str, Any], given: Mapping[int, torch.Tensor]
    ) -> tuple[MembersStep, MembersReading] | None:
        """A step of an ensemble that is bound to such tensors, and these tensors read.

        Args:
          own: all tensors that the programs read, as they are within `vmap`.
          levels: the calls of `vmap` that are active.
          extra: the extra arguments that are numbers.
          given: tensors in the place of those that hyper-parameters have, by identity.

        Raises:
          ValueError: the storage of a tensor has been freed or cut.
        """
        sizes, forms = tuple(level.size for level in levels), packed_forms(own.values())
        for entry in self.of_members:
            known, bound = entry
            if bound.sizes != sizes or known != forms or (bound.partners and not bound.has_partners(own)):
                continue
            found = bound.read(own, bound.own_numbers(extra, given), levels)
            if isinstance(found, MembersReading):
                if entry is not self.of_members[0]:
                    self.of_members = in_front(entry, self.of_members, self.KEEP)
                return bound, found
            if found is not None and found.outside:
                self._refuse_freed(own, *bound.name_of(found.position))
        return None

    def bind_members(
        self,
        own: Columns,
        levels: Sequence[MapLevel],
        leaves: Sequence[Leaf],
        counters: Set[Key],
        extra: Mapping[str, Any],
        given: Mapping[int, torch.Tensor],
    ) -> tuple[MembersStep, MembersReading] | None:
        """Binds the programs to the tensors of an ensemble, and reads these; None if kernels do not compute them.

        Args:
          own: all tensors that the programs read, as they are within `vmap`.
          levels: the calls of `vmap` that are active.
          leaves: the leaves of a member that programs compute.
          counters: columns of counters that all leaves share.
          extra: the extra arguments that are numbers.
          given: tensors in the place of those that hyper-parameters have, by identity.
        """
        try:
            bound = MembersStep(leaves, self.specs(own), own, levels, counters, extra, given)
        except NoKernels:
            return None
        self.of_members = in_front((packed_forms(own.values()), bound), self.of_members, self.KEEP)
        return self.find_members(own, levels, extra, given)

    def bind(
        self, own: Columns, variant: Variant, leaves: Sequence[Leaf], counters: Sequence[Key] = ()
    ) -> tuple[BoundStep, Reading]:
        """Binds the programs to tensors, and reads these.

        Args:
          own: all tensors that the programs read.
          variant: the part of the binding that they do not show.
          leaves: the leaves that programs compute.
          counters: columns of counters that all leaves share.
        """
        binding = Binding(leaves, self.specs(own), own, self.paths, variant.in_place, counters, self.joins)
        try:
            bound = PackedStep(binding) if any(variant.forms) else BoundStep(binding)
        except NoKernels:
            bound = BoundStep(binding)
        self.bound = in_front((variant, bound), self.bound, self.KEEP)
        found = bound.read(own)
        if not isinstance(found, Reading):
            assert found.outside, "a step is bound to the tensors that it was made for"
            self._refuse_freed(own, *bound.name_of(found.position))
        return bound, found

    def leaves(
        self,
        own: Columns,
        owners: Sequence[int] | None = None,
        first: frozenset[int] = frozenset(),
        numels: Sequence[int] | None = None,
        shards: Sequence[MeshShard | None] | None = None,
    ) -> list[Leaf]:
        """The leaves that programs compute. Those that no rule sees are left alone.

        Args:
          own: all tensors that the programs read.
          owners: whose options each leaf looks up.
          first: the leaves that take their first step.
          numels: number of elements of each leaf, those in other processes counted.
          shards: the join of each leaf with its other parts.

        Raises:
          ValueError, TypeError: a slot does not fit its leaf.
        """
        for key, name, declared, seen in self.region.stored:
            for i in self.present:
                if seen[i] and declared is not None and key != "step":  # counters are of any dtype
                    check_slot(name, self.paths[i], own[key][i], own["updates"][i], declared)
        kinds, recipes = self.region.kinds, self.region.recipes
        for name, rule in self.region.tree_extras.items():
            for i in self.present:
                if name in recipes[kinds[i]].program.arrays:
                    self._check_extra(name, rule, i, own)
        return [
            Leaf(
                i,
                recipes[kinds[i]],
                (kinds[i], owners[i] if owners else 0, i in first),
                numels[i] if numels else own["updates"][i].numel(),
                shards[i] if shards else None,
            )
            for i in self.present
            if kinds[i][0] or self.region.apply
        ]

    def _check_extra(self, name: str, rule: str, i: int, own: Columns) -> None:
        """Refuses an entry of an extra argument that does not go with its leaf."""
        x = own[-1, name][i]
        if x is None or isinstance(x, MaskedNode):
            raise ValueError(
                f"the extra argument `{name}`{at(self.paths[i])} is {x!r}, but {rule} computes an update for it; give "
                f"a tensor, or mask the rule."
            )
        check_fit(f"the extra argument `{name}`", "update", self.paths[i], x, own["updates"][i])

    def specs(self, own: Columns) -> dict[Key, list[TensorSpec | None]]:
        """The specs of the tensors of leaves that take part."""
        present = set(self.present)
        return {
            key: specs_of([x if i in present and isinstance(x, torch.Tensor) else None for i, x in enumerate(column)])
            for key, column in own.items()
        }

    def programs(self, own: Columns, leaves: Sequence[Leaf]) -> Programs:
        """The programs, for tensors that torch operations compute on this one time."""
        return Programs(leaves, self.specs(own), self.joins)


def look_ahead(
    watch: NumberWatch,
    segments: Sequence[BoundRegion | Opaque],
    devices: Set[torch.device],
    owners: Sequence[int] | None,
    options: Sequence[Mapping[str, Any]],
    extra: Mapping[str, Any],
    given: Mapping[int, torch.Tensor] = MappingProxyType({}),
) -> None:
    """Refuses a step of several parts that a CUDA graph could not replay, before the first one is captured.

    Args:
      watch: the numbers of the last step that was not captured; those of such a step are noted.
      segments: its segments.
      devices: the devices of the step.
      owners: whose options each leaf looks up; None if there are no options.
      options: mappings that hyper-parameters are looked up in.
      extra: the extra arguments that are numbers.
      given: tensors in the place of those that hyper-parameters have, by identity.

    Raises:
      CaptureError: a stream is capturing, and a graph could not replay the step.
    """
    regions = [segment for segment in segments if isinstance(segment, BoundRegion)]
    if is_capturing(devices):
        for segment in regions:
            for name in segment.region.by_python:
                refuse_host_schedule(name, devices)
            if not (segment.bound or isinstance(segment.region, LeafwiseRegion)):
                refuse_binding(devices)
    numbers = [x for segment in regions for x in segment.region.numbers(segment.present, owners, options, extra)]
    watch.check([given.get(id(x), x) for x in numbers], devices)
