"""Segments of a chain over leaves: regions with the steps that they are bound to, and the step that takes them in turn.

That step is `TreeStep` over trees and `ParamStep` over parameters of optimizers, which keep their state in two ways.
"""

import abc
from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import torch

from ._compiler.fuse import extra_key
from ._extras import Extras
from ._foreign import SpecWatch
from ._leafwise import LeafwiseStep
from ._packed import Form
from ._regions import Opaque, Region
from ._runtime.binding import Binding
from ._runtime.checks import at, check_fit, check_slot, find_freed, refuse_freed
from ._runtime.cuda.capture import (
    CaptureError,
    NumberWatch,
    can_capture,
    is_capturing,
    refuse_binding,
    refuse_host_schedule,
    refuse_other_devices,
)
from ._runtime.groups import Columns, Key, Leaf
from ._runtime.internals import MapLevel
from ._runtime.join import Joins
from ._runtime.members import MembersReading, MembersStep
from ._runtime.packed_step import PackedStep
from ._runtime.packing import PackedColumn
from ._runtime.programs import NoKernels, Programs
from ._runtime.recent import in_front
from ._runtime.shard import MeshShard
from ._runtime.spec import TensorSpec, specs_of
from ._runtime.step import BoundStep, Reading
from ._tree import MaskedNode


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


def packed_forms(columns: Collection[Any]) -> tuple[Form | None, ...]:
    """The form of each column that is packed, and None for others; nothing if none is."""
    if PackedColumn not in map(type, columns):
        return ()
    return tuple([x.packed.form if type(x) is PackedColumn else None for x in columns])


