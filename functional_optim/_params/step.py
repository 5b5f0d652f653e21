"""`ParamStep`: a step of chains over the parameters that have gradients."""

from collections.abc import Mapping, Sequence
from operator import attrgetter, is_
from typing import Any, Literal

import torch

from .._bound_region import Variant, look_ahead
from .._extras import check_no_number
from .._foreign import CHANGED_MESSAGE, SpecWatch, call_opaque, check_updates, host_column, updates_of
from .._opaque import SplitState
from .._regions import Opaque, Region
from .._runtime.backend import REQUESTED
from .._runtime.checks import check_fit, check_leaf, refuse_leaf, refuse_meta
from .._runtime.cuda.capture import CaptureError, NumberWatch, can_capture, refuse_host_schedule
from .._runtime.groups import Columns
from .._runtime.internals import in_backward, needs_dispatch
from .._runtime.numbers import Numbers
from .._runtime.shard import is_fsdp1, placed_like
from .._runtime.step import Workspace
from .._tree import Reader, View
from .._warn import warn
from .journal import Journal
from .layout import ChainLayout
from .local import LocalColumns, tensor_of
from .region import ParamRegion
from .state import ParamState
from .template import States, Template


GRAD = attrgetter("grad")

Outcome = Literal["taken", "gone", "sparse"]


