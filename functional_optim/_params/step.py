"""`ParamStep`: a step of chains over the parameters that have gradients."""

from collections.abc import Mapping, Sequence
from operator import attrgetter, is_
from typing import Any, Literal, NamedTuple

import torch

from .._compiler.fuse import extra_key
from .._extras import check_no_number
from .._foreign import CHANGED_MESSAGE, SpecWatch, call_opaque, check_updates, host_column
from .._regions import Opaque, Region
from .._runtime.backend import REQUESTED, refuse_replacement
from .._runtime.checks import check_fit, check_leaf, refuse_leaf, refuse_meta
from .._runtime.cuda.capture import refuse_host_schedule
from .._runtime.groups import Columns
from .._runtime.internals import in_backward, needs_dispatch
from .._runtime.shard import is_fsdp1, placed_like
from .._runtime.step import Workspace
from .._segments import SegmentedStep, Variant
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


class ParamInputs(NamedTuple):
    """Arguments of one step over parameters, and the specs and dispatch that it found at its start.

    Args:
      params: the parameters, or tensors that stand for them; copies of them, where autograd records.
      written: the parameters that are written to.
      states: the state of each parameter.
      options: mappings that hyper-parameters are looked up in.
      extra: the extra arguments.
      first: the parameters that take their first step.
      journal: takes note of entries of state that are replaced.
      dispatching: whether torch looks at each operation, as transformations of `torch.func` do.
      watch: the specs that parameters have to keep, where Python code runs within the step.
      steady: whether these are the specs of the last step.
    """

    params: Sequence[torch.Tensor]
    written: Sequence[torch.Tensor]
    states: States
    options: Sequence[Mapping[str, Any]]
    extra: Mapping[str, Any]
    first: frozenset[int]
    journal: Journal
    dispatching: bool
    watch: SpecWatch | None
    steady: bool