class BoundRegion:
    """A region over the leaves of a tree, and the steps that it is bound to: one for each set of specs.

    Args:
      region: the region.
      paths: the path of each leaf.
      present: the leaves that take part.
      leafwise: the rule for whole tensors that the region is, if it is one.
      owners: whose options each leaf looks up; None if there are no options.
      numels: the number of elements of each leaf, those in other processes counted; None if its update has all.
      shards: the processes that have other parts of each leaf; None if no leaf has any.
      joins: the reductions over processes, if there are any.

    Attributes:
      counters: columns of counters that all leaves share, and that the region moves on.
      uses_first: the positions of rules to which a first step makes a difference.
      bound_steps: the steps that were used last, each with its variant; the last one in front.
      members_steps: the same of ensembles.
      entered: the column in which the updates that enter it are kept; see `Region`.
    """

    KEEP = 8  # steps, and steps of ensembles

    def __init__(
        self,
        region: Region,
        paths: Sequence[str],
        present: Sequence[int],
        leafwise: LeafwiseStep | None,
        owners: Sequence[int] | None = None,
        numels: Sequence[int] | None = None,
        shards: Sequence[MeshShard | None] | None = None,
        joins: Joins | None = None,
    ) -> None:
        self.region, self.paths, self.present, self.leafwise = region, paths, present, leafwise
        self.owners, self.numels, self.shards, self.joins = owners, numels, shards, joins
        self.counters: list[Key] = []
        self.uses_first = {k for k, bound in region.bound_rules.items() if bound.rule.uses_first}
        self.bound_steps: list[tuple[Variant, BoundStep]] = []
        self.members_steps: list[tuple[Variant, MembersStep]] = []
        self.entered = region.entered

    def find(self, own: Columns, variant: Variant) -> tuple[BoundStep, Reading] | None:
        """A step that is bound to such tensors, and these tensors read.

        Args:
          own: all tensors that the programs read.
          variant: the part of the binding that they do not show.

        Returns:
          The step and the reading; None if no step is bound to such tensors.

        Raises:
          ValueError: the storage of a tensor has been freed or cut.
        """
        for entry in self.bound_steps:
            known, bound = entry
            if known != variant or (bound.unread_params and not bound.fits_unread_params(own)):
                continue
            found = bound.read(own)
            if isinstance(found, Reading):
                if entry is not self.bound_steps[0]:
                    self.bound_steps = in_front(entry, self.bound_steps, self.KEEP)
                return bound, found
            if found.outside:
                self._refuse_freed(own, *bound.name_of(found.position))
        return None

    def bind(self, own: Columns, variant: Variant, leaves: Sequence[Leaf]) -> tuple[BoundStep, Reading]:
        """Binds the programs to tensors, and reads these.

        Args:
          own: all tensors that the programs read.
          variant: the part of the binding that they do not show.
          leaves: the leaves that programs compute.
        """
        binding = Binding(leaves, self.specs(own), own, self.paths, variant.in_place, self.counters, self.joins)
        try:
            bound = PackedStep(binding) if any(variant.forms) else BoundStep(binding)
        except NoKernels:
            bound = BoundStep(binding)
        self.bound_steps = in_front((variant, bound), self.bound_steps, self.KEEP)
        found = bound.read(own)
        if not isinstance(found, Reading):
            assert found.outside, "a step is bound to the tensors that it was made for"
            self._refuse_freed(own, *bound.name_of(found.position))
        return bound, found

    def leaves(self, own: Columns, first: frozenset[int] = frozenset()) -> list[Leaf]:
        """The leaves that programs compute. Leaves that no rule sees are left alone, unless updates are added to them.

        Args:
          own: all tensors that the programs read.
          first: the leaves that take their first step.

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
                (kinds[i], self.owners[i] if self.owners else 0, i in first),
                self.numels[i] if self.numels else own["updates"][i].numel(),
                self.shards[i] if self.shards else None,
            )
            for i in self.present
            if kinds[i][0] or self.region.apply
        ]

    def _check_extra(self, name: str, rule: str, i: int, own: Columns) -> None:
        """Refuses an entry of an extra argument that does not go with its leaf."""
        x = own[extra_key(name)][i]
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

    def _refuse_freed(self, own: Columns, name: str, leaf: int) -> NoReturn:
        refuse_freed(name, self.paths[leaf], own["updates"][leaf].shape)

    def find_members(
        self,
        own: Columns,
        variant: Variant,
        levels: Sequence[MapLevel],
        extra: Mapping[str, Any],
        given: Mapping[int, torch.Tensor],
    ) -> tuple[MembersStep, MembersReading] | None:
        """A step of an ensemble that is bound to such tensors, and these tensors read; see `bind_members`.

        Raises:
          ValueError: the storage of a tensor has been freed or cut.
        """
        sizes = tuple(level.size for level in levels)
        for entry in self.members_steps:
            known, bound = entry
            if bound.sizes != sizes or known != variant or (bound.unread_params and not bound.fits_unread_params(own)):
                continue
            found = bound.read(own, bound.numbers((), extra, given), levels)
            if isinstance(found, MembersReading):
                if entry is not self.members_steps[0]:
                    self.members_steps = in_front(entry, self.members_steps, self.KEEP)
                return bound, found
            if found is not None and found.outside:
                self._refuse_freed(own, *bound.name_of(found.position))
        return None

    def bind_members(
        self,
        own: Columns,
        variant: Variant,
        levels: Sequence[MapLevel],
        leaves: Sequence[Leaf],
        counters: Set[Key],
        extra: Mapping[str, Any],
        given: Mapping[int, torch.Tensor],
    ) -> tuple[MembersStep, MembersReading] | None:
        """Binds the programs to the tensors of an ensemble, and reads these; None if kernels do not compute them.

        Args:
          own: all tensors that the programs read, as they are within `vmap`.
          variant: the kind of step.
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
        self.members_steps = in_front((variant, bound), self.members_steps, self.KEEP)
        return self.find_members(own, variant, levels, extra, given)

    def forget_members(self, bound: MembersStep) -> None:
        """Lets go of a step whose kernels cannot be built."""
        self.members_steps = [entry for entry in self.members_steps if entry[1] is not bound]

    def check_memory(self, own: Columns) -> None:
        """Refuses tensors without memory, which operations of torch would read.

        Raises:
          ValueError: the storage of a tensor has been freed or cut.
        """
        found = find_freed(own)
        if found is not None:
            key, leaf = found
            names = {stored.key: stored.name for stored in self.region.stored}
            name = key if isinstance(key, str) else f"the extra argument `{key[1]}`"
            self._refuse_freed(own, names.get(key, name), leaf)


