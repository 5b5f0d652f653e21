"""One step of the pure API: trees are read as columns, programs run on them, trees are made of the results.

The first step over trees of some structure binds the transformation to them; later ones find what was bound on the
transformation itself, and only have their tensors compared.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ._compiler.errors import ShortTracebacks
from ._compiler.fuse import extra_key
from ._extras import check_no_number, extras_of
from ._followed import run_followed
from ._foreign import CHANGED_MESSAGE, SpecWatch, call_opaque, check_updates, host_column, value_of_members
from ._leafwise import LeafwiseStep
from ._opaque import check_apart
from ._recorded import requires_gradient, warn_of_growth
from ._regions import LeafwiseRegion, Opaque, Region, cut_into_regions
from ._runtime.autograd import can_record, record
from ._runtime.backend import REPLACED, REQUESTED, refuse_replacement
from ._runtime.checks import at
from ._runtime.cuda.capture import refuse_host_schedule, refuse_new_trees, refuse_other_devices
from ._runtime.groups import Columns, Key
from ._runtime.internals import is_wrapper_of_a_transformation, map_levels, needs_dispatch, takes_gradients
from ._runtime.numbers import Numbers
from ._runtime.overlap import SharedMemoryError
from ._runtime.packing import PackedColumn
from ._runtime.recent import in_front
from ._runtime.stacks import different_numbers
from ._runtime.step import BoundStep, Reading
from ._segments import BoundRegion, SegmentedStep, Variant, packed_forms
from ._stand_ins import stand_in_of
from ._state import StateReader, get_state, set_states
from ._state_nodes import check_state
from ._structures import with_aliases
from ._transform import GradientTransformation, Link, Path
from ._tree import Spec, Tree, View, flatten
from ._tree_leaves import TreeLeaves, present_in


KEEP = 8  # trees that a transformation is bound to at once


class TreeRegion(BoundRegion):
    """A region over the leaves of a tree, with its state.

    Args:
      region: the region.
      leaves: the leaves of the tree.
      device: the device of all leaves that take part; None if there are several.

    Attributes:
      state_reader: reads its states as columns.
      moving: the positions of rules whose counter a step moves on: they see a leaf that takes part.
    """

    def __init__(self, region: Region, leaves: TreeLeaves, device: torch.device | None) -> None:
        rule = LeafwiseStep(region, leaves.paths, leaves.present) if isinstance(region, LeafwiseRegion) else None
        super().__init__(region, leaves.paths, leaves.present, rule)
        self.state_reader = StateReader(region, leaves.reader, device, leaves.present)
        self.moving = [k for k in self.state_reader.counted if any(region.links[k].seen[i] for i in leaves.present)]
        self.counters = [(k, "count") for k in self.moving]

    def host_columns(self, columns: Columns, states: Mapping[int, Any]) -> Columns:
        """The values of schedules that Python evaluates, as columns."""
        found: Columns = {}
        for host in self.region.host_schedules:
            count = states[host.counter[0]].count  # type: ignore[index]
            refuse_host_schedule(host.name, [count.device])
            devices = [x.device if isinstance(x, torch.Tensor) else None for x in columns["updates"]]
            levels = map_levels() if is_wrapper_of_a_transformation(count) else ()
            if levels:
                value = value_of_members(host, count, different_numbers(count, levels))
                found[host.column] = [None if device is None else value for device in devices]
                continue
            count = 0 if count.is_meta else int(count)
            found[host.column] = host_column(host, [count] * len(devices), devices)
        return found


class TreeInputs(NamedTuple):
    """Arguments of one step over trees, and the specs and dispatch that it found at its start.

    Args:
      state: the state.
      like: the tree whose containers results have.
      extra: the extra arguments.
      extra_numbers: the extra arguments that are numbers.
      donate: whether to write in place.
      given: tensors in the place of those that hyper-parameters have, by identity.
      dispatching: whether torch looks at each operation, as transformations of `torch.func` do.
      watch: the specs that parameters have to keep, where Python code runs within the step.
      new_states: the states that segments have replaced so far, by path.
    """

    state: Any
    like: Tree
    extra: Mapping[str, Any]
    extra_numbers: Mapping[str, Any]
    donate: bool
    given: Mapping[int, torch.Tensor]
    dispatching: bool
    watch: SpecWatch | None
    new_states: dict[Path, Any]


class TreeStep(TreeLeaves, SegmentedStep[TreeRegion, TreeInputs]):
    """A transformation over trees of one structure in which the same leaves are there.

    Args:
      tx: the transformation.
      apply: whether to add the updates to the parameters.
      updates: the updates.
      params: the parameters, if there are any.

    Attributes:
      seen: the leaves that each transformation sees.
      asks_leaves: whether a mask is a function, which may choose other leaves at the next step.
      containers: the nodes of the state that hold others.
      widens: whether new updates have yet to be made as wide as parameters.

    Raises:
      ValueError, TypeError: the trees do not fit.
    """

    def __init__(self, tx: GradientTransformation, apply: bool, updates: Tree, params: Tree | None) -> None:
        self.tx, self.apply = tx, apply
        TreeLeaves.__init__(self, updates, params)
        links = tx._links(self.view_of(self.reader(updates if params is None else params)), ())
        self._check_params(links)
        self.seen, self.asks_leaves = _seen(links), tx._asks_leaves()
        segments = cut_into_regions(links, apply, len(self.paths))
        device = next(iter(self.devices)) if len(self.devices) == 1 else None
        self.containers = [node for node in tx._state_nodes(()) if node.is_container]
        regions = [
            TreeRegion(segment, self, device) if isinstance(segment, Region) else segment for segment in segments
        ]
        SegmentedStep.__init__(self, regions, self.devices, extras_of(segments))
        # kernels make updates as wide as parameters; torch operations leave them as they were
        by_torch = bool(segments) and isinstance(segments[-1], (Opaque, LeafwiseRegion))
        self.widens = self.with_params and not apply and by_torch

    def _check_params(self, links: Sequence[Link]) -> None:
        """Refuses rules that need parameters where there are none."""
        for link in links:
            if not self.with_params and link.bound is not None and link.bound.rule.uses_params:
                raise ValueError(f"{link.bound.rule.name} needs the parameters: call `update(updates, state, params)`.")

    def columns(self, updates: Tree, params: Tree | None) -> Columns | None:
        """The leaves of trees, if they have the structure that this step is for and the same leaves are there."""
        if (params is not None) is not self.with_params:
            return None
        if self.traced and not all(region.is_current for region in self.traced):
            return None
        try:
            columns: Columns = {"updates": self.reader(updates)}
            if params is not None:
                columns["params"] = self.reader(params)
        except (ValueError, TypeError):
            return None
        some_are_absent = len(self.present) < len(self.paths)
        if (some_are_absent or self.runs_python) and present_in(columns) != self.present:
            return None
        # before Python code is handed a tree of another structure
        if self.runs_python and self.has_containers(columns):
            return None
        return columns

    def sees_the_same(self, columns: Columns) -> bool:
        """Whether masks that are functions choose the leaves that they chose when this step was made."""
        leaves = columns["params" if self.with_params else "updates"]
        return _seen(self.tx._links(self.view_of(leaves), ())) == self.seen

    def take(
        self,
        columns: Columns,
        state: Any,
        like: Tree,
        extra: Mapping[str, Any],
        donate: bool,
        given: Mapping[int, torch.Tensor],
    ) -> tuple[Tree, Any] | None:
        """Takes the step on leaves.

        Args:
          columns: the leaves.
          state: the state.
          like: the tree whose containers results have.
          extra: the extra arguments.
          donate: whether to write in place.
          given: tensors in the place of those that hyper-parameters have, by identity.

        Returns:
          The new parameters, or updates, and the new state; None if a leaf is there or gone that was not before.

        Raises:
          ValueError, TypeError, RuntimeError: something does not fit; nothing has been written.
        """
        takes, dispatching = self.extras, needs_dispatch()
        extra_numbers = takes.extra_numbers(extra) if extra or takes.needed or takes.trees else extra
        if takes.trees:
            columns |= self._extra_columns(extra)
        if donate and dispatching:
            raise RuntimeError(
                "donate=True writes in place, which a torch.func transformation cannot follow, nor forward-mode AD or "
                "a dispatch mode; use donate=False inside of it, or take the step outside."
            )
        if donate and len(self.segments) > 1:
            refuse_new_trees(columns["updates"][self.present[0]].device if self.present else None)
        for node in self.containers:
            found = state
            for key in node.path:
                found = found[key]
            # a tuple, as nearly all are, is looked at without a call
            if not (node.kind is tuple and type(found) is tuple and len(found) == len(node.keys)):
                check_state([node], state)
        watch = None
        if self.runs_python and not dispatching and self.with_params:
            now = columns["params"]
            watch = self.params_watch = SpecWatch.of(self.params_watch, now, self.present, "params", self.paths)
        if self.looks_ahead and not dispatching:
            self._look_ahead((), extra_numbers, given)
        elif self.looks_ahead:
            refuse_other_devices(self.devices)
        inputs = TreeInputs(state, like, extra, extra_numbers, donate, given, dispatching, watch, {})
        before = columns["updates"]
        if not self._take_segments(columns, inputs):
            return None
        if self.widens:
            columns["updates"] = _as_wide(before, columns)
        leaves = columns["params" if self.apply else "updates"]
        tree = like if donate else self.reader.rebuild(like, leaves)
        return tree, set_states(state, inputs.new_states) if inputs.new_states else state

    def _extra_columns(self, extra: Mapping[str, Any]) -> Columns:
        """The extra arguments that are trees, as columns.

        Raises:
          ValueError: one does not have the structure of the parameters.
        """
        for name, rule in self.extras.trees.items():
            check_no_number(name, rule, extra[name], "a tree like the parameters", self.spec.is_leaf())
        return {
            extra_key(name): self.read_as(f"the extra argument `{name}`", extra[name]) for name in self.extras.trees
        }

    def _run(self, segment: TreeRegion, columns: Columns, inputs: TreeInputs, last: bool) -> bool:
        in_place = inputs.donate and last
        states = segment.state_reader.states(inputs.state)
        own = segment.state_reader.columns(states, columns, in_place)
        if segment.region.host_schedules:
            own |= segment.host_columns(columns, states)
        if inputs.watch is not None and not inputs.watch.holds(columns["params"]):
            raise RuntimeError(CHANGED_MESSAGE)
        results = self._compute(segment, own, states, inputs, in_place)
        if results is None:
            return False
        if not in_place:
            if self.absent and torch.is_grad_enabled():
                results = self._with_aliases(own, results)
            columns |= {name: results[name] for name in columns if name in results}
            inputs.new_states.update(
                segment.state_reader.replaced(states, {**own, **results}, inputs.like, segment.moving)
            )
        return True

    def _compute(
        self, segment: TreeRegion, own: Columns, states: Mapping[int, Any], inputs: TreeInputs, in_place: bool
    ) -> Columns | None:
        """Computes a region.

        Args:
          segment: the region.
          own: all tensors that it reads.
          states: its states, by position of the transformation.
          inputs: the arguments of the step.
          in_place: whether to write in place.

        Returns:
          The columns that change, none of them if the step is in place; None, and nothing is done, if other leaves are
          there than before.
        """
        rule, extra = segment.leafwise, inputs.extra_numbers
        if rule is not None:
            kinds = rule.known_kinds(own)
            if kinds is None:
                if not self.has_its_leaves(own):
                    return None
                self.check_leaves(own)
            return rule.compute(own, extra, kinds=kinds)
        if inputs.dispatching:
            counters: set[Key] = {(k, "count") for k in segment.state_reader.counted}
            return run_followed(segment, self, counters, own, extra, inputs.given)
        variant = Variant(in_place, REQUESTED.get(), forms=packed_forms(own.values()))
        if variant.backend == "reference" and REPLACED.get():
            self.check_backend(own["updates"], segment.leaves(own))
        found = segment.find(own, variant)
        if found is None:
            if not self.has_its_leaves(own):
                return None
            self.check_leaves(own)
            found = segment.bind(own, variant, segment.leaves(own))
        bound, reading = found
        numbers = bound.numbers((), extra, inputs.given)
        if torch.is_grad_enabled() and bound.requires_grad(reading, numbers):
            bound.release(reading)
            if in_place:
                self._refuse_donation(own)
            self._warn_of_recording(own, numbers)
            if variant.forms:
                bound = self._bound_to_views(segment, own, variant._replace(forms=()))
            if can_record(bound):
                return record(bound, own, numbers)
            refuse_replacement(variant.backend, "autograd")
            return bound.evaluate_reference(own, numbers)
        if in_place:
            return self._run_in_place(segment, found, own, numbers, states)
        return bound.run(reading, own, numbers)

    @staticmethod
    def _bound_to_views(segment: TreeRegion, own: Columns, variant: Variant) -> BoundStep:
        """The step that is bound to each view of packed trees by itself, as autograd follows them."""
        bound, reading = segment.find(own, variant) or segment.bind(own, variant, segment.leaves(own))
        bound.release(reading)
        return bound

    def _refuse_donation(self, own: Columns) -> None:
        """Refuses to write to tensors of a step that autograd records, by the path of one that requires a gradient."""
        path = next(
            (self.paths[i] for i in self.present for x in (own["params"][i], own["updates"][i]) if x.requires_grad),
            None,
        )
        subject = "a hyper-parameter or a tensor of the state" if path is None else f"params{at(path)} or its update"
        raise RuntimeError(
            f"{subject} requires a gradient, and donate=True would write to it while autograd is recording; wrap the "
            f"step in `torch.no_grad()`, or use donate=False to differentiate through it."
        )

    def _warn_of_recording(self, own: Columns, numbers: Numbers) -> None:
        """Warns where autograd records steps for nobody."""
        if "params" not in own:
            return
        others = [*own["updates"]]  # state has the graph of earlier steps, as parameters have
        others += [x for name in self.extras.trees for x in own[extra_key(name)]]
        others += [x for table in numbers for x in table]
        if not requires_gradient(others):
            warn_of_growth(own["params"], self.spec)

    def _run_in_place(
        self,
        segment: TreeRegion,
        found: tuple[BoundStep, Reading],
        own: Columns,
        numbers: Numbers,
        states: Mapping[int, Any],
    ) -> Columns:
        """Runs a region that is bound, and moves on the counters that no launch moves on."""
        bound, reading = found
        if len(segment.moving) > 1:
            self._check_counters(segment, states)
        params = own.get("params")
        if isinstance(params, PackedColumn) and params.packed.tied:
            torch.autograd.graph.increment_version(params.packed.tied)
        late = []  # counters that none of its programs reads, or of which it reads a copy
        for k in segment.moving:
            place = bound.counters.get((k, "count"))
            if place is None or bound.tensor_at(reading, place) is not states[k].count:
                late.append(states[k].count)
        before = list(map(torch.clone, late))
        try:
            for count in late:  # before the launch, which tells whether everything has been written
                count.add_(1)
            return bound.run(reading, own, numbers)
        except BaseException as error:
            if not reading.workspace.completed:
                for count, old in zip(late, before, strict=True):
                    count.copy_(old)
            if isinstance(error, SharedMemoryError):
                raise error.for_donation() from None
            raise

    @staticmethod
    def _check_counters(segment: TreeRegion, states: Mapping[int, Any]) -> None:
        """Refuses counters that share memory, which a step in place would count twice."""
        if len({states[k].count.data_ptr() for k in segment.moving}) < len(segment.moving):
            names = [segment.region.bound_rules[k].rule.name for k in segment.moving]
            raise ValueError(
                f"two of the counters `count` of {', '.join(names)} share memory, so donate=True would count twice; "
                f"make the state with `init`, or clone one of them."
            )

    def _with_aliases(self, columns: Columns, results: Columns) -> Columns:
        """The columns that change, without tensors that a recorded step leaves alone; see `with_aliases`."""
        # in buffers of a packed tree all tensors are new
        changed = [(key, new, columns[key]) for key, new in results.items() if not isinstance(new, PackedColumn)]
        if not requires_gradient(column[i] for _, column, _ in changed for i in self.absent):
            return results
        if not requires_gradient(column[i] for _, column, _ in changed for i in self.present):
            return results
        return {**results, **{key: with_aliases(column, old) for key, column, old in changed}}

    def _call(self, segment: Opaque, columns: Columns, inputs: TreeInputs) -> Sequence[Any]:
        link, before, params = segment.link, columns["updates"], columns.get("params", columns["updates"])
        if segment is self.segments[0]:  # leaves may have changed since the step was made; programs look at them anyway
            self.check_leaves(columns)
            if not inputs.dispatching:
                self.updates_watch = SpecWatch.of(self.updates_watch, before, self.present, "updates", self.paths)
        view = View(self.spec, tuple(params), link.seen)
        updates, new_state = call_opaque(
            link, view, before, get_state(inputs.state, link.path), self.with_params, inputs.extra, self.reader
        )
        check_updates(link, updates, params, self.paths, self.present)
        if inputs.donate and self.with_params:
            check_apart(link.tx, new_state, params)
        inputs.new_states[link.path] = new_state
        return updates


def _seen(links: Sequence[Link]) -> list[tuple[Path, tuple[bool, ...]]]:
    """The leaves that each transformation sees; one that sees none may be left out, so paths count."""
    return [(link.path, link.seen) for link in links]


def _as_wide(before: Sequence[Any], columns: Columns) -> list[Any]:
    """New updates in the wider dtype of each and its parameter; those of `before` are as they were given."""
    made = zip(before, columns["updates"], columns["params"], strict=True)
    return [
        u if u is old or not isinstance(u, torch.Tensor) else u.to(torch.promote_types(u.dtype, p.dtype))
        for old, u, p in made
    ]


def take_step(
    tx: GradientTransformation,
    apply: bool,
    updates: Tree,
    state: Any,
    params: Tree | None,
    extra: Mapping[str, Any],
    donate: bool,
) -> tuple[Tree, Any]:
    """Takes a step of a transformation.

    Args:
      tx: the transformation.
      apply: whether to add the updates to the parameters.
      updates: the updates.
      state: its state.
      params: the parameters.
      extra: extra arguments of `update`.
      donate: whether to write in place.

    Returns:
      The new parameters if `apply`, else the new updates; and the new state.
    """
    like = updates if params is None else params
    # the chain that keeps steps, perhaps for many like it, and the tensors that take the places of its own
    home, given = stand_in_of(tx) if tx._tensors else (tx, {})
    steps = home._tree_steps
    spec: Spec | None = None  # of `like`, where it is compared
    for step in steps:
        if step.apply is not apply:
            continue
        # a step that is donated as a whole returns its very arguments; any other returns trees whose containers are
        # those it was given. Of several steps the right one is found without errors, which show all tensors of a tree
        if (len(steps) > 1 or not donate or len(step.segments) > 1) and not step.reader.is_fixed(like):
            spec = flatten(like)[1] if spec is None else spec
            if spec != step.spec:
                continue
        columns = step.columns(updates, params)
        if columns is not None and (not step.asks_leaves or step.sees_the_same(columns)):
            done: tuple[Tree, Any] | None = step.take(columns, state, like, extra, donate, given)
            if done is not None:
                if step is not steps[0]:
                    home._tree_steps = in_front(step, steps, KEEP)
                return done
    with ShortTracebacks():
        step = TreeStep(home, apply, updates, params)
    columns = step.columns(updates, params)
    found = None if columns is None else step.take(columns, state, like, extra, donate, given)
    if found is None:
        raise RuntimeError(CHANGED_MESSAGE)
    if not needs_dispatch() or map_levels() or takes_gradients():
        home._tree_steps = in_front(step, steps, KEEP)
    return found