class ParamStep(SegmentedStep[ParamRegion, ParamInputs]):
    """Transformations over parameters of which the same ones have gradients.

    Args:
      layout: the transformations, laid out over the parameters.
      grads: their gradients, None for parameters that the step skips.
      counter: the dtype of counters; None if they are Python's integers.
      warn: whether to warn of parameters whose reductions are not those of whole tensors.

    Attributes:
      there: for each parameter, whether it takes part; `present` and `absent` are the positions of those that do and do
        not.
      local: the columns of local tensors, for parameters whose elements are in another tensor.
      opaque: the states of transformations that are not made of rules, by position.
      returned: the specs of updates that fit, by the position of the opaque segment.
      done: whether the last step has run to its end.
      workspace: the memory of its last region, where that is computed in place.

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
        self.templates, self.guarded, self.spans_tree = layout.templates, layout.guarded, layout.spans_tree
        self.view, self.paths = layout.view, list(params.names)
        self.there = [g is not None for g in grads]
        self.present = tuple(i for i, there in enumerate(self.there) if there)
        self.absent = tuple(i for i, there in enumerate(self.there) if not there)
        self._refuse_meta()
        self.local = LocalColumns(params, self.present)
        self.reader = Reader(self.view.spec)
        segments = [
            ParamRegion(segment, params, self.present, layout.keys, self.local.shards)
            if isinstance(segment, Region)
            else segment
            for segment in layout.segments
        ]
        devices = [
            tensor_of(p, f"params at {name!r}").device if g is not None else None
            for name, p, g in zip(params.names, params.tensors, grads, strict=True)
        ]
        super().__init__(segments, {device for device in devices if device is not None}, layout.extras)
        self._refuse_complex()
        if warn and layout.reduces:
            self._warn_of_flat_params()
        self.opaque = layout.split_states()
        self.state = ParamState(params, self.present, self.regions, self.opaque, self.local, devices, counter)
        self.returned: dict[int, SpecWatch] = {}
        self.done = False
        self.workspace: Workspace | None = None

    @property
    def needs_all(self) -> bool:
        """Whether a step on some of the parameters, and another one on others, differs from one on all."""
        return self.spans_tree or bool(self.opaque or self.state.shared)

    def _refuse_meta(self) -> None:
        """Refuses parameters without memory, but for a step that is only traced.

        Raises:
          RuntimeError: with the name of the parameter.
        """
        for i in self.present:
            if self.params.tensors[i].is_meta and not needs_dispatch():
                refuse_meta(self.paths[i])

    def _refuse_complex(self) -> None:
        """Refuses complex parameters where a rule needs whole tensors of real numbers.

        Raises:
          ValueError: with the name of the rule and of the parameter.
        """
        for rule in [segment.leafwise for segment in self.regions if segment.leafwise is not None]:
            for i in self.local.complex:
                if i in rule.leaves:
                    raise ValueError(
                        f"{rule.bound.rule.name} needs real numbers, but {self.paths[i]!r} is "
                        f"{self.params.tensors[i].dtype}; leave it to other rules with `masked` or `partition`."
                    )

    def _warn_of_flat_params(self) -> None:
        flat = next((name for name, p in zip(self.paths, self.params.tensors, strict=True) if is_fsdp1(p)), None)
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

    def begin(self) -> None:
        """Begins a step, of which nothing has been written."""
        self.done, self.workspace = False, None

    @property
    def completed(self) -> bool:
        """Whether everything of the last step has been written."""
        return self.done or (self.workspace is not None and self.workspace.completed)

    def take(
        self,
        slots: Columns,
        params: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor | None],
        states: States,
        options: Sequence[Mapping[str, Any]],
        extra: Mapping[str, Any],
        first: frozenset[int],
        journal: Journal,
    ) -> Outcome:
        """Takes the step, which has begun. `completed` tells whether everything has been written.

        Args:
          slots: the columns of slots; see `ParamState.columns`.
          params: the parameters, or tensors that stand for them.
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
        if self.extras.needed or self.extras.trees:
            self.extras.check(extra, "step(closure, {}=...)")
        if self.guarded or self.local.dtensors or self.spans_tree:
            self._check_call()
        written = params
        if torch.is_grad_enabled():  # autograd saves the inputs of a step, and parameters are written to
            params = [p if g is None else p.clone() for p, g in zip(params, grads, strict=True)]
        columns: Columns = {"updates": grads, "params": params, **slots}
        if self.extras.trees:
            columns |= {extra_key(k): self._extra_column(k, rule, extra[k]) for k, rule in self.extras.trees.items()}
        if self.local.wrapped:
            found = self._local_columns(columns)
            if isinstance(found, str):
                return found
            columns |= found
        dispatching, watch, steady = needs_dispatch(), None, False
        if self.runs_python:
            options = list(options)  # another object, for Python code within the step may change options
            if not dispatching:
                watch = SpecWatch.of(self.params_watch, columns["params"], self.present, "params", self.paths)
                steady, self.params_watch = watch is self.params_watch, watch
        if self.looks_ahead and not dispatching:
            self._look_ahead(options, extra, {})
        inputs = ParamInputs(params, written, states, options, extra, first, journal, dispatching, watch, steady)
        if not self._take_segments(columns, inputs):
            return "sparse" if any(g is not None and g.layout is not torch.strided for g in grads) else "gone"
        if self.local.dtensors:
            torch.autograd.graph.increment_version([params[i] for i in self.local.dtensors])
        self.done = True
        return "taken"

    def _check_call(self) -> None:
        """Refuses a step that this chain cannot take now.

        Raises:
          ValueError: gradients are scaled.
          RuntimeError: autograd cannot record the step, or gradients are not all there yet.
        """
        if self.guarded and (self.opaque or any(segment.leafwise for segment in self.regions)):
            raise ValueError(
                "gradients that are still multiplied by a loss scale reach transformations that torch operations "
                "compute; unscale them before the step."
            )
        if self.local.dtensors and torch.is_grad_enabled():
            raise RuntimeError(
                f"{self.paths[self.local.dtensors[0]]} is a DTensor, whose local tensor is written to, so that "
                f"autograd cannot record the step; use differentiable=False, or the functions of a transformation."
            )
        if self.spans_tree and len(self.paths) == 1 and in_backward():
            raise RuntimeError(
                "this chain reduces over the whole tree, so it needs the gradients of all parameters at once, but it "
                "was given one parameter while its gradient is computed; call `step` after the backward pass."
            )

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
            known = {key: i for i, p in enumerate(self.params.tensors) for key in (self.paths[i], p)}
            unknown = next((key for key in x if key not in known), None)
            if unknown is not None:
                shown = "a tensor" if isinstance(unknown, torch.Tensor) else repr(unknown)
                raise ValueError(
                    f"the extra argument `{name}` has the key {shown:.80}, which is no parameter of the optimizer; "
                    f"there are {', '.join(map(repr, self.paths[:5]))}{' ...' if len(self.paths) > 5 else ''}."
                )
            entries = {known[key]: tensor for key, tensor in x.items()}
            return [entries.get(i) for i in range(len(self.paths))]
        if not isinstance(x, Sequence) or isinstance(x, str):
            raise ValueError(
                f"the extra argument `{name}` is {type(x).__name__} {x!r:.60}, but {rule} takes a list, or a dict by "
                f"name or by parameter, a tensor for each."
            )
        if len(x) != len(self.paths):
            raise ValueError(
                f"the extra argument `{name}` has {len(x)} entries, but the optimizer has {len(self.paths)} "
                f"parameters; give None for one that has none."
            )
        return list(x)

    def _local_columns(self, columns: Columns) -> Columns | Literal["gone", "sparse"]:
        """Parameters, gradients and extra arguments as local tensors; an outcome of `take` if it cannot go on."""
        local, params, grads = self.local, columns["params"], columns["updates"]
        known_params = local.known("params", params)
        if known_params is None and not local.fits(params):
            return "gone"
        known_grads = local.known("updates", grads)
        # a region finds sparse gradients when it reads tensors
        if (known_grads is None or len(self.segments) > 1) and any(
            g is not None and g.layout is not torch.strided for g in map(grads.__getitem__, local.dtensors)
        ):
            return "sparse"
        return {
            "params": known_params or local.of("params", params),
            "updates": known_grads or local.of("updates", grads, placed_like, "the gradient of", written=False),
            **{
                key: local.of(key, columns[key], placed_like, f"the extra argument `{key[1]}` for", written=False)
                for key in map(extra_key, self.extras.trees)
            },
        }

    def _run(self, segment: ParamRegion, columns: Columns, inputs: ParamInputs, last: bool) -> bool:
        if segment.region.host_schedules:
            columns |= self._host_columns(segment, inputs.states)
        python_has_run = segment.region.host_schedules or segment is not self.segments[0]
        if inputs.watch is not None and python_has_run:
            columns["params"] = self.local.of("params", inputs.params)
            if not inputs.watch.holds(columns["params"]):
                raise RuntimeError(CHANGED_MESSAGE)
            columns |= self.state.columns(inputs.states) or {}
        own = columns  # the same dict, unless results are written to other tensors
        if last and inputs.written is not inputs.params:
            own = {**columns, "params": self.local.of("written", inputs.written)}
        if segment.leafwise is not None:
            computed = self._compute_leafwise(segment, own, inputs)
        else:
            computed = self._compute(segment, own, inputs, last)
        if computed is None:
            return False
        results, mended = computed
        columns |= mended  # regions behind this one read them
        own |= mended  # `_write` copies results to them
        if last and results:  # results of torch operations, which autograd or a mode follows
            self._write(segment, columns, own, results, inputs)
        elif not last:
            columns["updates"] = results.pop("updates", columns["updates"])
            self.state.replace(segment, results, columns, inputs.states, inputs.journal)
        return True

    def _host_columns(self, segment: ParamRegion, states: States) -> Columns:
        """The values of schedules that Python evaluates, as columns."""
        found: Columns = {}
        for host in segment.region.host_schedules:
            refuse_host_schedule(host.name, self.state.devices)
            counts = [None if (x := state.get("step")) is None else int(x) for state in states]
            found[host.column] = host_column(host, counts, self.state.devices)
        return found

    def _compute_leafwise(
        self, segment: ParamRegion, own: Columns, inputs: ParamInputs
    ) -> tuple[Columns, Columns] | None:
        """Computes a region that is a rule for whole tensors, and is never the last; see `_compute`."""
        rule = segment.leafwise
        assert rule is not None
        lacks_counters = "step" in own and any(own["step"][i] is None for i in rule.leaves)
        steady = inputs.steady and not self.local.wrapped and not lacks_counters
        kinds = rule.known_kinds(own) if steady else None
        if kinds is None:
            if not self._has_its_leaves(segment, own):
                return None
            self._check_leaves(own)
        mended = self.state.mend_counters(own, inputs.states, inputs.journal)
        return segment.run_leafwise(own | mended, inputs.options, inputs.extra, inputs.first, kinds), mended

    def _compute(
        self, segment: ParamRegion, own: Columns, inputs: ParamInputs, in_place: bool
    ) -> tuple[Columns, Columns] | None:
        """Computes a region that is a program.

        Args:
          segment: the region.
          own: all tensors that it reads.
          inputs: the arguments of the step.
          in_place: whether kernels write in place.

        Returns:
          The columns that change, none of them if kernels have written them; and the column of counters in the form
          that programs count on, at a first look at the tensors. None, and nothing is done, if a gradient or an entry
          is gone.
        """
        mended: Columns = {}
        first = inputs.first if segment.uses_first else frozenset()
        variant = Variant(in_place, REQUESTED.get(), first)
        found = None if inputs.dispatching else segment.find(own, variant)
        if found is None:
            if not self._has_its_leaves(segment, own):
                return None
            self._check_leaves(own)
            mended = self.state.mend_counters(own, inputs.states, inputs.journal)
            own = own | mended
            leaves = segment.leaves(own, first)
            if inputs.dispatching:
                programs = segment.programs(own, leaves)
                numbers = programs.numbers(inputs.options, inputs.extra)
                return programs.evaluate_reference(own | self._unwritten_params(inputs), numbers), mended
            found = segment.bind(own, variant, leaves)
        bound, reading = found
        numbers = bound.numbers(inputs.options, inputs.extra)
        if torch.is_grad_enabled() and bound.requires_grad(reading, numbers):
            bound.release(reading)
            refuse_replacement(variant.backend, "autograd, in a step of an optimizer")
            return bound.evaluate_reference(own | self._unwritten_params(inputs), numbers), mended
        self.workspace = reading.workspace if in_place else None
        return bound.run(reading, own, numbers), mended

    def _has_its_leaves(self, segment: ParamRegion, own: Columns) -> bool:
        """Whether the gradients and entries are there that were there before, and gradients are dense."""
        if any(u is None or u.layout is not torch.strided for u in (own["updates"][i] for i in self.present)):
            return False
        if not self.local.fits(self.params.tensors):
            return False
        return not any(own[s.key][i] is None and s.seen[i] for s in segment.region.stored for i in self.present)

    def _check_leaves(self, own: Columns) -> None:
        """Refuses parameters and gradients that no rule can work on, or that do not fit each other.

        Raises:
          ValueError, TypeError: with the name of the parameter.
        """
        for i in self.present:
            u = check_leaf("updates", self.paths[i], own["updates"][i])
            p = check_leaf("params", self.paths[i], own["params"][i])
            check_fit("updates", "parameter", self.paths[i], u, p)

    def _unwritten_params(self, inputs: ParamInputs) -> Columns:
        """The column of parameters that autograd may keep, because nothing is written to them."""
        return {"params": self.local.of("params", inputs.params)}

    def _write(
        self, segment: ParamRegion, columns: Columns, own: Columns, results: Columns, inputs: ParamInputs
    ) -> None:
        """Writes the results of a last region that was not computed in place, because autograd records it."""
        if torch.is_grad_enabled() and not self.local.dtensors:
            # autograd may have kept the old tensor for the derivative of an earlier step
            slots = {key: x for key, x in results.items() if key != "params"}
            self.state.replace(segment, slots, columns, inputs.states, inputs.journal)
            results = {"params": results["params"]} if "params" in results else {}
        changed = [(k, i, x[i]) for k, x in results.items() for i in self.present if x[i] is not columns[k][i]]
        for key, i, _ in changed:
            refuse_leaf(self.paths[i], own[key][i])
        for key, i, x in changed:
            own[key][i].copy_(x)

    def _call(self, segment: Opaque, columns: Columns, inputs: ParamInputs) -> Sequence[Any]:
        """Updates of a transformation that is not made of rules.

        Those that have the specs of the last ones fit parameters that have theirs.
        """
        link, split = segment.link, self.opaque[segment.position]
        if segment is self.segments[0] and not inputs.dispatching:
            now = columns["updates"]
            self.updates_watch = SpecWatch.of(self.updates_watch, now, self.present, "updates", self.paths)
        before = list(columns["updates"])
        for i in self.local.wrapped:
            before[i] = None if before[i] is None else self.local.like(before[i], i)
        view = View(self.view.spec, tuple(inputs.params), link.seen)
        states = dict(zip(self.paths, inputs.states, strict=True))
        state = split.gather(states)
        found, new_state = call_opaque(link, view, before, state, True, inputs.extra, self.reader)
        key, name = (segment.position, "update"), "the update that was returned for"
        updates = list(self.local.of(key, found, placed_like, name, written=False))
        known = self.returned.pop(segment.position, None)
        if not (inputs.steady and known is not None and known.holds(updates)):
            check_updates(link, updates, columns["params"], self.paths, self.present)
            known = None if inputs.dispatching else SpecWatch(updates, self.present)
        if known is not None:
            self.returned[segment.position] = known
        entries = split.entries(new_state, states, {self.paths[i] for i in self.present if link.seen[i]})
        self.state.put_all(entries, inputs.states, inputs.journal)
        return updates