RegionT = TypeVar("RegionT", bound=BoundRegion)
InputsT = TypeVar("InputsT")


class SegmentedStep(abc.ABC, Generic[RegionT, InputsT]):
    """A step over leaves of which the same ones take part, segment by segment.

    Trees and optimizers keep state in two ways, which `_run` and `_call` know.

    Args:
      segments: the segments.
      devices: the devices of the leaves that take part.
      extras: the extra arguments that are taken.

    Attributes:
      regions: the segments that are regions.
      traced: the regions with functions that have been traced, and refer to something that may change.
      runs_python: whether code of the caller runs between the first look at tensors and the last launch.
      looks_ahead: whether a step that a CUDA graph could not replay may show so behind its first launch.
      number_watch: the numbers of the last step that was not captured.
      params_watch, updates_watch: the specs of the last step, where code of the caller runs.
    """

    def __init__(self, segments: Sequence[RegionT | Opaque], devices: set[torch.device], extras: Extras) -> None:
        self.segments, self.devices, self.extras = segments, devices, extras
        self.regions = [segment for segment in segments if not isinstance(segment, Opaque)]
        self.traced = [segment.region for segment in self.regions if segment.region.traced]
        by_python = [bool(segment.region.host_schedules or segment.leafwise) for segment in self.regions]
        self.runs_python = any(by_python) or len(self.regions) < len(segments)
        self.looks_ahead = (len(segments) > 1 or len(devices) > 1) and can_capture(devices)
        self.number_watch = NumberWatch()
        self.params_watch, self.updates_watch = SpecWatch((), ()), SpecWatch((), ())

    @abc.abstractmethod
    def _run(self, segment: RegionT, columns: Columns, inputs: InputsT, last: bool) -> bool:
        """Runs a region; whether the leaves are there that were before. See `_take_segments`."""

    @abc.abstractmethod
    def _call(self, segment: Opaque, columns: Columns, inputs: InputsT) -> Sequence[Any]:
        """Calls a transformation that is not made of rules: its updates, with its new state put in place."""

    def _take_segments(self, columns: Columns, inputs: InputsT) -> bool:
        """Takes the step, segment by segment: new updates and parameters take the places of those in `columns`.

        Returns:
          Whether the leaves are there that were before. If not, nothing has been written.
        """
        began = False
        try:
            for segment in self.segments:
                if segment.entered is not None:  # for a rule of a later region, which wraps some from here on
                    columns[segment.entered] = columns["updates"]
                if isinstance(segment, Opaque):
                    columns["updates"] = self._call(segment, columns, inputs)
                elif not self._run(segment, columns, inputs, segment is self.segments[-1]):
                    return False
                began = True
        except CaptureError as error:
            if began:
                raise error.behind_a_part() from None
            raise
        return True

    def _look_ahead(
        self, options: Sequence[Mapping[str, Any]], extra: Mapping[str, Any], given: Mapping[int, torch.Tensor]
    ) -> None:
        """Refuses a step of several parts that a CUDA graph could not replay, before the first one is captured.

        Raises:
          CaptureError: a stream is capturing, and a graph could not replay the step.
        """
        if is_capturing(self.devices):
            refuse_other_devices(self.devices)
            for segment in self.regions:
                for name in segment.region.by_python:
                    refuse_host_schedule(name, self.devices)
                if not (segment.bound_steps or segment.leafwise):
                    refuse_binding(self.devices)
        found = [x.region.hypers(x.present, x.owners, options, extra) for x in self.regions]
        self.number_watch.check([given.get(id(x), x) for hypers in found for x in hypers], self.devices)
