"""Steps over parameters that each count their own steps, the core of a stateful optimizer.

In the pure API a transformation counts steps for the whole tree, and its numbers are the same for every leaf. Here a
parameter brings a flat dict of state, its counter `step` among it, and options, a mapping that hyper-parameters are
looked up in. All parameters still share one kernel per pass, whatever their options are.
"""

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from numbers import Real
from operator import attrgetter, is_, itemgetter
from typing import Any, Literal, NamedTuple

import torch

from ._compiler.fuse import Counting
from ._compiler.rule import Option, Slot
from ._leafwise import LeafwiseStep
from ._opaque import SplitState
from ._regions import BoundRegion, LeafwiseRegion, Opaque, Region, Stored, Variant, cut_into_regions
from ._runtime.backend import requested_backend
from ._runtime.checks import check_fit, check_leaf
from ._runtime.cuda.capture import is_capturing, refuse_host_schedule, refuse_new_state, refuse_state_of_python
from ._runtime.internals import in_backward, needs_dispatch
from ._runtime.join import Joins
from ._runtime.plan import Columns, Key
from ._runtime.shard import (
    LocalTensors,
    MeshShard,
    as_dtensor_like,
    check_placed,
    is_dtensor,
    is_fsdp1,
    is_in_mesh,
    local_tensor,
    mesh_shard,
    own_part,
    placed_like,
    real_view,
    whole_tensor,
)
from ._runtime.step import Numbers, Workspace
from ._state import Copies, shared_column
from ._step import (
    CHANGED_MESSAGE,
    SpecWatch,
    call_opaque,
    check_no_number,
    check_no_tree,
    check_updates,
    extras_of,
    host_column,
    updates_of,
)
from ._transform import GradientTransformation, Link, Path
from ._tree import Reader, View


GRAD = attrgetter("grad")


Placer = Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor]
Outcome = Literal["taken", "gone", "sparse"]


class Template(NamedTuple):
    """A transformation whose numbers are options, and the names of its slots.

    Args:
      tx: the transformation.
      keys: for each rule's path in it and slot, the key in the state of a parameter.
    """

    tx: GradientTransformation
    keys: Mapping[tuple[Path, str], str]


class ParamList(NamedTuple):
    """The parameters of a step, an entry per parameter in each field.

    Args:
      names: the name of each, in messages and for masks; no name occurs twice.
      tensors: the parameters.
      templates: the transformation of each, as a position in a list of templates.
      groups: the options of each, as a position in a list of options.
    """

    names: Sequence[str]
    tensors: Sequence[torch.Tensor]
    templates: Sequence[int]
    groups: Sequence[int]


def view_of(names: Sequence[str], params: Sequence[torch.Tensor]) -> View:
    """Parameters as the tree that masks are asked about."""
    return View.of(OrderedDict(zip(names, params, strict=True)))


def slots_of(template: Template, view: View) -> list[dict[str, tuple[Slot, Mapping[str, Any]] | None]]:
    """The slots that a chain keeps for each parameter, which not all of its transformations may see.

    Args:
      template: the chain.
      view: the parameters; it keeps nothing for one that is not seen.

    Returns:
      For each parameter, by key, the slot and the hyper-parameters of its rule; None for the counter `step`.
    """
    slots: list[dict[str, tuple[Slot, Mapping[str, Any]] | None]] = [{} for _ in view.seen]
    counted: list[bool] = [False] * len(slots)
    for link in template.tx._links(view, ()):
        for i in (i for i, seen in enumerate(link.seen) if seen and link.bound is not None):
            assert link.bound is not None
            counted[i] |= link.bound.uses_step
            for name, slot in link.bound.rule.slots.items():
                if i not in link.lacking.get(name, ()):
                    slots[i][template.keys[link.path, name]] = slot, link.bound.values
    return [{"step": None, **own} if own and steps else own for own, steps in zip(slots, counted, strict=True)]


