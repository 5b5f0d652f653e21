"""State of parameters: a flat dict for each, read as columns, made where it is missing, put back after a step."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from operator import itemgetter, or_
from typing import Any, NoReturn

import torch

from .._compiler.rule import Option
from .._opaque import SplitState
from .._regions import Region, Stored
from .._runtime.checks import check_memory
from .._runtime.cuda.capture import is_capturing, refuse_new_state, refuse_state_of_python
from .._runtime.groups import Columns, Key
from .._runtime.internals import needs_dispatch
from .._runtime.numbers import number_of
from .._runtime.shard import check_placed
from .._state import Copies, shared_column
from .journal import Journal
from .local import LocalColumns
from .region import ParamRegion
from .template import ParamList, States, gradient_dtype


Held = dict[int, set[str]]  # the keys of the entries that steps have left, by the ids of parameters


class ParamState:
    """The entries of state that a step keeps for each parameter, whose dicts belong to the optimizer.

    Args:
      params: the parameters.
      present: those that take part.
      regions: the regions of the step.
      opaque: the states of transformations that are not made of rules, by position.
      local: the columns of local tensors.
      devices: the device of each parameter that takes part.
      counter: the dtype of counters; None if they are Python's integers.

    Attributes:
      present_names: the names of the parameters that take part.
      counts_in_integers: whether counters are Python's integers.
      known: whether the owner of the state has asked for the entries that steps leave; see `note`.
    """

    def __init__(
        self,
        params: ParamList,
        present: Sequence[int],
        regions: Sequence[ParamRegion],
        opaque: Mapping[int, SplitState],
        local: LocalColumns,
        devices: Sequence[torch.device | None],
        counter: torch.dtype | None,
    ) -> None:
        self.params, self.present, self.regions, self.opaque = params, present, regions, opaque
        self.present_names = {params.names[i] for i in present}
        self.local, self.devices = local, devices
        self.counts_in_integers, self.counter = counter is None, counter or torch.float64
        # for each number that parameters share, by key, the parameters that do, whether or not they take part
        self.shared: dict[str, list[int]] = {}
        for segment in regions:
            for stored in segment.region.stored:
                if stored.slot is not None and stored.slot.per_tree:
                    sharing = self.shared.setdefault(segment.keys[stored.key], [])
                    sharing += [i for i, seen in enumerate(stored.seen) if seen]
        self.takers = {key: [i for i in present if i in set(sharing)] for key, sharing in self.shared.items()}
        self.copies = {key: Copies() for key in self.shared}
        self.noted = False  # whether an owner has asked for the entries that steps leave
        # each column once, with the key of its entries: counters are those of all regions that read them
        columns: dict[Key, tuple[Stored, str]] = {}
        for segment in regions:
            for stored in segment.region.stored:
                seen = columns[stored.key][0].seen if stored.key in columns else stored.seen
                both = tuple(map(or_, seen, stored.seen))
                columns[stored.key] = stored._replace(seen=both), segment.keys[stored.key]
        self.kept = [(stored, key) for stored, key in columns.values() if any(stored.seen)]
        nothing = (None,) * len(params.tensors)
        self.empty: Columns = {key: nothing for key, (stored, _) in columns.items() if not any(stored.seen)}

    def make(
        self,
        params: Sequence[torch.Tensor],
        states: States,
        options: Sequence[Mapping[str, Any]],
        journal: Journal,
        held: Held | None = None,
    ) -> set[int]:
        """Makes the entries that are not there yet.

        Args:
          params: the parameters, or tensors that stand for them.
          states: the state of each parameter.
          options: mappings that hyper-parameters are looked up in.
          journal: takes note of entries that are made.
          held: the entries that steps have left; None if no step has been taken.

        Returns:
          The parameters for which something was made whose first step differs.

        Raises:
          CaptureError: a CUDA graph is being captured, and would make the state anew at each replay.
          ValueError: an entry was removed, and others of the parameter were not.
        """
        refuse_new_state(self.devices)
        if held is not None:
            self._refuse_removed(states, held)
        new: set[int] = set()
        for split, by_name, missing in self._missing(states):
            for names, key, x in split.make(missing, self.present_names):
                journal.set_each([by_name[name] for name in names], key, [x] * len(names))
        for segment in self.regions:
            for stored in segment.region.stored:
                key = segment.keys[stored.key]
                shared = self._tie(key, states, journal) if key in self.shared else None
                for i in self.present:
                    if not stored.seen[i]:
                        continue
                    if states[i].get(key) is None:
                        if shared is None:
                            made = self._make(segment.region, stored, params[i], i, options)
                            shared = made if key in self.shared else None
                        else:
                            made = shared
                        journal.set(states[i], key, made)
                        if stored.key != "step" and stored.key[0] in segment.uses_first:
                            new.add(i)
        return new

    def note(self) -> Held:
        """The entries that parameters have now, for an owner who keeps them; `noted` tells that they were asked for."""
        self.noted = True
        held: Held = {}
        for i in self.present:
            keys = [key for stored, key in self.kept if stored.seen[i]]
            held.setdefault(id(self.params.tensors[i]), set()).update(keys)
        ids = {name: id(p) for name, p in zip(self.params.names, self.params.tensors, strict=True)}
        for split in self.opaque.values():
            for entry in split.filled if split.seen else ():
                if entry[0] is None or entry[0] in self.present_names:
                    for name in split.holders(entry, self.present_names):
                        held.setdefault(ids[name], set()).add(split.keys[entry])
        return held

    def _refuse_removed(self, states: States, held: Held) -> None:
        """Refuses the state of a parameter that lacks an entry, where it has others of its chain.

        A slot that has come with a switch, or with another mask, is no such entry: no step has left it.

        Raises:
          ValueError: with the name of the parameter and the entry.
        """
        for i in self.present:
            keys = dict.fromkeys(key for stored, key in self.kept if stored.seen[i])
            left = held.get(id(self.params.tensors[i]), set())
            lacking = [key for key in keys if key not in states[i] and key in left]
            if lacking and any(states[i].get(key) is not None for key in (*keys, *left)):
                self._refuse_lack(i, lacking, states[i], "set it to None to have it start anew, ")
        positions = {name: i for i, name in enumerate(self.params.names)}
        for split, _, missing in self._missing(states):
            for entry in missing:
                for i in map(positions.__getitem__, split.holders(entry, self.present_names)):
                    left = held.get(id(self.params.tensors[i]), set())
                    if split.keys[entry] in left and any(states[i].get(key) is not None for key in left):
                        self._refuse_lack(i, [split.keys[entry]], states[i])

    def _refuse_lack(self, i: int, lacking: Sequence[str], state: Mapping[str, Any], hint: str = "") -> NoReturn:
        raise ValueError(
            f"the state of {self.params.names[i]!r} lacks {', '.join(map(repr, lacking))}, but has "
            f"{', '.join(map(repr, state))}; put the entry back, {hint}or clear the whole state of the parameter."
        )

    def started_at_rate(self) -> list[tuple[int, str]]:
        """The entries, by position and key, whose first value is the learning rate of the parameter group."""
        found = []
        for segment in self.regions:
            for stored in segment.region.stored:
                if stored.slot is None or isinstance(stored.key, str) or not isinstance(stored.slot.start, str):
                    continue
                start = segment.region.bound_rules[stored.key[0]].values.get(stored.slot.start)
                if isinstance(start, Option) and start.name == "lr":
                    found += [(i, segment.keys[stored.key]) for i in self.present if stored.seen[i]]
        return found

    def _tie(self, key: str, states: States, journal: Journal) -> Any:
        """Has parameters that share a number, of which a loaded state has many, hold the tensor of the first.

        Returns:
          The tensor; None if no parameter has one.

        Raises:
          ValueError: two parameters have other numbers.
        """
        names = self.params.names
        holders = [i for i in sorted(self.shared[key]) if states[i].get(key) is not None]
        shared = states[holders[0]][key] if holders else None
        for i in holders:
            x = states[i][key]
            if x is shared:
                continue
            if not _is_equal(x, shared):
                raise ValueError(
                    f"state {key!r} is one number for all parameters, but it is {x!r:.60} at {names[i]!r} and "
                    f"{shared!r:.60} at {names[holders[0]]!r}; set it for all of them."
                )
            journal.set(states[i], key, shared)
        return shared

    def _make(
        self, region: Region, stored: Stored, p: torch.Tensor, i: int, options: Sequence[Mapping[str, Any]]
    ) -> torch.Tensor | int:
        """The first value of a slot for a parameter."""
        slot = stored.slot
        assert slot is not None, "counters that parameters share are not stored with them"
        with torch.no_grad():
            if isinstance(stored.key, str):
                return 0 if self.counts_in_integers else torch.zeros((), dtype=self.counter, device=self.devices[i])
            declared = region.bound_rules[stored.key[0]].values
            values = {k: v for k, v in declared.items() if k in (slot.start, slot.dtype, *slot.shape_hypers)}
            owner, label = self.params.groups[i], f"the start of {stored.name}"
            hypers = {k: number_of(v, options, owner, label) if isinstance(v, Option) else v for k, v in values.items()}
            for name, x in hypers.items():
                check_memory(f"`{name}`, {label}, is", x, p.device)
            made = slot.make(p, hypers, gradient_dtype(self.params.tensors[i]) if slot.as_gradient else None)
            assert made is not None, "a leaf that has no entry of a slot is not asked for one"
            return made

    def mend_counters(self, own: Columns, states: States, journal: Journal) -> Columns:
        """Puts counters that a program can count on in the place of numbers of another form or place.

        Args:
          own: the columns of the step.
          states: the state of each parameter.
          journal: takes note of entries that are replaced.

        Returns:
          The column of counters; no column where nothing counts.
        """
        if "step" not in own:
            return {}
        column = list(own["step"])
        for i in self.present:
            if column[i] is not None and not _is_counter(column[i], self.devices[i]):
                column[i] = self._counter(column[i], i)
                journal.set(states[i], "step", column[i])
        return {"step": column}

    def counter_of(self, x: Any, i: int) -> torch.Tensor:
        """A copy of a counter, on which a program can count."""
        return (x if _is_counter(x, self.devices[i]) else self._counter(x, i)).clone()

    def _counter(self, x: Any, i: int) -> torch.Tensor:
        """A counter that somebody has put there, as this step keeps it."""
        on_meta = isinstance(x, torch.Tensor) and x.is_meta and self.devices[i] != x.device
        if isinstance(x, torch.Tensor) and x.numel() == 1 and not on_meta:
            kept = x.dtype.is_floating_point or x.dtype is torch.int64
            return x.reshape(()).to(dtype=x.dtype if kept else self.counter, device=self.devices[i])
        if isinstance(x, Real):
            return torch.tensor(float(x), dtype=self.counter, device=self.devices[i])
        raise ValueError(f"state step at {self.params.names[i]!r} is {x!r:.60}, expected one number.")

    def columns(self, states: States, exact: bool = False) -> Columns | None:
        """The slots of all regions; None if an entry has to be made first.

        Args:
          states: the state of each parameter.
          exact: whether to look for entries that are None; they are found when tensors are read, too.
        """
        if self.opaque and any(missing for _, _, missing in self._missing(states)):
            return None
        columns = dict(self.empty)
        for stored, key in self.kept:
            if key in self.shared:
                found = self._shared_column(stored, key, states)
                if found is None:
                    return None
                columns[stored.key] = found
                continue
            try:
                column, complete = list(map(itemgetter(key), states)), not exact
            except KeyError:
                complete = False
            if not complete:
                column = [state.get(key) for state in states]
                if any(column[i] is None and stored.seen[i] for i in self.present):
                    return None
            if self.local.wrapped and stored.key != "step" and (stored.slot is None or stored.slot.like_leaf):
                self.local.check_slots(stored.name, column)
                columns[stored.key] = self.local.of(stored.key, column, check_placed, f"{stored.name} at")
            else:
                columns[stored.key] = column
        return columns

    def _missing(self, states: States) -> list[tuple[SplitState, dict[str, Any], list[Any]]]:
        """For each transformation that is not made of rules, its state, the dicts by name, and entries that lack."""
        by_name = dict(zip(self.params.names, states, strict=True))
        return [(split, by_name, split.missing(by_name, self.present_names)) for split in self.opaque.values()]

    def _shared_column(self, stored: Stored, key: str, states: States) -> list[Any] | None:
        """A number that parameters share, once per parameter; None if one does not have it, or has another."""
        held = [states[i].get(key) for i in self.shared[key]]
        value = next((x for x in held if x is not None), None)
        if not self.takers[key]:
            return [None] * len(states)
        if value is None or any(x is not None and x is not value for x in held):
            return None
        takers = self.takers[key]
        if any(states[i].get(key) is None for i in takers):
            return None
        # a graph that writes to copies has some of its own, which nobody frees or writes anew
        keeps = not (torch.is_grad_enabled() or needs_dispatch() or is_capturing(self.devices))
        column = shared_column(stored.name, value, self.devices, takers, True, self.copies[key] if keeps else None)
        return [x if seen else None for x, seen in zip(column, stored.seen, strict=True)]

    def replace(self, segment: ParamRegion, results: Columns, own: Columns, states: States, journal: Journal) -> None:
        """Puts new tensors in the place of the entries of a region's slots.

        Args:
          segment: the region.
          results: the columns that it has computed.
          own: the columns that it was computed from.
          states: the state of each parameter.
          journal: takes note of entries that are replaced.
        """
        wrapped, captures = set(self.local.wrapped), self.captures()
        for stored in segment.region.stored:
            if stored.key not in results:
                continue
            key = segment.keys[stored.key]
            if key in self.shared:
                first = self.takers[key][0]
                if stored.seen[first]:  # all have computed the same
                    for i in self.shared[key]:
                        if key in states[i]:
                            self.put(states[i], key, results[stored.key][first], journal, captures)
                continue
            new, old = results[stored.key], own[stored.key]
            changed = [i for i in self.present if new[i] is not old[i]]
            values = [new[i] for i in changed]
            if wrapped and (stored.slot is None or stored.slot.like_leaf):
                values = [self.local.like(x, i) if i in wrapped else x for i, x in zip(changed, values, strict=True)]
            owners = [states[i] for i in changed]
            if captures:
                for state, x in zip(owners, values, strict=True):
                    self.put(state, key, x, journal, captures)
            else:
                journal.set_each(owners, key, values)

    def captures(self) -> bool:
        """Whether a CUDA graph is being captured, whose replays go on from the state that there is."""
        return not torch.is_grad_enabled() and is_capturing(self.devices)

    def put_all(self, entries: Sequence[tuple[Sequence[str], str, Any]], states: States, journal: Journal) -> None:
        """Puts new entries, by the names of parameters and the key, in the place of others; see `put`.

        An entry of the tree, which several parameters hold, is written to once.
        """
        by_name, captures = dict(zip(self.params.names, states, strict=True)), self.captures()
        for names, key, x in entries:
            owners = [by_name[name] for name in names]
            if captures:
                for state in {id(state.get(key)): state for state in owners}.values():
                    self.put(state, key, x, journal, captures)
            else:
                journal.set_each(owners, key, [x] * len(owners))

    def put(self, state: dict[str, Any], key: str, new: Any, journal: Journal, captures: bool) -> None:
        """Puts an entry of state in the place of another; in a graph, its elements.

        Raises:
          CaptureError: a graph could not.
        """
        old = state.get(key)
        if not captures or old is new:
            journal.set(state, key, new)
        elif isinstance(old, torch.Tensor) and is_alike(old, new) and old.device in self.devices:
            old.copy_(new)
        elif isinstance(old, torch.Tensor) or type(old) is not type(new) or old != new:
            refuse_state_of_python(key)


def is_alike(x: torch.Tensor, y: Any) -> bool:
    """Whether an entry of state is a tensor like another one, to which it can be copied."""
    return isinstance(y, torch.Tensor) and (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)


def _is_equal(x: Any, y: Any) -> bool:
    """Whether two entries of state are the same number, as far as one can tell."""
    if not all(isinstance(z, torch.Tensor) and z.numel() == 1 and not z.is_meta for z in (x, y)):
        return x is y or (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and (x.is_meta or y.is_meta))
    a, b = float(x), float(y)
    return a == b or (math.isnan(a) and math.isnan(b))


def _is_counter(x: Any, device: torch.device | None) -> bool:
    """Whether an entry of state is one number, on a device, that a program can count on."""
    fits = isinstance(x, torch.Tensor) and not x.ndim and x.device == device
    return fits and (x.dtype.is_floating_point or x.dtype is torch.int64)