class ParamStep:
    """Transformations over parameters of which the same ones have gradients.

    Args:
      layout: the transformations, laid out over the parameters.
      grads: their gradients, None for parameters that the step skips.
      counter: the dtype of counters; None if they are Python's integers.
      warn: whether to warn of parameters whose reductions are not those of whole tensors.

    Raises:
      ValueError, TypeError: a parameter cannot be stepped.
    """

    def __init__(
        self,
        layout: ChainLayout,
        grads: Sequence[torch.Tensor | None],
        counter: torch.dtype | None,
        warn: bool,
    ) -> None:
        params = self.params = layout.params
        self.templates, self.guarded, self.traced = layout.templates, layout.guarded, layout.traced
        self.spans_tree, self.extras, self.view = layout.spans_tree, layout.extras, layout.view
        self.names = list(params.names)
        self.there = [g is not None for g in grads]
        self.present = tuple(i for i, there in enumerate(self.there) if there)
        self.absent = tuple(i for i, there in enumerate(self.there) if not there)
        self._refuse_meta()
        self.local = LocalColumns(params, self.present)
        self.reader = Reader(self.view.spec)
        self.segments: list[ParamRegion | Opaque] = [
            ParamRegion(segment, params, self.present, layout.keys, self.local.shards)
            if isinstance(segment, Region)
            else segment
            for segment in layout.segments
        ]
        self.regions = [segment for segment in self.segments if isinstance(segment, ParamRegion)]
        self._refuse_complex()
        if warn and layout.reduces:
            self._warn_of_flat_params()
        self.opaque = {
            segment.position: SplitState(segment.link, f"transformation_{segment.position}", self.view)
            for segment in self.segments
            if isinstance(segment, Opaque)
        }
        self.devices = [
            tensor_of(p, f"params at {name!r}").device if g is not None else None
            for name, p, g in zip(params.names, params.tensors, grads, strict=True)
        ]
        self.device_set = {device for device in self.devices if device is not None}
        self.looks_ahead = (len(self.segments) > 1 or len(self.device_set) > 1) and can_capture(self.device_set)
        self.numbers = NumberWatch()
        self.state = ParamState(params, self.present, self.regions, self.opaque, self.local, self.devices, counter)
        self.runs_python = bool(self.opaque) or any(
            segment.region.hosts or segment.leafwise for segment in self.regions
        )
        self.numels = [p.numel() * (1 + p.is_complex()) for p in params.tensors]
        self.watch, self.entering = SpecWatch((), ()), SpecWatch((), ())  # of parameters, and of gradients
        self.returned: dict[int, SpecWatch] = {}  # of updates that fit, by the position of the opaque segment
        self.done = False
        self.workspace: Workspace | None = None  # of the last region of the last step

    def _refuse_meta(self) -> None:
        """Refuses parameters without memory, but for a step that is only traced.

        Raises:
          RuntimeError: with the name of the parameter.
        """
        for i in self.present:
            if self.params.tensors[i].is_meta and not needs_dispatch():
                refuse_meta(self.names[i])

    def _refuse_complex(self) -> None:
        """Refuses complex parameters where a rule needs whole tensors of real numbers.

        Raises:
          ValueError: with the name of the rule and of the parameter.
        """
        for rule in [segment.leafwise for segment in self.regions if segment.leafwise is not None]:
            for i in self.local.complex:
                if i in rule.leaves:
                    raise ValueError(
                        f"{rule.bound.rule.name} needs real numbers, but {self.names[i]!r} is "
                        f"{self.params.tensors[i].dtype}; leave it to other rules with `masked` or `partition`."
                    )

    def _warn_of_flat_params(self) -> None:
        flat = next((name for name, p in zip(self.names, self.params.tensors, strict=True) if is_fsdp1(p)), None)
        if flat is not None:
            warn(
                f"{flat!r} is a part of a flat parameter of `FullyShardedDataParallel`, so norms, means and maxima of "
                f"this chain are those of the part in each process; use `fully_shard`, where they are those of whole "
                f"tensors."
            )

    def is_for(
        self, templates: Sequence[Template], grads: Sequence[torch.Tensor | None], guarded: bool, exact: bool
    ) -> bool:
        """Whether the step is for such transformations, and for gradients of which the same ones are there.

        Args:
          templates: the transformations.
          grads: the gradients.
          guarded: whether the step is taken only if `found_inf` is 0.
          exact: whether to look for gradients that are gone and for parameters that are placed otherwise; `take` finds
            them, too.
        """
        return (
            self.guarded is guarded
            and len(templates) == len(self.templates)
            and all(map(is_, templates, self.templates))
            and not (self.absent and any(grads[i] is not None for i in self.absent))
            and not (self.traced and not all(region.is_current for region in self.traced))
            and not (
                (exact or self.runs_python)
                and (any(grads[i] is None for i in self.present) or not self.local.fits(self.params.tensors))
            )
        )

    # -- the step -----------------------------------------------------------------------------------------------------

    def take(
        self,
        params: Sequence[torch.Tensor],
        columns: Columns,
        grads: Sequence[torch.Tensor | None],
        states: States,
        options: Sequence[Mapping[str, Any]],
        extra: Mapping[str, Any],
        first: frozenset[int],
        journal: Journal,
    ) -> Outcome:
        """Takes the step, which has begun. `completed` tells whether everything has been written.

        Args:
          params: the parameters, or tensors that stand for them.
          columns: the slots; see `ParamState.columns`.
          grads: the gradients.
          states: the state of each parameter.
          options: mappings that hyper-parameters are looked up in.
          extra: the extra arguments.
          first: the parameters that take their first step.
          journal: takes note of entries of state that are replaced.

        Returns:
          `"taken"`; or, if nothing has been done, `"gone"` if a gradient or an entry is gone that was there, or
          parameters are placed otherwise, and `"sparse"` if a gradient is sparse.

        Raises:
          ValueError, TypeError, RuntimeError: something does not fit.
          CaptureError: a CUDA graph is being captured that could not replay the step.
        """
        self._check_call(extra)
        written, records = params, torch.is_grad_enabled()
        if records:  # autograd saves the inputs of a step, and parameters are written to
            params = [p if g is None else p.clone() for p, g in zip(params, grads, strict=True)]
        given: Columns = {
            (-1, name): self._extra_column(name, rule, extra[name]) for name, rule in self.extras.trees.items()
        }
        if self.runs_python:
            options = list(options)  # another object, for Python code within the step may change options
        own: Columns = {"updates": grads, "params": params, **columns, **given}
        if self.local.wrapped:
            found = self._local_columns(params, grads, given)
            if isinstance(found, str):
                return found
            own |= found
        watched = self.runs_python and not needs_dispatch()
        steady = False  # whether parameters have the specs of the last step
        if watched:
            watch = SpecWatch.of(self.watch, own["params"], self.present, "params", self.names)
            steady, self.watch = watch is self.watch, watch
        if self.looks_ahead and not needs_dispatch():
            look_ahead(self.numbers, self.segments, self.device_set, self.params.groups, options, extra)
        began = False
        try:
            for segment in self.segments:
                if segment.entered is not None:
                    own[segment.entered] = own["updates"]
                if isinstance(segment, Opaque):
                    own["updates"], entries = self._call(segment, own, params, states, extra, steady)
                    began = True
                    self.state.put_all(entries, states, journal)
                    continue
                if segment.region.hosts:
                    own |= self._host_columns(segment, states)
                if watched and (segment.region.hosts or segment is not self.segments[0]):  # Python code has run
                    own["params"] = self.local.of("params", params)
                    if not self.watch.holds(own["params"]):
                        raise RuntimeError(CHANGED_MESSAGE)
                    own |= self.state.columns(states) or {}
                last = segment is self.segments[-1]
                targets = {**own, "params": self.local.of("written", written)} if last and records else own
                results = self._run(
                    segment, targets, own["params"], states, options, extra, first, journal, last, steady
                )
                began = True
                if results is None:
                    sparse = any(g is not None and g.layout is not torch.strided for g in grads)
                    return "sparse" if sparse else "gone"
                if last and results:
                    self._write(segment, own, targets, results, states, journal)
                elif not last:
                    own["updates"] = results.pop("updates", own["updates"])
                    self.state.replace(segment, results, own, states, journal)
        except CaptureError as error:
            if began:
                raise error.behind_a_part() from None
            raise
        if self.local.dtensors:
            torch.autograd.graph.increment_version([params[i] for i in self.local.dtensors])
        self.done = True
        return "taken"

    def _check_call(self, extra: Mapping[str, Any]) -> None:
        """Refuses a step that this chain cannot take now.

        Raises:
          TypeError, ValueError: an extra argument is missing or of another form, or gradients are scaled.
          RuntimeError: autograd cannot record the step, or gradients are not all there yet.
        """
        if self.extras.needed or self.extras.trees:
            self.extras.check(extra, "step(closure, {}=...)")
        if self.guarded and (self.opaque or any(segment.leafwise for segment in self.regions)):
            raise ValueError(
                "gradients that are still multiplied by a loss scale reach transformations that torch operations "
                "compute; unscale them before the step."
            )
        if self.local.dtensors and torch.is_grad_enabled():
            raise RuntimeError(
                f"{self.names[self.local.dtensors[0]]} is a DTensor, whose local tensor is written to, so that "
                f"autograd cannot record the step; use differentiable=False, or the functions of a transformation."
            )
        if self.spans_tree and len(self.names) == 1 and in_backward():
            raise RuntimeError(
                "this chain reduces over the whole tree, so it needs the gradients of all parameters at once, but it "
                "was given one parameter while its gradient is computed; call `step` after the backward pass."
            )

    def _local_columns(
        self, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None], given: Columns
    ) -> Columns | Literal["gone", "sparse"]:
        """Parameters, gradients and extra arguments as local tensors; an outcome of `take` if it cannot go on."""
        local = self.local
        own_params = local.known("params", params)
        if own_params is None and not local.fits(params):
            return "gone"
        own_grads = local.known("updates", grads)
        # a region finds sparse gradients when it reads tensors
        if (own_grads is None or len(self.segments) > 1) and any(
            g is not None and g.layout is not torch.strided for g in map(grads.__getitem__, local.dtensors)
        ):
            return "sparse"
        return {
            "params": own_params or local.of("params", params),
            "updates": own_grads or local.of("updates", grads, placed_like, "the gradient of", written=False),
            **{
                k: local.of(k, x, placed_like, f"the extra argument `{k[1]}` for", written=False)
                for k, x in given.items()
            },
        }

    def _extra_column(self, name: str, rule: str, x: Any) -> list[Any]:
        """An extra argument that is one tensor per parameter, as a column.

        Args:
          name: its name.
          rule: a rule that takes it.
          x: a list in the order of the parameters, or a dict by their names or by the parameters themselves.

        Raises:
          ValueError: the argument does not go with the parameters.
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

    def _host_columns(self, segment: ParamRegion, states: States) -> Columns:
        """The values of schedules that Python evaluates, as columns."""
        found: Columns = {}
        for host in segment.region.hosts:
            refuse_host_schedule(host.name, self.devices)
            counts = [None if (x := state.get("step")) is None else int(x) for state in states]
            found[host.column] = host_column(host, counts, self.devices)
        return found

    def begin(self) -> None:
        """Begins a step, of which nothing has been written."""
        self.done, self.workspace = False, None

    @property
    def completed(self) -> bool:
        """Whether everything of the last step has been written."""
        return self.done or (self.workspace is not None and self.workspace.completed)

    def _run(
        self,
        segment: ParamRegion,
        own: Columns,
        kept: Sequence[torch.Tensor | None],
        states: States,
        options: Sequence[Mapping[str, Any]],
        extra: Mapping[str, Any],
        first: frozenset[int],
        journal: Journal,
        in_place: bool,
        steady: bool,
    ) -> Columns | None:
        """Runs a region: the columns that change, none if they are written in place; None if a tensor is gone.

        Where autograd records it, it is computed from `kept`, which are parameters that nothing is written to.
        """
        if (
            segment.leafwise is not None
            and steady
            and not self.local.wrapped
            and not ("step" in own and any(own["step"][i] is None for i in segment.leafwise.leaves))
            and segment.leafwise.fits(own)
        ):
            own |= self.state.mend_counters(own, states, journal)
            return segment.run_leafwise(own, options, extra, first, fits=True)
        dispatching = needs_dispatch()
        variant = Variant(in_place, REQUESTED.get(), first if segment.first_slots else frozenset())
        found = None if dispatching or segment.leafwise else segment.find(own, variant)
        if found is None:
            if any(u is None or u.layout is not torch.strided for u in (own["updates"][i] for i in self.present)):
                return None
            if any(own[s.key][i] is None and s.seen[i] for s in segment.region.stored for i in self.present):
                return None
            for i in self.present:
                u = check_leaf("updates", self.names[i], own["updates"][i])
                p = check_leaf("params", self.names[i], own["params"][i])
                check_fit("updates", "parameter", self.names[i], u, p)
            own |= self.state.mend_counters(own, states, journal)
            if segment.leafwise is not None:
                return segment.run_leafwise(own, options, extra, first)
            leaves = segment.leaves(own, self.params.groups, variant.first, self.numels, self.local.shards)
            if dispatching:
                programs = segment.programs(own, leaves)
                return programs.evaluate_reference({**own, "params": kept}, programs.numbers(options, extra))
            found = segment.bind(own, variant, leaves)
        bound, reading = found
        numbers: Numbers = bound.numbers(options, extra)
        if torch.is_grad_enabled() and bound.requires_grad(reading, numbers):
            bound.release(reading)
            return bound.evaluate_reference({**own, "params": kept}, numbers)
        self.workspace = reading.workspace if in_place else None
        return bound.run(reading, own, numbers)

    def _write(
        self, segment: ParamRegion, own: Columns, targets: Columns, results: Columns, states: States, journal: Journal
    ) -> None:
        """Writes the results of a last region that was not computed in place, because autograd records it."""
        if torch.is_grad_enabled() and not self.local.dtensors:
            # autograd may have kept the old tensor for the derivative of an earlier step
            self.state.replace(segment, {key: x for key, x in results.items() if key != "params"}, own, states, journal)
            results = {"params": results["params"]} if "params" in results else {}
        changed = [(k, i, x[i]) for k, x in results.items() for i in self.present if x[i] is not own[k][i]]
        for key, i, _ in changed:
            refuse_leaf(self.names[i], targets[key][i])
        for key, i, x in changed:
            targets[key][i].copy_(x)

    def _call(
        self,
        segment: Opaque,
        own: Columns,
        params: Sequence[torch.Tensor],
        states: States,
        extra: Mapping[str, Any],
        steady: bool,
    ) -> tuple[list[Any], list[tuple[str, str, Any]]]:
        """Calls a transformation that is not made of rules: its updates, and the new entries of its state.

        Updates that have the specs of the last ones fit parameters that have theirs.
        """
        link, split = segment.link, self.opaque[segment.position]
        if segment is self.segments[0] and not needs_dispatch():
            self.entering = SpecWatch.of(self.entering, own["updates"], self.present, "updates", self.names)
        updates = list(own["updates"])
        for i in self.local.wrapped:
            updates[i] = None if updates[i] is None else self.local.like(updates[i], i)
        view = View(self.view.spec, tuple(params), link.seen)
        state = split.gather(dict(zip(self.names, states, strict=True)))
        tree, new_state = call_opaque(link.tx, view.tree(updates), state, view.tree(), extra)
        found = updates_of(link, tree, updates, self.reader)
        found = list(
            self.local.of(
                (segment.position, "update"), found, placed_like, "the update that was returned for", written=False
            )
        )
        known = self.returned.pop(segment.position, None)
        if not (steady and known is not None and known.holds(found)):
            check_updates(link, found, own["params"], self.names, self.present)
            known = None if needs_dispatch() else SpecWatch(found, self.present)
        if known is not None:
            self.returned[segment.position] = known
        present = [self.names[i] for i in self.present if link.seen[i]]
        return found, split.entries(new_state, present)
