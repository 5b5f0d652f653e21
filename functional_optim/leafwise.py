"""Chains in place over leaves that each count their own steps and look up their own hyper-parameters.

This is what a stateful optimizer is made of. In the pure API a transformation counts steps for the whole tree and
its numbers are the same for every leaf; here a leaf brings a flat dict of state, its counter `step` among it, and
options, a mapping that `Option` looks things up in. All leaves still share one kernel per pass, whatever their
options are.
"""

import contextlib
import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch

from ._backend import transforming
from ._base import GradientTransformation, Link
from ._chain import Chain
from ._fuse import Counting, Source
from ._plan import Lists, Plan, Segment, Stored
from ._rule import RuleTransformation
from ._run import (
    compute,
    number,
    reference_reason,
    run_barrier,
)
from ._spec import Option as Option
from ._tree import View, flatten, leaves_like, paths, unflatten
from .kernels import Column, Shard
from .kernels.guard import PLAIN
from .kernels.layout import pack as pack


Path = tuple[int | str, ...]
Keys = Mapping[tuple[Path, str], str]  # where a transformation's slot is in a leaf's state


class Template(NamedTuple):
    """A transformation whose numbers are options, and the names of its slots.

    Args:
      tx: the transformation.
      keys: for each rule's path in it and slot, the key in a leaf's state.
    """

    tx: GradientTransformation
    keys: Keys


class Leaves(NamedTuple):
    """What a step works on, a list entry per parameter.

    Args:
      names: makes what messages call the parameters; no name occurs twice.
      params: the parameters.
      grads: their gradients; None for those that the step skips.
      states: their states; slots that are not there yet are made.
      templates: which template each has.
      owners: whose options each has.
      ids: what each is known by from step to step.
      tags: anything else that names and masks depend on.
    """

    names: Callable[[], Sequence[str]]
    params: list[torch.Tensor]
    grads: list[torch.Tensor | None]
    states: list[dict[str, Any]]
    templates: list[int]
    owners: list[int]
    ids: list[Any]
    tags: Sequence[Any] = ()


def parts(tx: GradientTransformation) -> dict[Path, GradientTransformation]:
    """The innermost transformations that a transformation consists of, by path: rules, and those that are not.

    Args:
      tx: the transformation.

    Returns:
      The transformations in order.

    Example:
      >>> import functional_optim as fo
      >>> parts(fo.sgd(0.1))
      {(1,): scale_by_learning_rate(learning_rate=0.1)}
    """
    found: dict[Path, GradientTransformation] = {}

    def keep(path: Path, inner: GradientTransformation) -> GradientTransformation:
        found[path] = inner
        return inner

    tx._rewrite(keep, ())
    return found


def rules(tx: GradientTransformation) -> dict[Path, RuleTransformation]:
    """Those of the `parts` of a transformation that are made of rules.

    Args:
      tx: the transformation.

    Returns:
      The rules in order.

    Example:
      >>> import functional_optim as fo
      >>> list(rules(fo.adamw(1e-3)).values())
      [scale_by_adam(), add_decayed_weights(weight_decay=0.0001), scale_by_learning_rate(learning_rate=0.001)]
    """
    return {path: part for path, part in parts(tx).items() if isinstance(part, RuleTransformation)}


def extras(tx: GradientTransformation) -> frozenset[str] | None:
    """Names of the extra arguments that a transformation takes; None if something in it may take any.

    Args:
      tx: the transformation.

    Returns:
      The names.

    Example:
      >>> import functional_optim as fo
      >>> extras(fo.sgd(0.1))
      frozenset()
    """
    found = parts(tx)
    if len(rules(tx)) < len(found):
        return None
    return frozenset(name for rule in rules(tx).values() for name in rule.bound.rule.extras)


def rewrite(
    tx: GradientTransformation, fn: Callable[[Path, RuleTransformation], GradientTransformation]
) -> GradientTransformation:
    """The same transformation with its rules replaced.

    Args:
      tx: the transformation.
      fn: is given each rule-made transformation and its path, and returns what takes its place.

    Returns:
      The transformation.

    Example:
      >>> import functional_optim as fo
      >>> rewrite(fo.sgd(0.1), lambda path, rule: rule.replace(learning_rate=Option("lr")))
      chain(chain(), scale_by_learning_rate(learning_rate=Option(name='lr', index=None)))
    """
    return tx._rewrite(lambda path, inner: fn(path, inner) if isinstance(inner, RuleTransformation) else inner, ())


def members(tx: GradientTransformation) -> tuple[GradientTransformation, ...]:
    """The members of a chain; another transformation is the only member of its own.

    Args:
      tx: the transformation.

    Returns:
      The members.

    Example:
      >>> import functional_optim as fo
      >>> members(fo.scale(2.0))
      (scale(step_size=2.0),)
    """
    return tx.members if isinstance(tx, Chain) else (tx,)


