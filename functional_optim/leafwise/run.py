"""A step over leaves: state that is missing is made, and programs run in place."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, repeat
from operator import is_, itemgetter
from typing import Any

import torch

from .._backend import transforming
from .._compiler.fuse import Source
from .._compiler.rule import Option
from .._groups import Group, Lists
from .._plan import Plan, Prepared, Segment, Stored
from .._run import compute, number, reference_reason, run_barrier, runs_python
from ..kernels import Column
from ..kernels.collect import items
from ..kernels.pack import pack
from ..kernels.versions import count_up_outers
from .layout import Layout, Leaves
from .recall import Recall
from .sharding import distributed, local
from .templates import Template


class Leafwise:
    """Runs transformations in place over leaves, and remembers how for the next time.

    Example:
      >>> import functional_optim as fo
      >>> tx = fo.chain(fo.trace(0.9), fo.scale_by_learning_rate(Option("lr")))
      >>> template = Template(tx, {((0,), "trace"): "momentum_buffer"})
      >>> p, state = torch.zeros(1), {}
      >>> leaves = Leaves(lambda: ["p"], [p], [torch.ones(1)], [state], [0], [0], [0])
      >>> Leafwise().step([template], leaves, [{"lr": 0.5}])
      >>> p, state
      (tensor([-0.5000]), {'momentum_buffer': tensor([1.])})
    """

    KEEP = 8

    def __init__(self) -> None:
        self.layouts: list[Layout] = []
        self.new: set[Any] = set()  # parameters that have state, but have not taken their first step
        self.recalls: list[Recall] = []  # the last one first

    def layout(self, templates: Sequence[Template], leaves: Leaves, guarded: bool, seen: bool) -> tuple[Layout, Lists]:
        """The layout of leaves, and their tensors."""
        if not seen:
            for layout in self.layouts:
                lists = layout.match(templates, leaves, guarded)
                if lists is not None:
                    return layout, lists
        layout = Layout(templates, leaves, guarded, first=not (seen or self.layouts))
        if not seen:
            self.layouts = [layout, *self.layouts[: self.KEEP - 1]]
        return layout, layout.lists(leaves)

    def prepare(self, templates: Sequence[Template], leaves: Leaves, options: Sequence[Mapping[str, Any]]) -> None:
        """Makes the state that is not there yet, and takes no step.

        Args:
          templates: the transformations.
          leaves: the parameters, gradients and states.
          options: mappings that hyper-parameters are looked up in.
        """
        layout, lists = self.layout(templates, leaves, False, False)
        for segment in layout.plan.segments:
            if isinstance(segment, Segment):
                _columns(segment, layout, lists, leaves, options, [], self.new)

    def step(
        self,
        templates: Sequence[Template],
        leaves: Leaves,
        options: Sequence[Mapping[str, Any]],
        extra: Mapping[str, Any] | None = None,
        guarded: bool = False,
        settled: object = None,
    ) -> None:
        """Takes a step.

        Args:
          templates: the transformations.
          leaves: the parameters, gradients and states.
          options: mappings that hyper-parameters are looked up in.
          extra: extra arguments that rules take.
          guarded: whether `extra` has `grad_scale`, which gradients are divided by, and `found_inf`: if it is not 0,
            everything stays as it is. All must be made of rules.
          settled: stands for all options, if they are what they were at the last step that was given this very object;
            None says nothing.

        Raises:
          ValueError, TypeError: a tensor does not fit; nothing has been written.
        """
        extra = extra or {}
        seen = transforming()
        given = leaves
        recall, lists = self._recall(templates, leaves, guarded, seen)
        if recall is not None and lists is not None:
            layout = recall.layout
        else:
            leaves = leaves._replace(grads=leaves.gradients)
            layout, lists = self.layout(templates, leaves, guarded, seen)
        if guarded and layout.barriers:
            raise ValueError(
                "gradients that are still multiplied by a loss scale reach transformations that are not made of rules; "
                "unscale them before the step."
            )
        if layout.spans_tree and len(leaves.params) == 1 and torch._C._current_graph_task_id() >= 0:
            raise RuntimeError(
                "this chain reduces over the whole tree, so it needs the gradients of all parameters at once, but it "
                "was given one parameter while its gradient is computed; call `step` after the backward pass."
            )
        made: list[tuple[dict[str, Any], str]] = []
        new = set(self.new)
        settled = None if layout.barriers else settled  # they run Python code, which may change options
        writes: list[Callable[[], None]] = []  # of all but the last program, which must be known to fit before
        segments = layout.plan.segments
        try:
            for segment in segments:
                if isinstance(segment, Segment):
                    if recall is None:
                        _columns(segment, layout, lists, leaves, options, made, new)
                    first = [i for i in layout.plan.present if leaves.ids[i] in new] if new else []
                    later = None if segment is segments[-1] else writes
                    prepared = run_segment(  # the last one is a segment
                        *(segment, layout, lists, leaves, options, extra, seen, frozenset(first), later, settled),
                        None if recall is None else recall.prepared,
                    )
                else:
                    barrier = layout.barriers[id(segment[1])]
                    state = run_barrier(segment[1], layout.plan, lists, barrier.gather(leaves.states), extra)
                    writes.append(functools.partial(barrier.scatter, state, leaves.states, layout.plan.present))
            for write in writes:
                write()
            if layout.wrappers:
                count_up_outers(lists["params"], leaves.params, layout.wrappers)
        except BaseException:
            for state, key in made:
                del state[key]
            raise
        # nothing waits for a device but the first step, and leaves without elements
        taken = not (guarded and (new or layout.counters) and float(extra["found_inf"]))
        if taken:
            self.new = new and new - {leaves.ids[i] for i in layout.plan.present}
            for i in layout.counters:
                leaves.states[i]["step"] += 1
        else:  # the step after this one is the first
            for state, key in made:
                del state[key]
        if recall is None:
            self._remember(layout, prepared, given, seen)

    def _remember(self, layout: Layout, prepared: Prepared, leaves: Leaves, seen: bool) -> None:
        """Remembers a step, so that the next one may be like it."""
        if leaves.grads is not None or seen:
            return
        others = [r for r in self.recalls if r.leaves is leaves and r.layout is not layout]
        known = next((r for r in self.recalls if r.is_of(layout, prepared, leaves)), None)
        made = known or Recall.of(layout, prepared, leaves)
        self.recalls = [*([] if made is None else [made]), *others[: self.KEEP - 1]]

    def _recall(
        self, templates: Sequence[Template], leaves: Leaves, guarded: bool, seen: bool
    ) -> tuple[Recall, Lists] | tuple[None, None]:
        """A step remembered that this one is like, and its tensors."""
        if leaves.grads is None and not (seen or self.new):
            for recall in self.recalls:
                lists = recall.lists(templates, leaves, guarded)
                if lists is not None:
                    if recall is not self.recalls[0]:
                        self.recalls = [recall, *[r for r in self.recalls if r is not recall]]
                    return recall, lists
        return None, None


def _columns(
    segment: Segment,
    layout: Layout,
    lists: Lists,
    leaves: Leaves,
    options: Sequence[Mapping[str, Any]],
    made: list[tuple[dict[str, Any], str]],
    new: set[Any],
) -> None:
    """Collects the slots of a segment from the states of leaves, and makes those that are missing.

    Args:
      segment: the segment.
      layout: the layout of the leaves.
      lists: where the slots go.
      leaves: the leaves.
      options: mappings that hyper-parameters are looked up in.
      made: takes what has been made.
      new: takes the leaves that something whose first step counts has been made for.
    """
    everyone = len(layout.plan.present) == len(leaves.states)
    keys = [layout.key(segment, stored) for stored in segment.stored]
    columns = items(leaves.states, keys) if everyone else [None] * len(keys)
    for stored, key, column in zip(segment.stored, keys, columns, strict=True):
        if column is None:
            column = [state.get(key) for state in leaves.states]
            missing = [i for i in layout.plan.present if stored.seen[i] and column[i] is None]
            for i, x in zip(missing, _make(segment, stored, leaves, missing, options), strict=True):
                made.append((leaves.states[i], key))
                column[i] = leaves.states[i][key] = x
                if stored.key != "step" and segment.bounds[stored.key[0]].rule.uses_first:
                    new.add(leaves.ids[i])
        lists[stored.key] = Column(column) if stored.slot.per_leaf else layout.local(column)


def _pack(tensors: list[Any]) -> list[Any]:
    """Lays tensors, or the parts of DTensors that are here, side by side."""
    parts = pack([getattr(x, "_local_tensor", x) for x in tensors])
    packed: list[Any] = []
    for x, part in zip(tensors, parts, strict=True):
        if distributed(x):
            x._local_tensor = part
        packed.append(x if distributed(x) else part)
    return packed


def run_segment(
    segment: Segment,
    layout: Layout,
    lists: Lists,
    leaves: Leaves,
    options: Sequence[Mapping[str, Any]],
    extra: Mapping[str, Any],
    seen: bool,
    first: frozenset[int],
    later: list[Callable[[], None]] | None = None,
    settled: object = None,
    known: Prepared | None = None,
) -> Prepared:
    """Runs fused transformations over leaves, in place; or, if there is a list `later`, leaves the writing to it.

    Returns:
      What the segment is prepared for such leaves: `known`, if that is not None.
    """
    plan = layout.plan
    plan.first = first
    for name, schedule in segment.hosts:
        lists[name] = _host_column(name, schedule, leaves, plan)
    prepared = segment.prepare(plan, lists, remember=not seen) if known is None else known
    if settled is not None and prepared.settled is settled:
        tables = prepared.tables
    else:
        tables = [_table(group, options, extra) for group in prepared.groups]
        if prepared.asks_options_only:  # with hundreds of parameter groups it takes long to ask them all
            prepared.tables, prepared.settled = tables, settled
    if segment.hosts or runs_python(segment, plan, extra):
        lists["params"] = layout.local(leaves.params)
        if layout.foreign:  # the tensors of states themselves are those that are known
            _columns(segment, layout, lists, leaves, options, [], set())
        prepared.check_again(plan, lists)
    reference = reference_reason(plan, prepared, tables, seen)
    donate = later is None and (not reference or not (seen or torch.is_grad_enabled()))
    before = {key: lists[key] for key in ("params", *(s.key for s in segment.stored))} if not donate else {}
    if donate:
        prepared.overlap.check(plan.paths, lists, pure=False)
    compute(prepared, tables, lists, donate, bool(reference))
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for key, column in before.items():
        changed = [i for i in plan.present if lists[key][i] is not column[i]]
        if torch.is_grad_enabled() and key != "params" and not layout.foreign:
            # autograd may have kept the old tensor for the derivative of an earlier step
            stored = next(s for s in segment.stored if s.key == key)
            for i in changed:
                leaves.states[i][layout.key(segment, stored)] = lists[key][i]
        else:
            pairs += [(column[i], lists[key][i]) for i in changed]
    if later is None:
        _copy(pairs)
    else:
        later.append(functools.partial(_copy, pairs))
    return prepared


def _copy(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for old, new in pairs:
        old.copy_(new)


def _make(
    segment: Segment, stored: Stored, leaves: Leaves, missing: Sequence[int], options: Sequence[Mapping[str, Any]]
) -> list[torch.Tensor]:
    """First values of a slot for some leaves."""
    params = [leaves.params[i] for i in missing]
    if stored.key == "step":
        values: Mapping[str, Any] = {}
    else:
        declared = segment.bounds[stored.key[0]].values
        values = {k: v for k, v in declared.items() if k in (stored.slot.start, stored.slot.dtype)}
    owners = [leaves.owners[i] for i in missing]
    each = {
        owner: {k: v.look_up(options[owner]) if isinstance(v, Option) else v for k, v in values.items()}
        for owner in (set(owners) if values else ())
    }
    hypers = [each.get(owner, values) for owner in owners]
    # autograd does not record what is written to a view made while it did not record
    recording = torch.is_grad_enabled()
    with torch.no_grad():
        return list(map(stored.slot.make, params, hypers)) if recording else _pack(stored.slot.make_all(params, hypers))


def _host_column(name: str, schedule: Callable[[int], Any], leaves: Leaves, plan: Plan) -> Column:
    """What a schedule that only Python can evaluate gives for each leaf's own step."""
    known: dict[int, torch.Tensor] = {}
    column: list[Any] = [None] * len(leaves.params)
    for i in plan.present:
        if "step" in leaves.states[i]:
            count = int(leaves.states[i]["step"])
            if count not in known:
                x = number(f"the schedule of {name} returned", schedule(count))
                known[count] = torch.as_tensor(x, dtype=torch.float64, device=local(leaves.params[i]).device)
            column[i] = known[count]
    return Column(column)


