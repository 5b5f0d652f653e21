"""Regions: a chain laid out over the leaves of a tree, cut into rules that fuse, rules that do not, and other steps."""

import bisect
import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ._compiler.fuse import FusedRule, HostSchedule, Recipe, StepCounter, follows_counter, fuse_all
from ._compiler.rule import Bound, Option
from ._compiler.slots import Slot, slot
from ._runtime.groups import Key
from ._schedules.schedule import tensors_of
from ._schedules.traced import has_fixed_key, traced_key
from ._transform import Link


Kind = tuple[tuple[int, ...], StepCounter | None]  # the rules that see a leaf, and its counter


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
      entered: the column in which the updates that enter it are kept, for a rule of a later region that wraps it; None
        if there is no such rule.

    Attributes:
      bound_rules: the rules with their hyper-parameters, by position.
      kinds: the kind of each leaf; none where nothing fuses.
      recipes: the program of each kind.
      host_schedules: schedules that Python evaluates, a column each.
      traced: functions that have been traced, with the key of all that they refer to.
      stored: the columns of state.
    """

    def __init__(self, links: dict[int, Link], apply: bool, entered: str | None) -> None:
        self.links, self.apply, self.entered = links, apply, entered
        self.bound_rules: dict[int, Bound] = {k: link.bound for k, link in links.items() if link.bound is not None}
        self.kinds: list[Kind] = []
        self.recipes: dict[Kind, Recipe] = {}
        self.host_schedules: list[HostSchedule] = []
        self.traced: list[tuple[Any, Hashable]] = []
        self.stored: list[Stored] = []

    @property
    def by_python(self) -> list[str]:
        """The names of all schedules that Python evaluates."""
        return [host.name for host in self.host_schedules]

    @property
    def tree_extras(self) -> dict[str, str]:
        """Extra arguments that are trees, each with a rule that takes it."""
        return {name: bound.rule.name for bound in self.bound_rules.values() for name in bound.rule.tree_extras}

    @property
    def is_current(self) -> bool:
        """Whether functions that have been traced still refer to the same."""
        return all(traced_key(fn) == key for fn, key in self.traced)

    @property
    def spans_tree(self) -> bool:
        """Whether something is reduced over all leaves."""
        return any(recipe.program.spans_tree for recipe in self.recipes.values())

    def _stored(self, counting: tuple[bool, ...] | None, own_counters: bool) -> list[Stored]:
        """The columns of state.

        Args:
          counting: for each leaf, whether its own counter is read; None if there is no column of such counters.
          own_counters: whether each leaf counts its own steps; otherwise transformations count for all.
        """
        stored = [] if counting is None else [counter_slot(counting)]
        for k, bound in self.bound_rules.items():
            seen = self.links[k].seen
            for name, declared in bound.rule.slots.items():
                lacking = self.links[k].lacking.get(name, frozenset())
                there = tuple(s and i not in lacking for i, s in enumerate(seen)) if lacking else seen
                stored.append(Stored((k, name), f"state {bound.rule.name}.{name}", declared, there))
            if bound.counted and not own_counters:
                stored.append(Stored((k, "count"), f"state {bound.rule.name}.count", None, seen))
        return stored

    def hypers(
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
        for k, bound in self.bound_rules.items():
            asked = [] if owners is None else dict.fromkeys(owners[i] for i in present if self.links[k].seen[i])
            for name, value in bound.values.items():
                if isinstance(value, Option):
                    found += [value.look_up(options[owner]) for owner in asked]
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
        counting: Sequence[StepCounter] | None,
        entered: str | None = None,
    ) -> None:
        super().__init__(links, apply, entered)
        positions, seen = tuple(links), [link.seen for link in links.values()]
        seen_by = list(zip(*seen, strict=True)) if seen else [()] * n_leaves  # for each leaf, whether each rule sees it
        none: list[StepCounter | None] = [None] * n_leaves
        # leaves of a kind share a program: the same rules see them, and they count alike
        self.kinds = [
            (tuple(itertools.compress(positions, by)), count)
            for by, count in zip(seen_by, none if counting is None else counting, strict=True)
        ]
        fused_rules = {
            kind: tuple(FusedRule(k, scopes[k], self.bound_rules[k], *self._entry(k)) for k in kind[0])
            for kind in dict.fromkeys(self.kinds)
        }
        counters = None if counting is None else {kind: count for kind in fused_rules if (count := kind[1]) is not None}
        self.recipes = fuse_all(fused_rules, apply, counters)
        found = [host for recipe in self.recipes.values() for host in recipe.host_schedules.values()]
        self.host_schedules = list({host.column: host for host in found}.values())
        schedules = [
            bound.values[hyper]
            for bound in self.bound_rules.values()
            for hyper in bound.values
            if bound.is_schedule(hyper)
        ]
        self.traced = [(fn, traced_key(fn)) for fn in schedules if not has_fixed_key(fn)]
        reads = None if counting is None else tuple("step" in self.recipes[kind].program.leaves for kind in self.kinds)
        self.stored = self._stored(reads, counting is not None)

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
        self.stored = self._stored(link.seen if own_counters and self.bound.uses_step else None, own_counters)
        values = self.bound.values
        self.python_hypers = {k for k in values if self.bound.is_schedule(k) and not follows_counter(values[k])}

    @property
    def by_python(self) -> list[str]:
        return [f"{self.bound.rule.name}.{name}" for name in self.python_hypers]


def cut_into_regions(
    links: Sequence[Link],
    apply: bool,
    n_leaves: int,
    scopes: Sequence[int] | None = None,
    counting: Sequence[StepCounter] | None = None,
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
        {k - n for k, link in enumerate(links) if (n := link.wraps) and not all(map(can_fuse, links[k - n : k]))}
    )
    numbered = list(enumerate(links))
    parts = itertools.groupby(numbered, key=lambda x: (can_fuse(x[1]), bisect.bisect(cuts, x[0])))
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


def can_fuse(link: Link) -> bool:
    """Whether a transformation is a rule that kernels compute."""
    return link.bound is not None and not link.bound.rule.whole