@dataclass(frozen=True)
class MeshShard:
    """Joins the parts of DTensors that are sharded over some dimensions of a device mesh."""

    mesh: Any
    dims: tuple[int, ...]

    def combine(self, partials: torch.Tensor, kind: str) -> None:
        """Reduces numbers over the processes of these dimensions, in place."""
        op = {"sum": torch.distributed.ReduceOp.SUM, "amax": torch.distributed.ReduceOp.MAX}[kind]
        for dim in self.dims:
            torch.distributed.all_reduce(partials, op, self.mesh.get_group(dim))


def _distributed(x: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def _shard(p: Any) -> Shard | None:
    if not _distributed(p):
        return None
    dims = tuple(k for k, placement in enumerate(p.placements) if not placement.is_replicate())
    return MeshShard(p.device_mesh, dims) if dims else None


def local(x: Any) -> Any:
    """The plain real tensor that holds a tensor's elements, or this process's part of them.

    Args:
      x: a tensor.

    Returns:
      A view of it.

    Example:
      >>> local(torch.zeros(2, dtype=torch.complex64)).shape
      torch.Size([2, 2])
    """
    x = getattr(x, "_local_tensor", x)  # of a DTensor; `to_local` asks autograd first, for microseconds
    return torch.view_as_real(x) if x.is_complex() else x


LOCAL = attrgetter("_local_tensor")


class _Layout:
    """A plan, and what it was made for."""

    def __init__(self, templates: Sequence[Template], leaves: Leaves, guarded: bool) -> None:
        self.templates, self.guarded = tuple(templates), guarded
        self.ids, self.tags = list(leaves.ids), list(leaves.tags)
        self.kinds, self.owners = list(leaves.templates), list(leaves.owners)
        self.foreign = [
            k for k, p in enumerate(leaves.params) if p.is_complex() or (type(p) not in PLAIN and local(p) is not p)
        ]
        self.all_sharded = all(_distributed(p) and not p.is_complex() for p in leaves.params)
        names = leaves.names()
        for name, p, g in zip(names, leaves.params, leaves.grads, strict=True):
            if g is not None and p.is_meta and not transforming():
                raise RuntimeError(
                    f"{name} is on meta and has no memory; give it some, with `model.to_empty(device=...)` and "
                    f"initial values, before the first step."
                )
        tree = OrderedDict(zip(names, leaves.params, strict=True))
        ordered, spec = flatten(tree)
        view = View(spec, tuple(ordered), (True,) * len(ordered))
        links: list[Link] = []
        scopes: list[int] = []
        self.keys: list[Keys] = []  # of each link
        self.paths: list[Path] = []
        steps = [False] * len(leaves.params)
        for t, template in enumerate(templates):
            part = template.tx._links(view.narrow([k == t for k in self.kinds]), ())
            links += part
            scopes += range(len(part))
            self.keys += [template.keys] * len(part)
            for link in part:
                if link.bound is not None and link.bound.uses_step:
                    steps = [a or b for a, b in zip(steps, link.seen, strict=True)]
        lists = self.lists(leaves)
        self.plan = plan = Plan(spec, names, lists, links, True, scopes)
        plan.options = self.owners
        plan.shards = [_shard(p) for p in leaves.params]
        plan.wholes = [
            local(p).numel() if s is None else p.numel() * (1 + p.is_complex())
            for p, s in zip(leaves.params, plan.shards, strict=True)
        ]
        last = [s for s in plan.segments if isinstance(s, Segment)][-1]
        for segment in plan.segments:
            if isinstance(segment, Segment):
                segment.counting = [Counting(segment is last and s, guarded) for s in steps]
        plan.counting = last.counting
        self.barriers = {id(s[1]): _Barrier(s[1], s[0], view) for s in plan.segments if not isinstance(s, Segment)}
        # leaves that no kernel sees; an empty part of a sharded tensor is seen, lest others should wait for it
        empty = [k for k in plan.present if plan.shards[k] is None and not local(leaves.params[k]).numel()]
        self.counters = [k for k in empty if steps[k]]

    def key(self, segment: Segment, stored: Stored) -> str:
        """What a slot is called in the state of a leaf."""
        if stored.key == "step":
            return "step"
        position, slot = stored.key
        key: str = self.keys[position][segment.links[position].path, slot]
        return key

    @functools.cached_property
    def spans_tree(self) -> bool:
        """Whether something is reduced over all leaves."""
        recipes = (r for s in self.plan.segments if isinstance(s, Segment) for r in s.recipes.values())
        return any(value.op.startswith("tree_") for recipe in recipes for value in recipe.program.values)

    def lists(self, leaves: Leaves) -> Lists:
        return {"updates": self.local(leaves.grads), "params": self.local(leaves.params)}

    def local(self, tensors: Sequence[Any]) -> Column:
        """The plain real tensors that hold the elements of one tensor per leaf."""
        if not self.foreign:
            return Column(tensors)
        if self.all_sharded:
            with contextlib.suppress(AttributeError):  # of None, where a gradient is missing
                return Column(map(LOCAL, tensors))
        column = list(tensors)
        for k in self.foreign:
            if column[k] is not None:
                column[k] = local(column[k])
        return Column(column)

    def match(self, templates: Sequence[Template], leaves: Leaves, guarded: bool) -> Lists | None:
        """The tensors of leaves, if they are like those it was made for."""
        same = (
            self.guarded == guarded
            and len(templates) == len(self.templates)
            and all(map(is_, templates, self.templates))
            and self.ids == leaves.ids
            and self.tags == list(leaves.tags)
            and self.kinds == leaves.templates
            and self.owners == leaves.owners
        )
        if not same:
            return None
        lists = self.lists(leaves)
        return lists if self.plan.fits(lists) else None


class _Barrier:
    """Keeps the state of a transformation that is not made of rules in the leaves' flat dicts.

    What has an entry for every parameter is split up between them; anything else, such as a counter, is written to
    all of them and read from the first.
    """

    def __init__(self, link: Link, position: int, view: View) -> None:
        self.link, self.view = link, view._replace(seen=link.seen)
        self.names = list(view.tree())
        state = link.tx.init(self.view.tree())
        self.values, self.spec = flatten(state, self.per_param)
        self.keys = [".".join((f"transformation_{position}", path)) for path in paths(self.spec)]
        for key, value in zip(self.keys, self.values, strict=True):
            if not self.per_param(value) and value is not None and not isinstance(value, (torch.Tensor, int, float)):
                raise TypeError(
                    f"the state of {link.tx!r:.60} holds {value!r:.60} ({key}), expected tensors and numbers, which is "
                    f"what the state of an optimizer can hold."
                )

    def per_param(self, x: Any) -> bool:
        return isinstance(x, Mapping) and list(x) == self.names

    def gather(self, states: Sequence[dict[str, Any]]) -> Any:
        """The transformation's state."""
        leaves = []
        for key, value in zip(self.keys, self.values, strict=True):
            if self.per_param(value):
                leaves.append(type(value)((n, s.get(key, value[n])) for n, s in zip(self.names, states, strict=True)))
            else:
                leaves.append(next((s[key] for s in states if key in s), value))
        return unflatten(self.spec, leaves)

    def scatter(self, state: Any, states: Sequence[dict[str, Any]], present: Sequence[int]) -> None:
        """Puts a new state away."""
        for key, value in zip(self.keys, leaves_like(self.spec, state), strict=True):
            split = self.per_param(value)
            # what belongs to all is kept by all, lest a parameter without a gradient should keep an old one
            holders = present if split else [i for i, s in enumerate(states) if i in present or key in s]
            for i in holders:
                x = value[self.names[i]] if split else value
                if isinstance(x, (torch.Tensor, int, float)):
                    states[i][key] = x.clone() if isinstance(x, torch.Tensor) and not split else x


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
        self.layouts: list[_Layout] = []
        self.new: set[Any] = set()  # parameters that have state, but have not taken their first step

    def layout(
        self, templates: Sequence[Template], leaves: Leaves, guarded: bool, seen: bool
    ) -> tuple["_Layout", Lists]:
        """The layout of leaves, and their tensors."""
        if not seen:
            for layout in self.layouts:
                lists = layout.match(templates, leaves, guarded)
                if lists is not None:
                    return layout, lists
        layout = _Layout(templates, leaves, guarded)
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
    ) -> None:
        """Takes a step.

        Args:
          templates: the transformations.
          leaves: the parameters, gradients and states.
          options: mappings that hyper-parameters are looked up in.
          extra: extra arguments that rules take.
          guarded: whether `extra` has `grad_scale`, which gradients are divided by, and `found_inf`: if it is not 0,
            everything stays as it is.

        Raises:
          ValueError, TypeError: a tensor does not fit; nothing has been written.
        """
        extra = extra or {}
        seen = transforming()
        layout, lists = self.layout(templates, leaves, guarded, seen)
        if layout.spans_tree and len(leaves.params) == 1 and torch._C._current_graph_task_id() >= 0:
            raise RuntimeError(
                "this chain reduces over the whole tree, so it needs the gradients of all parameters at once, but it "
                "was given one parameter while its gradient is computed; call `step` after the backward pass."
            )
        made: list[tuple[dict[str, Any], str]] = []
        new = set(self.new)
        writes: list[Callable[[], None]] = []  # of all but the last program, which must be known to fit before
        segments = layout.plan.segments
        try:
            for segment in segments:
                if isinstance(segment, Segment):
                    _columns(segment, layout, lists, leaves, options, made, new)
                    first = [i for i in layout.plan.present if leaves.ids[i] in new] if new else []
                    later = None if segment is segments[-1] else writes
                    run_segment(segment, layout, lists, leaves, options, extra, seen, frozenset(first), later)
                else:
                    barrier = layout.barriers[id(segment[1])]
                    state = run_barrier(segment[1], layout.plan, lists, barrier.gather(leaves.states), extra)
                    if not (guarded and float(extra["found_inf"])):
                        put = functools.partial(barrier.scatter, state, leaves.states, layout.plan.present)
                        writes.append(put)
            for write in writes:
                write()
        except BaseException:
            for state, key in made:
                del state[key]
            raise
        # nothing waits for a device but the first step, and leaves without elements
        taken = not (guarded and (new or layout.counters) and float(extra["found_inf"]))
        if taken:
            self.new = new - {leaves.ids[i] for i in layout.plan.present}
            for i in layout.counters:
                leaves.states[i]["step"] += 1
        else:  # the step after this one is the first
            for state, key in made:
                del state[key]