def _table(group: Group, options: Sequence[Mapping[str, Any]], extra: Mapping[str, Any]) -> list[Any]:
    """The scalar table of a group."""
    sources = group.sources[0]
    if len(sources) > 1 and all(s.kind == "option" for s in sources) and all(map(is_, group.sources, repeat(sources))):
        # nearly always these are plain numbers, and there may be hundreds of rows
        asked: list[Option] = [s.value for s in sources]
        found = items([options[owner] for owner, _ in group.owners], [option.name for option in asked])
        with contextlib.suppress(IndexError, TypeError):  # also where one is missing
            columns = [_each(column, option.index) for column, option in zip(found, asked, strict=True)]
            if set(map(type, chain.from_iterable(columns))) == {float}:
                return list(zip(*columns, strict=True))
    return [
        [_scalar(source, options[owner], first, extra) for source in row]
        for row, (owner, first) in zip(group.sources, group.owners, strict=True)
    ]


def _each(column: Any, index: int | None) -> list[Any]:
    """What is at an index of each, if there is one."""
    return list(column if index is None else map(itemgetter(index), column))


def _scalar(source: Source, options: Mapping[str, Any], first: bool, extra: Mapping[str, Any]) -> float | torch.Tensor:
    """One number of the scalar table."""
    kind, _, name, value = source
    if kind == "option":
        try:
            x = value.look_up(options)
        except KeyError:
            raise KeyError(
                f"the parameter group lacks {value.name!r}, which {name} is taken from; there are {sorted(options)}."
            ) from None
        return x if type(x) is float else _option(value, x)
    if kind == "value":
        return value  # type: ignore[no-any-return]
    if kind == "first":
        return float(first)
    if name not in extra:
        raise TypeError(f"`{name}` is needed: call `step(closure, {name}=...)`.")
    return number(f"the extra argument `{name}` is", extra[name])


def _option(option: Option, x: Any) -> float | torch.Tensor:
    if isinstance(x, torch.Tensor) and x.numel() == 1:
        return x.reshape(())
    return number(f"the option {option.name!r} is", x)