class Journal:
    """Entries of state that a step has put in place, to be taken back if it fails before anything is written."""

    def __init__(self) -> None:
        self.entries: list[tuple[MutableMapping[Any, Any], Any, Any]] = []

    def set(self, state: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Puts an entry in place."""
        self.entries.append((state, key, state.get(key, _MISSING)))
        state[key] = value

    def undo(self) -> None:
        """Takes all entries back."""
        for state, key, before in reversed(self.entries):
            if before is _MISSING:
                state.pop(key, None)
            else:
                state[key] = before


_MISSING = object()


def tensor_of(x: Any) -> Any:
    """The plain real tensor that holds a tensor's elements, or this process's part of them."""
    return None if x is None else real_view(local_tensor(x))


def _like(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """A plain real tensor as its parameter is: a DTensor, or complex."""
    return as_dtensor_like(torch.view_as_complex(x) if p.is_complex() else x, p)


class ParamRegion(BoundRegion):
    """A region over parameters, with the keys of its slots in their states.

    Args:
      region: the region.
      names: the names of the parameters.
      present: the parameters that take part.
      keys: for each transformation, the keys of its slots.
      shards: the mesh dimensions over which each parameter is in parts.
      params: the parameters.
    """

    def __init__(
        self,
        region: Region,
        names: Sequence[str],
        present: Sequence[int],
        keys: Sequence[Mapping[tuple[Path, str], str]],
        shards: Sequence[MeshShard | None],
        params: Sequence[torch.Tensor],
    ) -> None:
        super().__init__(region, names, present)
        here = [i for i in present if is_in_mesh(params[i])]  # in another process there is nothing to compute
        self.leafwise = LeafwiseStep(region, names, here, params) if isinstance(region, LeafwiseRegion) else None
        programs = [region.recipes[kind].program for kind in region.kinds]
        self.joins = (Joins(programs, shards) or None) if self.leafwise is None else None
        self.keys: dict[Key, str] = {}
        for stored in region.stored:
            if isinstance(stored.key, str):
                self.keys[stored.key] = stored.key
            else:
                position, slot = stored.key
                self.keys[stored.key] = keys[position][region.links[position].path, slot]
        self.first_slots = {k for k, bound in region.bounds.items() if bound.rule.uses_first}


class ParamStep:
    """Transformations over parameters of which the same ones have gradients.

    Args:
      templates: the transformations.
      params: the parameters.
      grads: their gradients, None for parameters that the step skips.
      guarded: whether a step is taken only if `found_inf` is 0.
      counter: the dtype of counters; None if they are Python's integers.
      warn: whether to warn of masks that match nothing.

    Raises:
      ValueError, TypeError: a parameter cannot be stepped.
    """

    def __init__(
        self,
        templates: Sequence[Template],
        params: ParamList,
        grads: Sequence[torch.Tensor | None],
        guarded: bool,
        counter: torch.dtype | None,
        warn: bool,
    ) -> None:
        self.templates, self.params, self.guarded, self.counter = (
            tuple(templates),
            params,
            guarded,
            counter or torch.float64,
        )
        self.counts_in_integers = counter is None
        self.names = list(params.names)
        self.present = tuple(i for i, g in enumerate(grads) if g is not None)
        self.absent = tuple(i for i, g in enumerate(grads) if g is None)
        for i in self.present:
            if params.tensors[i].is_meta and not needs_dispatch():
                raise RuntimeError(
                    f"{self.names[i]} is on meta and has no memory; give it some, with `model.to_empty(device=...)` "
                    f"and initial values, before the first step."
                )
        # parameters whose elements are in another tensor: DTensors, and complex ones, which are pairs of real numbers
        self.wrapped = [i for i in self.present if params.tensors[i].is_complex() or is_dtensor(params.tensors[i])]
        self.dtensors = [i for i in self.wrapped if is_dtensor(params.tensors[i])]
        self.complex = [i for i in self.wrapped if params.tensors[i].is_complex()]
        self.locals = LocalTensors()
        self.locals.remember("params", params.tensors, self.dtensors)
        self.shards = [mesh_shard(p) for p in params.tensors]
        self.view = view_of(self.names, params.tensors)
        self.reader = Reader(self.view.spec)
        links, scopes, keys, steps = self._links(warn)
        counting = [Counting(advance, guarded) for advance in steps]
        self.stages: list[ParamRegion | Opaque] = [
            ParamRegion(stage, self.names, self.present, keys, self.shards, params.tensors)
            if isinstance(stage, Region)
            else stage
            for stage in cut_into_regions(links, True, len(self.names), scopes, counting)
        ]
        self.regions = [stage for stage in self.stages if isinstance(stage, ParamRegion)]
        self._check_whole()
        self.opaque = {
            stage.position: SplitState(stage.link, f"transformation_{stage.position}", self.view)
            for stage in self.stages
            if isinstance(stage, Opaque)
        }
        if warn and any(
            recipe.program.reductions for stage in self.regions for recipe in stage.region.recipes.values()
        ):
            self._warn_of_flat_params()
        self.spans_tree = any(stage.region.spans_tree for stage in self.regions)
        self.traced = [stage.region for stage in self.regions if stage.region.traced]
        self.needed = {name for stage in self.regions for name in stage.region.extras}
        # for each number that parameters share, by key, the parameters that do, whether or not they take part
        self.shared: dict[str, list[int]] = {}
        for stage in self.regions:
            for stored in stage.region.stored:
                if stored.slot is not None and stored.slot.per_tree:
                    sharing = self.shared.setdefault(stage.keys[stored.key], [])
                    sharing += [i for i, seen in enumerate(stored.seen) if seen]
        self.takers = {key: [i for i in self.present if i in set(sharing)] for key, sharing in self.shared.items()}
        self.copies: dict[str, Copies] = {key: {} for key in self.shared}
        self.extras = extras_of([stage.region if isinstance(stage, ParamRegion) else stage for stage in self.stages])
        self.needed |= self.extras.columns.keys()
        self.runs_python = bool(self.opaque) or any(stage.region.hosts or stage.leafwise for stage in self.regions)
        self.numels = [p.numel() * (1 + p.is_complex()) for p in params.tensors]
        self.devices = [
            tensor_of(p).device if g is not None else None for p, g in zip(params.tensors, grads, strict=True)
        ]
        self.watch = SpecWatch((), ())
        self.done = False
        self.workspace: Workspace | None = None  # of the last region of the last step

    def _check_whole(self) -> None:
        """Refuses complex parameters where a rule needs whole tensors of real numbers.

        Raises:
          ValueError: with the name of the rule and of the parameter.
        """
        for stage in self.regions:
            for i in self.complex if stage.leafwise is not None else ():
                assert stage.leafwise is not None
                if i in stage.leafwise.leaves:
                    raise ValueError(
                        f"{stage.leafwise.bound.rule.name} needs real numbers, but {self.names[i]!r} is "
                        f"{self.params.tensors[i].dtype}; leave it to other rules with `masked` or `partition`."
                    )

    def _links(self, warn: bool) -> tuple[list[Link], list[int], list[Any], list[bool]]:
        """The transformations of all templates, their scopes, the keys of each, and which parameters count steps."""
        links: list[Link] = []
        scopes: list[int] = []
        keys: list[Any] = []
        steps = [False] * len(self.names)
        places: dict[Path, int] = {}
        for t, template in enumerate(self.templates):
            if warn and len(steps) > 1:  # a parameter of its own may well be masked
                template.tx._warn(self.view)
            own = template.tx._links(self.view.narrow([k == t for k in self.params.templates]), ())
            links += own
            scopes += [places.setdefault(link.path, len(places)) for link in own]
            keys += [template.keys] * len(own)
            for link in own:
                if link.bound is not None and link.bound.uses_step:
                    steps = [a or b for a, b in zip(steps, link.seen, strict=True)]
        return links, scopes, keys, steps

    def _warn_of_flat_params(self) -> None:
        flat = next((name for name, p in zip(self.names, self.params.tensors, strict=True) if is_fsdp1(p)), None)
        if flat is not None:
            warnings.warn(
                f"{flat!r} is a part of a flat parameter of `FullyShardedDataParallel`, so norms, means and maxima of "
                f"this chain are those of the part in each process; use `fully_shard`, where they are those of whole "
                f"tensors.",
                stacklevel=2,
            )

    def is_for(self, templates: Sequence[Template], grads: Sequence[Any], guarded: bool, exact: bool) -> bool:
        """Whether the step is for such transformations, and for gradients of which the same ones are there.

        Args:
          templates: the transformations.
          grads: the gradients.
          guarded: whether the step is taken only if `found_inf` is 0.
          exact: whether to look for gradients that are gone.
        """
        return (
            self.guarded is guarded
            and len(templates) == len(self.templates)
            and all(map(is_, templates, self.templates))
            and not (self.absent and any(grads[i] is not None for i in self.absent))
            and not (self.traced and not all(region.is_current for region in self.traced))
            and not (self.dtensors and not self.locals.fit("params", self.params.tensors))
            and not ((exact or self.runs_python) and any(grads[i] is None for i in self.present))
        )

    # -- state --------------------------------------------------------------------------------------------------------

    def make_state(
        self, states: Sequence[dict[str, Any]], options: Sequence[Mapping[str, Any]], journal: Journal
    ) -> set[int]:
        """Makes the entries that are not there yet.

        Args:
          states: the state of each parameter.
          options: mappings that hyper-parameters are looked up in.
          journal: takes note of entries that are made.

        Returns:
          The parameters for which something was made whose first step differs.

        Raises:
          CaptureError: a CUDA graph is being captured, and would make the state anew at each replay.
        """
        refuse_new_state(self.devices)
        new: set[int] = set()
        for split in self.opaque.values():
            by_name = dict(zip(self.names, states, strict=True))
            for name, key, x in split.make(split.missing(by_name, [self.names[i] for i in self.present])):
                journal.set(by_name[name], key, x)
        for stage in self.regions:
            for stored in stage.region.stored:
                key = stage.keys[stored.key]
                shared = self._tie(key, states, journal) if key in self.shared else None
                for i in self.present:
                    if not stored.seen[i]:
                        continue
                    if states[i].get(key) is None:
                        if shared is None:
                            made = self._make(stage.region, stored, i, options)
                            shared = made if key in self.shared else None
                        else:
                            made = shared
                        journal.set(states[i], key, made)
                        if stored.key != "step" and stored.key[0] in stage.first_slots:
                            new.add(i)
        return new

    def _tie(self, key: str, states: Sequence[dict[str, Any]], journal: Journal) -> Any:
        """Has parameters that share a number hold one tensor: that of the first which has one. A loaded state has many.

        Args:
          key: the key of the number.
          states: the state of each parameter.
          journal: takes note of entries that are replaced.

        Returns:
          The tensor; None if no parameter has one.

        Raises:
          ValueError: two parameters have other numbers.
        """
        holders = [i for i in sorted(self.shared[key]) if states[i].get(key) is not None]
        shared = states[holders[0]][key] if holders else None
        for i in holders:
            x = states[i][key]
            if x is shared:
                continue
            if not _is_equal(x, shared):
                raise ValueError(
                    f"state {key!r} is one number for all parameters, but it is {x!r:.60} at {self.names[i]!r} and "
                    f"{shared!r:.60} at {self.names[holders[0]]!r}; set it for all of them."
                )
            journal.set(states[i], key, shared)
        return shared

    def _make(self, region: Region, stored: Stored, i: int, options: Sequence[Mapping[str, Any]]) -> torch.Tensor | int:
        """The first value of a slot for a parameter."""
        p, slot = self.params.tensors[i], stored.slot
        assert slot is not None, "counters that parameters share are not stored with them"
        with torch.no_grad():
            if isinstance(stored.key, str):
                return 0 if self.counts_in_integers else torch.zeros((), dtype=self.counter, device=self.devices[i])
            declared = region.bounds[stored.key[0]].values
            values = {k: v for k, v in declared.items() if k in (slot.start, slot.dtype, *slot.shape_hypers)}
            own = options[self.params.groups[i]]
            made = slot.make(p, {k: v.look_up(own) if isinstance(v, Option) else v for k, v in values.items()})
            assert made is not None, "a leaf that has no entry of a slot is not asked for one"
            return made

    def _mend_counters(self, own: Columns, states: Sequence[dict[str, Any]], journal: Journal) -> None:
        """Puts counters that a program can count on in the place of numbers of another form or place."""
        if "step" not in own:
            return
        column = list(own["step"])
        for i in self.present:
            if column[i] is not None and not _is_counter(column[i], self.devices[i]):
                column[i] = self._counter(column[i], i)
                journal.set(states[i], "step", column[i])
        own["step"] = column

    def counter_of(self, x: Any, i: int) -> torch.Tensor:
        """A copy of a counter, on which a program can count."""
        return (x if _is_counter(x, self.devices[i]) else self._counter(x, i)).clone()

    def _counter(self, x: Any, i: int) -> torch.Tensor:
        """A counter that somebody has put there, as this step keeps it."""
        if isinstance(x, torch.Tensor) and x.numel() == 1:
            kept = x.dtype.is_floating_point or x.dtype is torch.int64
            return x.reshape(()).to(dtype=x.dtype if kept else self.counter, device=self.devices[i])
        if isinstance(x, Real):
            return torch.tensor(float(x), dtype=self.counter, device=self.devices[i])
        raise ValueError(f"state step at {self.names[i]!r} is {x!r:.60}, expected one number.")

    def columns(self, states: Sequence[dict[str, Any]], exact: bool = False) -> Columns | None:
        """The slots of all regions; None if an entry has to be made first.

        Args:
          states: the state of each parameter.
          exact: whether to look for entries that are None; they are found when tensors are read, too.
        """
        columns: Columns = {}
        if self.opaque:
            by_name = dict(zip(self.names, states, strict=True))
            present = [self.names[i] for i in self.present]
            if any(split.missing(by_name, present) for split in self.opaque.values()):
                return None
        whole: set[Key] = set()  # of all parameters
        for stage in self.regions:
            for stored in stage.region.stored:
                if stored.key in columns:  # counters, which several regions read
                    if stored.key not in whole and self._lacks(columns[stored.key], stored):
                        return None
                    continue
                key = stage.keys[stored.key]
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
                if complete:
                    whole.add(stored.key)
                else:
                    column = [state.get(key) for state in states]
                    if self._lacks(column, stored):
                        return None
                if self.wrapped and stored.key != "step" and (stored.slot is None or stored.slot.like_leaf):
                    columns[stored.key] = self._local(stored.key, column, check_placed, f"{stored.name} at")
                else:
                    columns[stored.key] = column
        return columns

    def _lacks(self, column: Sequence[Any], stored: Stored) -> bool:
        """Whether a parameter that takes part has no entry of a slot."""
        return any(column[i] is None and stored.seen[i] for i in self.present)

    def _shared_column(self, stored: Stored, key: str, states: Sequence[dict[str, Any]]) -> list[Any] | None:
        """A number that parameters share, once per parameter; None if one does not have it, or has another."""
        held = [states[i].get(key) for i in self.shared[key]]
        value = next((x for x in held if x is not None), None)
        if value is None or any(x is not None and x is not value for x in held):
            return None
        takers = self.takers[key]
        if any(states[i].get(key) is None for i in takers):
            return None
        # a graph that writes to copies has some of its own, which nobody frees or writes anew
        keeps = not (torch.is_grad_enabled() or needs_dispatch() or is_capturing(self.devices))
        column = shared_column(stored.name, value, self.devices, takers, True, self.copies[key] if keeps else {})
        return [x if seen else None for x, seen in zip(column, stored.seen, strict=True)]

    # -- the step -----------------------------------------------------------------------------------------------------

    def take(
        self,
        params: Sequence[torch.Tensor],
        columns: Columns,
        grads: Sequence[torch.Tensor | None],
        states: Sequence[dict[str, Any]],
        options: Sequence[Mapping[str, Any]],
        extra: Mapping[str, Any],
        first: frozenset[int],
        journal: Journal,
    ) -> Outcome:
        """Takes the step, which has begun. `completed` tells whether everything has been written.

        Args:
          params: the parameters, or tensors that stand for them.
          columns: the slots; see `columns`.
          grads: the gradients.
          states: the state of each parameter.
          options: mappings that hyper-parameters are looked up in.
          extra: the extra arguments.
          first: the parameters that take their first step.
          journal: takes note of entries of state that are replaced.

        Returns:
          `"taken"`; or, if nothing has been done, `"gone"` if a gradient or an entry is gone that was there, and
          `"sparse"` if a gradient is sparse.

        Raises:
          ValueError, TypeError, RuntimeError: something does not fit.
        """
        lacking = sorted(self.needed - extra.keys()) if self.needed else []
        if lacking:
            raise TypeError(f"`{lacking[0]}` is needed: call `step(closure, {lacking[0]}=...)`.")
        for name, rule in self.extras.needed.items():
            check_no_tree(name, rule, extra.get(name))
        given: Columns = {
            (-1, name): self._extra_column(name, rule, extra[name]) for name, rule in self.extras.columns.items()
        }
        if self.guarded and (self.opaque or any(stage.leafwise for stage in self.regions)):
            raise ValueError(
                "gradients that are still multiplied by a loss scale reach transformations that torch operations "
                "compute; unscale them before the step."
            )
        if self.dtensors and torch.is_grad_enabled():
            raise RuntimeError(
                f"{self.names[self.dtensors[0]]} is a DTensor, whose local tensor is written to, so that autograd "
                f"cannot record the step; use differentiable=False, or the functions of a transformation."
            )
        if self.spans_tree and len(self.names) == 1 and in_backward():
            raise RuntimeError(
                "this chain reduces over the whole tree, so it needs the gradients of all parameters at once, but it "
                "was given one parameter while its gradient is computed; call `step` after the backward pass."
            )
        if self.runs_python:
            options = list(options)  # another object, for Python code within the step may change options
        own: Columns = {"updates": grads, "params": params, **columns, **given}
        if self.wrapped:
            own |= {k: self._local(k, x, placed_like, f"the extra argument `{k[1]}` for") for k, x in given.items()}
            known = self._known_local("updates", grads)
            # a region finds sparse gradients when it reads tensors
            if (known is None or len(self.stages) > 1) and any(
                g is not None and g.layout is not torch.strided for g in map(grads.__getitem__, self.dtensors)
            ):
                return "sparse"
            own["updates"] = known or self._local("updates", grads, placed_like, "the gradient of")
            own["params"] = self._local("params", params)
        watched = self.runs_python and not needs_dispatch()
        steady = False  # whether parameters have the specs of the last step
        if watched:
            watch = SpecWatch.of(self.watch, own["params"], self.present)
            steady, self.watch = watch is self.watch, watch
        for stage in self.stages:
            if stage.entered is not None:
                own[stage.entered] = own["updates"]
            if isinstance(stage, Opaque):
                own["updates"], entries = self._call(stage, own, params, states, extra)
                by_name, captures = dict(zip(self.names, states, strict=True)), self._captures()
                for name, key, x in entries:
                    self._put(by_name[name], key, x, journal, captures)
                continue
            for name, (schedule, _) in stage.region.hosts.items():
                refuse_host_schedule(name, self.devices)
                held = [state.get("step") for state in states]
                counts = [None if x is None else int(x) for x in held]
                own[name] = host_column(name, schedule, counts, self.devices)
            if watched and (stage.region.hosts or stage is not self.stages[0]):  # Python code has run
                own["params"] = self._local("params", params)
                if not self.watch.holds(own["params"]):
                    raise RuntimeError(CHANGED_MESSAGE)
                own |= self.columns(states) or {}
            last = stage is self.stages[-1]
            results = self._run(stage, own, states, options, extra, first, journal, last, steady)
            if results is None:
                sparse = any(g is not None and g.layout is not torch.strided for g in grads)
                return "sparse" if sparse else "gone"
            if last and results:
                self._write(stage, own, results, states, journal)
            elif not last:
                own["updates"] = results.pop("updates", own["updates"])
                self._replace(stage, results, own, states, journal)
        if self.dtensors:
            torch.autograd.graph.increment_version([params[i] for i in self.dtensors])
        self.done = True
        return "taken"

    def _extra_column(self, name: str, rule: str, x: Any) -> list[Any]:
        """An extra argument that is one tensor per parameter, as a column.

        Args:
          name: its name.
          rule: a rule that takes it.
          x: a list in the order of the parameters, or a dict by their names or by the parameters themselves.

        Raises:
          ValueError: it does not go with the parameters.
        """
        check_no_number(name, rule, x, "a list, or a dict by name or by parameter")
        if isinstance(x, Mapping):
            known = {key: i for i, p in enumerate(self.params.tensors) for key in (self.names[i], p)}
            unknown = next((key for key in x if key not in known), None)
            if unknown is not None:
                shown = "a tensor" if isinstance(unknown, torch.Tensor) else repr(unknown)
                raise ValueError(
                    f"the extra argument `{name}` has the key {shown:.80}, which is no parameter of the optimizer; "
                    f"there are {', '.join(map(repr, self.names[:5]))}{' ...' if len(self.names) > 5 else ''}."
                )
            entries = {known[key]: tensor for key, tensor in x.items()}
            return [entries.get(i) for i in range(len(self.names))]
        if not isinstance(x, Sequence) or isinstance(x, str):
            raise ValueError(
                f"the extra argument `{name}` is {type(x).__name__} {x!r:.60}, but {rule} takes a list, or a dict by "
                f"name or by parameter, a tensor for each."
            )
        if len(x) != len(self.names):
            raise ValueError(
                f"the extra argument `{name}` has {len(x)} entries, but the optimizer has {len(self.names)} "
                f"parameters; give None for one that has none."
            )
        return list(x)

    def begin(self) -> None:
        """Begins a step, of which nothing has been written."""
        self.done, self.workspace = False, None

    @property
    def completed(self) -> bool:
        """Whether everything of the last step has been written."""
        return self.done or (self.workspace is not None and self.workspace.completed)

    def _local(self, key: Key, tensors: Sequence[Any], place: Placer | None = None, name: str = "") -> Sequence[Any]:
        """The plain real tensors that hold the elements of a column.

        Args:
          key: the column.
          tensors: a tensor per parameter.
          place: conversion of a DTensor that may be placed otherwise than its parameter.
          name: the beginning of the name of a tensor in messages.
        """
        if not self.wrapped:
            return tensors
        found = self._known_local(key, tensors)
        if found is not None:
            return found
        column = list(tensors)
        if place is not None:
            for i in self.dtensors:
                if column[i] is not None:
                    column[i] = place(column[i], self.params.tensors[i], f"{name} {self.names[i]!r}")
        self.locals.remember(key, column, self.dtensors)
        for i in self.wrapped:
            column[i] = tensor_of(column[i])
        return column

    def _known_local(self, key: Key, tensors: Sequence[Any]) -> list[Any] | None:
        """The local tensors of a column that is placed as it was before."""
        return self.locals.find(key, tensors) if self.dtensors and not self.complex else None

    def _run(
        self,
        stage: ParamRegion,
        own: Columns,
        states: Sequence[dict[str, Any]],
        options: Sequence[Mapping[str, Any]],
        extra: Mapping[str, Any],
        first: frozenset[int],
        journal: Journal,
        in_place: bool,
        steady: bool,
    ) -> Columns | None:
        """Runs a region: the columns that change, none if they are written in place; None if a tensor is gone."""
        if (
            stage.leafwise is not None
            and steady
            and not self.wrapped
            and not ("step" in own and any(own["step"][i] is None for i in stage.leafwise.leaves))
            and stage.leafwise.fits(own)
        ):
            self._mend_counters(own, states, journal)
            return self._run_leafwise(stage, stage.leafwise, own, options, extra, first, fits=True)
        dispatching = needs_dispatch()
        variant = Variant(in_place, requested_backend(), first if stage.first_slots else frozenset())
        found = None if dispatching or stage.leafwise else stage.find(own, variant)
        if found is None:
            if any(u is None or u.layout is not torch.strided for u in (own["updates"][i] for i in self.present)):
                return None
            if any(own[s.key][i] is None and s.seen[i] for s in stage.region.stored for i in self.present):
                return None
            for i in self.present:
                u = check_leaf("updates", self.names[i], own["updates"][i])
                p = check_leaf("params", self.names[i], own["params"][i])
                check_fit("updates", "parameter", self.names[i], u, p)
            self._mend_counters(own, states, journal)
            if stage.leafwise is not None:
                return self._run_leafwise(stage, stage.leafwise, own, options, extra, first)
            leaves = stage.leaves(own, self.params.groups, variant.first, self.numels, self.shards)
            if dispatching:
                programs = stage.programs(own, leaves)
                return programs.evaluate(own, programs.numbers(options, extra))
            found = stage.bind(own, variant, leaves)
        bound, reading = found
        numbers: Numbers = bound.numbers(options, extra)
        if torch.is_grad_enabled() and bound.requires_grad(reading, numbers):
            bound.release(reading)
            return bound.evaluate(own, numbers)
        self.workspace = reading.workspace if in_place else None
        return bound.run(reading, own, numbers)

    def _run_leafwise(
        self,
        stage: ParamRegion,
        rule: LeafwiseStep,
        own: Columns,
        options: Sequence[Mapping[str, Any]],
        extra: Mapping[str, Any],
        first: frozenset[int],
        fits: bool = False,
    ) -> Columns:
        """Runs a rule for whole tensors. Of a tensor in parts every process gathers all, and keeps its part."""
        parts = [i for i in rule.leaves if self.shards[i] is not None]
        if not parts:
            return rule.compute(own, extra, options, self.params.groups, first, fits)
        params = self.params.tensors
        like_leaf = {"updates", *(s.key for s in stage.region.stored if s.slot is not None and s.slot.like_leaf)}
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

    def _write(
        self, stage: ParamRegion, own: Columns, results: Columns, states: Sequence[dict[str, Any]], journal: Journal
    ) -> None:
        """Writes the results of a last region that was not computed in place, because autograd records it."""
        if torch.is_grad_enabled() and not self.wrapped:
            # autograd may have kept the old tensor for the derivative of an earlier step
            self._replace(stage, {key: x for key, x in results.items() if key != "params"}, own, states, journal)
            results = {"params": results["params"]} if "params" in results else {}
        for key, column in results.items():
            for i in self.present:
                if column[i] is not own[key][i]:
                    own[key][i].copy_(column[i])

    def _replace(
        self, stage: ParamRegion, results: Columns, own: Columns, states: Sequence[dict[str, Any]], journal: Journal
    ) -> None:
        """Puts new tensors in the place of the entries of a region's slots."""
        wrapped, captures = set(self.wrapped), self._captures()
        for stored in stage.region.stored:
            if stored.key not in results:
                continue
            key = stage.keys[stored.key]
            if key in self.shared:
                first = self.takers[key][0]
                if stored.seen[first]:  # all have computed the same
                    for i in self.shared[key]:
                        if key in states[i]:
                            self._put(states[i], key, results[stored.key][first], journal, captures)
                continue
            plain = stored.slot is not None and not stored.slot.like_leaf
            for i in self.present:
                x = results[stored.key][i]
                if x is not own[stored.key][i]:
                    new = x if plain or i not in wrapped else _like(x, self.params.tensors[i])
                    self._put(states[i], key, new, journal, captures)

    def _captures(self) -> bool:
        """Whether a CUDA graph is being captured, whose replays go on from the state that there is."""
        return not torch.is_grad_enabled() and is_capturing(self.devices)

    def _put(self, state: dict[str, Any], key: str, new: Any, journal: Journal, captures: bool) -> None:
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

    def _call(
        self,
        stage: Opaque,
        own: Columns,
        params: Sequence[torch.Tensor],
        states: Sequence[dict[str, Any]],
        extra: Mapping[str, Any],
    ) -> tuple[list[Any], list[tuple[str, str, Any]]]:
        """Calls a transformation that is not made of rules: its updates, and the new entries of its state."""
        link, split = stage.link, self.opaque[stage.position]
        updates = list(own["updates"])
        for i in self.wrapped:
            updates[i] = None if updates[i] is None else _like(updates[i], params[i])
        view = View(self.view.spec, tuple(updates), link.seen)
        state = split.gather(dict(zip(self.names, states, strict=True)))
        tree, new_state = call_opaque(link.tx, view.tree(), state, view.tree(params), extra)
        found = updates_of(link, tree, updates, self.reader)
        found = list(self._local((stage.position, "update"), found, placed_like, "the update that was returned for"))
        check_updates(link, found, own["params"], self.names, self.present)
        present = [self.names[i] for i in self.present if link.seen[i]]
        return found, split.entries(new_state, present)


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