def _columns(
    segment: Segment,
    layout: _Layout,
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
    for stored in segment.stored:
        key = layout.key(segment, stored)
        column: list[Any] | None = None
        if everyone:
            with contextlib.suppress(KeyError):
                column = list(map(itemgetter(key), leaves.states))
        if column is None:
            column = [state.get(key) for state in leaves.states]
            missing = [i for i in layout.plan.present if stored.seen[i] and column[i] is None]
            fresh = [_make(segment, stored, leaves, i, options) for i in missing]
            # autograd does not record what is written to a view made while it did not record
            for i, x in zip(missing, fresh if torch.is_grad_enabled() else _pack(fresh), strict=True):
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
        if _distributed(x):
            x._local_tensor = part
        packed.append(x if _distributed(x) else part)
    return packed


def run_segment(
    segment: Segment,
    layout: _Layout,
    lists: Lists,
    leaves: Leaves,
    options: Sequence[Mapping[str, Any]],
    extra: Mapping[str, Any],
    seen: bool,
    first: frozenset[int],
    later: list[Callable[[], None]] | None = None,
) -> None:
    """Runs fused transformations over leaves, in place; or, if there is a list `later`, leaves the writing to it."""
    plan = layout.plan
    plan.first = first
    for name, schedule in _hosts(segment):
        lists[name] = _host_column(name, schedule, leaves, plan)
    prepared = segment.prepare(plan, lists, remember=not seen)
    tables = [
        [_row(row, options[owner], is_first, extra) for row, (owner, is_first) in zip(g.sources, g.owners, strict=True)]
        for g in prepared.groups
    ]
    reference = reference_reason(plan, prepared, tables, seen)
    donate = later is None and (not reference or not (seen or torch.is_grad_enabled()))
    before = {key: lists[key] for key in ("params", *(s.key for s in segment.stored))} if not donate else {}
    if donate:
        prepared.check_overlap(plan, lists)
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


def _copy(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for old, new in pairs:
        old.copy_(new)


def _make(
    segment: Segment, stored: Stored, leaves: Leaves, i: int, options: Sequence[Mapping[str, Any]]
) -> torch.Tensor:
    p = leaves.params[i]
    if stored.key == "step":
        return torch.zeros((), dtype=torch.float32, device=p.device)
    values = segment.bounds[stored.key[0]].values
    chosen = options[leaves.owners[i]]
    needed = {k: v for k, v in values.items() if k in (stored.slot.start, stored.slot.dtype)}
    hypers = {k: v.look_up(chosen) if isinstance(v, Option) else v for k, v in needed.items()}
    with torch.no_grad():
        made: torch.Tensor = stored.slot.make(p, hypers)
    return made


def _hosts(segment: Segment) -> Iterator[tuple[str, Callable[[int], Any]]]:
    for recipe in segment.recipes.values():
        yield from recipe.hosts.items()


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


def _row(
    sources: Sequence[Source], options: Mapping[str, Any], first: bool, extra: Mapping[str, Any]
) -> list[float | torch.Tensor]:
    """A row of the scalar table."""
    row: list[float | torch.Tensor] = []
    for source in sources:
        if source.kind == "option":  # nearly always a number that is there; there may be hundreds of rows
            option = source.value
            x = options.get(option.name)
            if option.index is not None:
                x = x[option.index] if type(x) is tuple and len(x) > option.index else None
            if type(x) is float:
                row.append(x)
                continue
        row.append(_scalar(source, options, first, extra))
    return row


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
