"""Running a transformation: from trees to calls of kernels, and back.

The first call with some structure, shapes and dtypes checks everything and prepares tables; that is where errors
name a leaf by its path. Later calls only make sure that nothing has changed.
"""

import contextlib
import contextvars
import functools
import itertools
import os
import struct
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ._base import GradientTransformation, Link
from ._fuse import Recipe, Source, fuse
from ._spec import Bound, Slot
from ._tree import MaskedNode, Tree, View, at, check_leaf, difference, flatten, leaves_like, paths, unflatten
from .kernels import BACKENDS, BuildError, Call, Column
from .kernels.build import find_compiler
from .kernels.guard import Guard
from .kernels.layout import Extents, compute_dtype, repeats, span, walk_together
from .kernels.plan import Signature


_requested: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Chooses who computes updates within a `with` block.

    Where the chosen backend does not apply (Triton without a GPU, anything but the reference under a gradient), the
    next best one does; `explain` says which and why.

    Args:
      name: `"reference"`, `"foreach"`, `"c"` or `"triton"`.

    Yields:
      Nothing.

    Raises:
      ValueError: the name is unknown.

    Example:
      >>> with use_backend("reference"):
      ...     pass
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(map(repr, BACKENDS))}.")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


@functools.cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose_backend(device: torch.device) -> tuple[str, str]:
    """The backend for tensors of a plain kind on one device, and why it is not the one asked for."""
    asked = _requested.get()
    why = ""
    if asked in ("reference", "foreach"):
        return asked, ""
    if asked == "triton" or (asked is None and device.type == "cuda"):
        if _has_triton() and (device.type == "cuda" or (device.type == "cpu" and _interpreted())):
            return "triton", ""
        why = f"Triton {'does not run on ' + device.type if _has_triton() else 'is not installed'}"
    elif device.type == "cpu":
        if find_compiler() is not None:
            return "c", ""
        why = "there is no C compiler: neither $CC nor cc, gcc or clang is on the PATH"
        _warn_once(why)
    else:
        why = f"there is no C kernel for {device.type}"
    return ("foreach" if device.type in ("cpu", "cuda") else "reference"), why


@functools.cache
def _warn_once(why: str) -> None:
    warnings.warn(f"Updates are computed without generated kernels, and slower: {why}.", stacklevel=2)


def transforming() -> bool:
    """Whether something looks on that raw memory would escape: `torch.func`, forward mode, a mode, the compiler."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
    )


def get_state(state: Any, path: Sequence[int | str]) -> Any:
    """The state at a path of indices and keys."""
    for k in path:
        state = state[k]
    return state


def set_states(state: Any, new: Mapping[tuple[int | str, ...], Any]) -> Any:
    """The same nest of states with some of them replaced."""
    if not new:
        return state
    if () in new:
        return new[()]
    by_key: dict[int | str, dict[tuple[int | str, ...], Any]] = {}
    for path, value in new.items():
        by_key.setdefault(path[0], {})[path[1:]] = value
    if isinstance(state, Mapping):
        return type(state)({k: set_states(v, by_key.get(k, {})) for k, v in state.items()})  # type: ignore[call-arg]
    items = [set_states(v, by_key.get(k, {})) for k, v in enumerate(state)]
    return type(state)(*items) if hasattr(state, "_fields") else type(state)(items)


SlotKey = tuple[int, str]
Lists = dict[Any, Column]  # "updates", "params" and slots -> a leaf's tensor at its position in the tree


class Places(NamedTuple):
    """Which tensors make a column: for each leaf of a group, the list that its tensor is in and the position there.

    Args:
      pairs: lists and positions.
      whole: the list, if the column is all of it.
    """

    pairs: tuple[tuple[Any, int], ...]
    whole: Any = None

    @classmethod
    def of(cls, pairs: Sequence[tuple[Any, int]], n_leaves: int) -> "Places":
        whole = [i for _, i in pairs] == list(range(n_leaves)) and len({key for key, _ in pairs}) == 1
        return cls(tuple(pairs), pairs[0][0] if whole else None)

    def gather(self, lists: Lists) -> Column:
        if self.whole is not None:
            return lists[self.whole]
        return Column(lists[key][i] for key, i in self.pairs)

    def scatter(self, column: Column, lists: Lists) -> None:
        if self.whole is not None:
            lists[self.whole] = column
        else:
            for x, (key, i) in zip(column, self.pairs, strict=True):
                lists[key][i] = x


class Group(NamedTuple):
    """Leaves that share a program, its dtypes and a device.

    Args:
      signature: the program and its dtypes.
      device: the device.
      leaves: positions of the leaves in the tree.
      inputs: where each input of the program is.
      outputs: where each output goes.
      sources: for each row of the scalar table, where its numbers come from.
      rows: each leaf's row.
      sizes: each leaf's number of elements.
      copied: places in the group of leaves whose arrays a kernel cannot walk side by side, so that they are copied.
    """

    signature: Signature
    device: torch.device
    leaves: tuple[int, ...]
    inputs: tuple[Places, ...]
    outputs: tuple[Places, ...]
    sources: tuple[tuple[Source, ...], ...]
    rows: tuple[int, ...]
    sizes: tuple[int, ...]
    copied: tuple[int, ...]


class Segment:
    """Neighbouring rule-made transformations: one program for each kind of leaf.

    Args:
      links: the transformations and their positions in the chain.
      apply: whether the programs end by adding updates to parameters.
    """

    def __init__(self, links: Mapping[int, Link], apply: bool) -> None:
        self.links, self.apply = links, apply
        self.bounds: dict[int, Bound] = {k: link.bound for k, link in links.items() if link.bound is not None}
        self.slots: list[SlotKey] = [(k, name) for k, bound in self.bounds.items() for name in bound.rule.slots]
        self.recipes: dict[tuple[int, ...], Recipe] = {}
        self.recent: list[Prepared] = []

    def recipe(self, leaf: int) -> tuple[tuple[int, ...], Recipe]:
        """Which transformations see a leaf, and their program."""
        active = tuple(k for k, link in self.links.items() if link.seen[leaf])
        if active not in self.recipes:
            self.recipes[active] = fuse([(k, self.bounds[k]) for k in active], self.apply)
        return active, self.recipes[active]

    def states(self, state: Any) -> dict[int, Any]:
        """The state of each transformation.

        Raises:
          TypeError: the state was made by another transformation.
        """
        states = {}
        for k, bound in self.bounds.items():
            path = self.links[k].path
            try:
                found = get_state(state, path)
            except (KeyError, IndexError, TypeError):
                found = None
            if type(found) is not bound.state_type:
                where = "".join(f"[{key!r}]" for key in path)
                raise TypeError(
                    f"state{where} is {type(found).__name__}, expected the {bound.state_type.__name__} of "
                    f"{bound.rule.name}; make the state with `init` of the same transformation."
                )
            states[k] = found
        return states


class Disjoint(NamedTuple):
    """Addresses that were found not to overlap.

    Args:
      written: addresses of what is written.
      read: addresses of updates.
      extents: the stretches of memory written.
      spans: lengths of the updates in bytes.
    """

    written: bytes
    read: bytes
    extents: Extents
    spans: tuple[int, ...]


class Prepared:
    """A segment prepared for leaves of certain dtypes, shapes and layouts. Refuses what no kernel may be handed."""

    def __init__(self, segment: Segment, plan: "Plan", lists: Lists) -> None:
        self.present = plan.present
        for key in segment.slots:
            bound = segment.bounds[key[0]]
            for i in self.present:
                if segment.links[key[0]].seen[i]:
                    name = f"state {bound.rule.name}.{key[1]}"
                    _check_slot(name, plan.paths[i], lists[key][i], lists["updates"][i], bound.rule.slots[key[1]])
        self.checked: list[tuple[Any, int]] = [
            (key, i) for key in segment.slots for i in self.present if segment.links[key[0]].seen[i]
        ]
        if plan.later:  # updates that came from another transformation
            self.checked += [("updates", i) for i in self.present]
        keys: list[Any] = list(dict.fromkeys(key for key, _ in self.checked))
        whole = len(self.checked) == len(keys) * len(lists["updates"])
        self.whole: list[Any] | None = keys if whole else None
        tensors = self.tensors(lists)
        self.guard = Guard(tensors)
        self.requires_grad = any(x.requires_grad for x in tensors)
        self.tracks_versions = not any(x.is_inference() for x in tensors)
        members: dict[Any, list[tuple[int, tuple[int, ...], Recipe]]] = {}
        for i in self.present:
            active, recipe = segment.recipe(i)
            u, p = lists["updates"][i], lists["params"][i] if "params" in lists else None
            if u.numel() and (active or segment.apply):
                dtypes = _dtypes(recipe, lists, i, u, p)
                members.setdefault((Signature(recipe.program, *dtypes), u.device), []).append((i, active, recipe))
        self.groups = [_group(signature, device, m, lists) for (signature, device), m in members.items()]
        self.moving = [
            k
            for k, bound in segment.bounds.items()
            if bound.counted and any(segment.links[k].seen[i] for i in self.present)
        ]
        self.disjoint: Disjoint | None = None
        self.kept: tuple[list[int], bytes, list[Any]] | None = None

    def holds(self, plan: "Plan", lists: Lists) -> bool:
        """Whether these leaves are like those it was prepared for."""
        if self.present != plan.present:
            return False
        tensors = self.tensors(lists)
        return self.unmoved(lists, tensors) or self.guard.holds(tensors)

    def keep(self, lists: Lists) -> None:
        """Remembers the tensors that a donated step has just written: the next step most likely brings them back."""
        if self.whole is None or (self.kept is not None and self.unmoved(lists, self.tensors(lists))):
            return
        tensors = self.tensors(lists)
        mine = weakref.ref(self)

        def forget(_: Any) -> None:  # the identity of a dead tensor may be given to another
            if (prepared := mine()) is not None:
                prepared.kept = None

        refs = [weakref.ref(x, forget) for x in tensors]
        self.kept = (list(map(id, tensors)), self.addresses(lists), refs)

    def unmoved(self, lists: Lists, tensors: list[Any]) -> bool:
        """Whether these are the very tensors of the last donated step, each where it was in memory.

        It saves looking at what else they are, which costs more than updating them if they are many and small.
        """
        kept = self.kept
        return kept is not None and list(map(id, tensors)) == kept[0] and self.addresses(lists) == kept[1]

    def addresses(self, lists: Lists) -> bytes:
        assert self.whole is not None
        return b"".join(lists[key].addresses for key in self.whole)

    def tensors(self, lists: Lists) -> list[Any]:
        """The tensors that must stay alike."""
        if self.whole is not None:
            return list(itertools.chain.from_iterable(lists[key] for key in self.whole))
        return [lists[key][i] for key, i in self.checked]

    def check_overlap(self, plan: "Plan", lists: Lists) -> None:
        """Refuses to write to memory that two leaves share.

        Raises:
          ValueError: with the paths of both.
        """
        columns = [c.gather(lists) for g in self.groups for c in g.outputs]
        reads = [_updates_of(g, lists) for g in self.groups]
        written, read = b"".join(c.addresses for c in columns), b"".join(c.addresses for c in reads)
        known = self.disjoint  # of this or another thread, so looked at once
        if known is not None and known.written == written and known.read == read:
            return
        if known is not None and known.written == written:
            extents, spans = known.extents, known.spans
        else:
            named = [
                (f"{_label(g, k)}{at(plan.paths[i])}", x)
                for g, outs in _per_group(self.groups, columns)
                for k, column in enumerate(outs)
                for i, x in zip(g.leaves, column, strict=True)
            ]
            repeated = next((name for name, x in named if repeats(x)), None)
            if repeated is not None:
                raise ValueError(
                    f"{repeated} is an expanded tensor, several of whose elements are one place in memory, so "
                    f"donate=True cannot write to it; pass `x.clone()`."
                )
            extents, spans = Extents(named), tuple(span(x) for c in reads for x in c)
        clash = extents.clash()
        if clash is None:
            touched = extents.touched(struct.unpack(f"{len(spans)}q", read), spans)
            if touched is not None:
                leaf = [i for g in self.groups for i in g.leaves][touched[0]]
                clash = f"updates{at(plan.paths[leaf])}", touched[1]
        if clash is not None:
            raise ValueError(
                f"{clash[0]} and {clash[1]} share memory, so donate=True, which writes in place, would corrupt them. "
                f"Pass a tied parameter once, clone one of the two, or use donate=False."
            )
        self.disjoint = Disjoint(written, read, extents, spans)


def _per_group(groups: Sequence[Group], columns: Sequence[Column]) -> Iterator[tuple[Group, Sequence[Column]]]:
    start = 0
    for g in groups:
        yield g, columns[start : start + len(g.outputs)]
        start += len(g.outputs)


def _label(group: Group, output: int) -> str:
    name = group.signature.program.outputs[output].name
    return name if name == "params" else f"state {name}"


def _check_slot(name: str, path: str, x: Any, u: torch.Tensor, slot: Slot) -> None:
    """Refuses a stored tensor that does not go with its leaf."""
    check_leaf(name, path, x)
    if slot.per_leaf:
        if x.ndim:
            raise ValueError(f"{name}{at(path)} has shape {tuple(x.shape)}, expected one number.")
    elif x.shape != u.shape:
        raise ValueError(f"{name}{at(path)} has shape {tuple(x.shape)}, but its update has {tuple(u.shape)}.")
    if x.device != u.device:
        raise ValueError(f"{name}{at(path)} is on {x.device}, but its update is on {u.device}; move one of them.")


def _dtypes(
    recipe: Recipe, lists: Lists, i: int, u: torch.Tensor, p: torch.Tensor | None
) -> tuple[tuple[torch.dtype, ...], tuple[torch.dtype, ...], torch.dtype]:
    """Storage dtypes of inputs and outputs for one leaf, and the dtype computed in."""
    program = recipe.program
    ins = tuple(lists[recipe.slots.get(n, n)][i].dtype for n in (*program.arrays, *program.leaves))
    new = u.dtype if p is None else torch.promote_types(u.dtype, p.dtype)
    outs = tuple(
        new if o.name == "updates" else lists[recipe.slots.get(o.name, o.name)][i].dtype for o in program.outputs
    )
    return ins, outs, compute_dtype((*ins, *outs))


def _group(
    signature: Signature, device: torch.device, members: Sequence[tuple[int, tuple[int, ...], Recipe]], lists: Lists
) -> Group:
    program = signature.program
    rows: dict[tuple[int, ...], int] = {}
    sources = []
    for _, active, recipe in members:
        if active not in rows:
            rows[active] = len(rows)
            sources.append(recipe.scalars)
    leaves = tuple(i for i, _, _ in members)
    updates = lists["updates"]

    def places(name: str) -> Places:
        return Places.of([(recipe.slots.get(name, name), i) for i, _, recipe in members], len(updates))

    inputs = [places(name) for name in (*program.arrays, *program.leaves)]
    copied = []
    if device.type != "meta":
        for k, i in enumerate(leaves):
            tensors = [lists[key][j] for key, j in (column.pairs[k] for column in inputs[: len(program.arrays)])]
            if not walk_together((updates[i], *tensors)):
                copied.append(k)
    return Group(
        signature,
        device,
        leaves,
        tuple(inputs),
        tuple(places(o.name) for o in program.outputs),
        tuple(sources),
        tuple(rows[active] for _, active, _ in members),
        tuple(updates[i].numel() for i in leaves),
        tuple(copied),
    )


class Plan:
    """A transformation laid out over a tree of certain shapes: segments between barriers."""

    def __init__(self, tx: GradientTransformation, apply: bool, updates: Tree, params: Tree | None) -> None:
        leaves, self.spec = flatten(updates if params is None else params)
        self.paths = paths(self.spec)
        self.lists(updates, params, explain=True)
        lists = self.lists(updates, params)
        us, ps = lists["updates"], lists.get("params")
        self.present = tuple(i for i, x in enumerate(us) if x is not None and leaves[i] is not None)
        self.absent = tuple(i for i, x in enumerate(us) if x is None or leaves[i] is None)
        for i in self.present:
            u = check_leaf("updates", self.paths[i], us[i])
            if ps is not None:
                p = check_leaf("params", self.paths[i], ps[i])
                if u.shape != p.shape:
                    raise ValueError(
                        f"updates{at(self.paths[i])} has shape {tuple(u.shape)}, but its parameter has "
                        f"{tuple(p.shape)}."
                    )
                if u.device != p.device:
                    raise ValueError(
                        f"updates{at(self.paths[i])} is on {u.device}, but its parameter is on {p.device}; "
                        f"move one of them."
                    )
        tensors = self.tensors(lists)
        self.guard = Guard(tensors)
        self.requires_grad = any(x.requires_grad for x in tensors)
        self.tracks_versions = not any(x.is_inference() for x in tensors)
        self.links = tx._links(View(self.spec, tuple(leaves), tuple(x is not None for x in leaves)), ())
        self.segments = self._segments(apply)
        self.later = len(self.segments) > 1
        if ps is None:
            for link in self.links:
                if link.bound is not None and link.bound.rule.uses_params:
                    raise ValueError(
                        f"{link.bound.rule.name} needs the parameters: call `update(updates, state, params)`."
                    )

    def _segments(self, apply: bool) -> list[Segment | tuple[int, Link]]:
        segments: list[Segment | tuple[int, Link]] = []
        numbered = list(enumerate(self.links))
        for fusible, run in itertools.groupby(numbered, key=lambda x: x[1].bound is not None):
            part = list(run)
            if fusible:
                last = part[-1][0] == len(numbered) - 1
                segments.append(Segment(dict(part), apply and last))
            else:
                segments.extend(part)
        if apply and not (segments and isinstance(segments[-1], Segment)):
            segments.append(Segment({}, apply=True))
        return segments

    def lists(self, updates: Tree, params: Tree | None, explain: bool = False) -> Lists:
        """The leaves of both trees.

        Raises:
          ValueError: a tree has another structure.
        """
        lists: Lists = {}
        for name, tree in (("updates", updates), ("params", params)):
            if name == "updates" or tree is not None:
                try:
                    lists[name] = Column(leaves_like(self.spec, tree))
                except (ValueError, TypeError):
                    if not explain:
                        raise
                    raise ValueError(
                        f"{name} does not have the structure of params: {difference(self.spec, tree)}."
                    ) from None
        return lists

    def tensors(self, lists: Lists) -> list[Any]:
        """The updates that are there, and the parameters they belong to."""
        columns = [lists["updates"], *([lists["params"]] if "params" in lists else [])]
        if not self.absent:
            return list(itertools.chain.from_iterable(columns))
        return [column[i] for column in columns for i in self.present]

    def match(self, updates: Tree, params: Tree | None) -> Lists | None:
        """The leaves of both trees, if they are like those of the trees that this plan was made for."""
        try:
            lists = self.lists(updates, params)
        except (ValueError, TypeError):
            return None
        if any(
            lists["updates"][i] is not None and lists.get("params", lists["updates"])[i] is not None
            for i in self.absent
        ):
            return None
        return lists if self.guard.holds(self.tensors(lists)) else None


class Executor:
    """Runs one transformation; remembers the plans of its last trees."""

    KEEP = 8

    def __init__(self, tx: GradientTransformation, apply: bool) -> None:
        self.tx, self.apply = tx, apply
        self.plans: list[Plan] = []

    def __call__(
        self, updates: Tree, state: Any, params: Tree | None, extra: Mapping[str, Any], donate: bool
    ) -> tuple[Tree, Any]:
        seen = transforming()
        plan, lists = self.plan(updates, params, remember=not seen)
        differentiable = torch.is_grad_enabled()
        if donate and (seen or (differentiable and plan.requires_grad)):
            self.refuse_donation(plan, lists, seen)
        new_states: dict[tuple[int | str, ...], Any] = {}
        for segment in plan.segments:
            if isinstance(segment, Segment):
                last = segment is plan.segments[-1]
                run_segment(segment, plan, lists, state, new_states, extra, donate and last, seen)
            else:
                self.call(segment[1], plan, lists, state, new_states, extra)
        name = "params" if self.apply else "updates"
        tree = params if donate and self.apply else unflatten(plan.spec, lists[name])
        return tree, set_states(state, new_states)

    def plan(self, updates: Tree, params: Tree | None, remember: bool) -> tuple[Plan, Lists]:
        if remember:
            for plan in self.plans:
                lists = plan.match(updates, params)
                if lists is not None:
                    return plan, lists
        plan = Plan(self.tx, self.apply, updates, params)
        if remember:
            self.plans = [plan, *self.plans[: self.KEEP - 1]]
        return plan, plan.lists(updates, params)

    @staticmethod
    def refuse_donation(plan: Plan, lists: Lists, seen: bool) -> None:
        if seen:
            raise RuntimeError(
                "donate=True writes in place, which a torch.func transformation or torch.compile cannot follow; "
                "use donate=False."
            )
        path = next(
            plan.paths[i] for i in plan.present for x in (lists["params"][i], lists["updates"][i]) if x.requires_grad
        )
        raise RuntimeError(
            f"params{at(path)} or its update requires a gradient, and donate=True would write to it while autograd is "
            f"recording; wrap the step in `torch.no_grad()`, or use donate=False to differentiate through it."
        )

    @staticmethod
    def call(
        link: Link, plan: Plan, lists: Lists, state: Any, new_states: dict[Any, Any], extra: Mapping[str, Any]
    ) -> None:
        """Runs a transformation that is not made of rules."""
        view = View(plan.spec, tuple(lists["updates"]), link.seen)
        params = view.tree(lists["params"]) if "params" in lists else None
        tree, new_states[link.path] = link.tx.update(view.tree(), get_state(state, link.path), params, **extra)
        out = leaves_like(plan.spec, tree)
        lists["updates"] = Column(
            x if seen and not isinstance(x, MaskedNode) else u
            for x, u, seen in zip(out, lists["updates"], link.seen, strict=True)
        )
        for i in plan.present:
            x = check_leaf(f"the update that {link.tx!r:.60} returned", plan.paths[i], lists["updates"][i])
            if "params" in lists and x.shape != lists["params"][i].shape:
                raise ValueError(
                    f"the update that {link.tx!r:.60} returned{at(plan.paths[i])} has shape {tuple(x.shape)}, but its "
                    f"parameter has {tuple(lists['params'][i].shape)}."
                )


def run(
    tx: GradientTransformation,
    apply: bool,
    updates: Tree,
    state: Any,
    params: Tree | None,
    extra: Mapping[str, Any],
    donate: bool,
) -> tuple[Tree, Any]:
    """Runs a transformation; under `torch.compile` as one call that the compiler does not look into.

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
    if "torch._dynamo" not in sys.modules:  # importing it takes seconds, and without it nothing is compiled
        return _run(tx, apply, updates, state, params, extra, donate)
    if not _opaque:
        _opaque.append(torch.compiler.disable(_run))  # type: ignore[no-untyped-call]
    return _opaque[0](tx, apply, updates, state, params, extra, donate)


def _run(
    tx: GradientTransformation,
    apply: bool,
    updates: Tree,
    state: Any,
    params: Tree | None,
    extra: Mapping[str, Any],
    donate: bool,
) -> tuple[Tree, Any]:
    return executor(tx, apply)(updates, state, params, extra, donate)


_opaque: list[Callable[..., tuple[Tree, Any]]] = []  # the compiler would look through a functools.cache


@functools.lru_cache(maxsize=256)
def executor(tx: GradientTransformation, apply: bool) -> Executor:
    """The executor of a transformation; equal transformations share it."""
    return Executor(tx, apply)


def run_segment(
    segment: Segment,
    plan: Plan,
    lists: Lists,
    state: Any,
    new_states: dict[Any, Any],
    extra: Mapping[str, Any],
    donate: bool,
    seen: bool,
) -> None:
    """Runs fused transformations: new updates or parameters go to `lists`, new states to `new_states`."""
    states = segment.states(state)
    for k, name in segment.slots:
        lists[k, name] = _slot_leaves(plan, segment.bounds[k], name, getattr(states[k], name))
    prepared = None if seen else next((p for p in segment.recent if p.holds(plan, lists)), None)
    if prepared is None:
        prepared = Prepared(segment, plan, lists)
        if not seen:
            segment.recent = [prepared, *segment.recent[: Executor.KEEP - 1]]
    tables = [[_scalars(row, segment, states, extra) for row in g.sources] for g in prepared.groups]
    reference = reference_reason(plan, prepared, tables, seen)
    if donate:
        if torch.is_grad_enabled() and prepared.requires_grad:
            raise RuntimeError("a state tensor requires a gradient, so donate=True cannot write to it.")
        if not reference:
            prepared.check_overlap(plan, lists)
    compute(prepared, tables, lists, donate, bool(reference))
    if donate:
        for k in prepared.moving:
            states[k].count.add_(1)
        prepared.keep(lists)
        return
    for k, bound in segment.bounds.items():
        fields = {name: unflatten(plan.spec, lists[k, name]) for name in bound.rule.slots} if plan.present else {}
        if k in prepared.moving:
            fields["count"] = states[k].count + 1
        if fields:
            new_states[segment.links[k].path] = states[k]._replace(**fields)


def _slot_leaves(plan: Plan, bound: Bound, name: str, tree: Tree) -> Column:
    try:
        return Column(leaves_like(plan.spec, tree))
    except (ValueError, TypeError):
        raise ValueError(
            f"state {bound.rule.name}.{name} does not have the structure of params: {difference(plan.spec, tree)}."
        ) from None


def _scalars(
    sources: Sequence[Source], segment: Segment, states: Mapping[int, Any], extra: Mapping[str, Any]
) -> list[float | torch.Tensor]:
    """One row of the scalar table."""
    row: list[float | torch.Tensor] = []
    for kind, link, name, value in sources:
        if kind == "value":
            row.append(value)
        elif kind == "count":
            row.append(states[link].count)
        elif kind == "host":
            row.append(_number(f"the schedule of {name} returned", value(int(states[link].count))))
        else:
            if name not in extra:
                raise TypeError(
                    f"{segment.bounds[link].rule.name} needs the extra argument `{name}`: call "
                    f"`update(updates, state, params, {name}=...)`."
                )
            row.append(_number(f"the extra argument `{name}` is", extra[name]))
    return row


def _number(what: str, x: Any) -> float | torch.Tensor:
    if isinstance(x, torch.Tensor):
        if x.ndim:
            raise ValueError(f"{what} a tensor of shape {tuple(x.shape)}, expected a number.")
        return x
    try:
        return float(x)
    except (TypeError, ValueError):
        raise ValueError(f"{what} {x!r:.60}, expected a number.") from None


def reference_reason(plan: Plan, prepared: Prepared, tables: Sequence[Any], seen: bool) -> str:
    """Why only the reference can compute a segment, or an empty string."""
    if seen:
        return "a torch.func transformation or torch.compile is looking on"
    if not (plan.guard.plain and prepared.guard.plain):
        return "some tensors are on meta or of a class of their own"
    if torch.is_grad_enabled():
        scalars = (x for table in tables for row in table for x in row)
        if (
            plan.requires_grad
            or prepared.requires_grad
            or any(isinstance(x, torch.Tensor) and x.requires_grad for x in scalars)
        ):
            return "a tensor requires a gradient and autograd is recording"
    values = (v for g in prepared.groups for v in g.signature.program.values)
    if len({g.device for g in prepared.groups}) > 1 and any(v.op.startswith("tree_") for v in values):
        return "a reduction over the tree spans several devices"
    return ""


def compute(prepared: Prepared, tables: Sequence[Any], lists: Lists, donate: bool, reference: bool) -> None:
    """Evaluates the programs of a segment and puts what they write into `lists`."""
    results: dict[int, list[Column]] = {}
    by_device: dict[torch.device | None, list[int]] = {}
    for k, group in enumerate(prepared.groups):
        by_device.setdefault(None if reference else group.device, []).append(k)
    for device, members in by_device.items():
        backend = "reference" if device is None else choose_backend(device)[0]
        groups = [prepared.groups[k] for k in members]
        if backend in ("c", "triton"):
            try:
                done = _run_kernels(backend, groups, [tables[k] for k in members], lists, donate)
                if donate and prepared.tracks_versions:
                    torch.autograd.graph.increment_version([x for columns in done for c in columns for x in c])
            except BuildError as error:
                _warn_once(str(error))
                backend = "foreach"
        if backend in ("reference", "foreach"):
            done = BACKENDS[backend]([_call(g, tables[k], lists, donate) for g, k in zip(groups, members, strict=True)])
        results.update(zip(members, done, strict=True))
    if not donate:  # the caller's lists are left as they are
        for group in prepared.groups:
            for places in group.outputs:
                if places.whole is None:
                    for key in {key for key, _ in places.pairs}:
                        lists[key] = Column(lists[key])
    for k, group in enumerate(prepared.groups):
        for places, column in zip(group.outputs, results[k], strict=True):
            places.scatter(column, lists)


def _updates_of(group: Group, lists: Lists) -> Column:
    updates = lists["updates"]
    return updates if len(group.leaves) == len(updates) else Column(updates[i] for i in group.leaves)


def _call(group: Group, table: Any, lists: Lists, donate: bool) -> Call:
    return Call(
        group.signature,
        _updates_of(group, lists),
        [places.gather(lists) for places in group.inputs],
        [places.gather(lists) if donate else None for places in group.outputs],
        table,
        group.rows,
        group.sizes,
    )


def _run_kernels(
    backend: str, groups: Sequence[Group], tables: Sequence[Any], lists: Lists, donate: bool
) -> list[list[Column]]:
    """Runs kernels. Arrays of a leaf that cannot be walked side by side are copied before, and back after."""
    calls = [_call(group, table, lists, donate) for group, table in zip(groups, tables, strict=True)]
    targets: list[tuple[int, int, int, torch.Tensor]] = []
    for g, (group, call) in enumerate(zip(groups, calls, strict=True)):
        if not group.copied:
            continue
        n_arrays = len(group.signature.program.arrays)
        inputs = [Column(column) for column in (call.like, *call.inputs)]
        outputs = [None if column is None else Column(column) for column in call.outputs]
        calls[g] = call = call._replace(like=inputs[0], inputs=inputs[1:], outputs=outputs)
        for k in group.copied:
            for column in inputs[: 1 + n_arrays]:
                column[k] = column[k].contiguous()
            for c, (places, given) in enumerate(zip(group.outputs, call.outputs, strict=True)):
                key, i = places.pairs[k]
                if lists[key][i].ndim or key == "updates":
                    targets.append((g, c, k, lists[key][i]))
                    if given is not None:
                        given[k] = torch.empty_like(given[k], memory_format=torch.contiguous_format)
    done = BACKENDS[backend](calls)
    for g, c, k, like in targets:
        new = done[g][c][k]
        done[g][c][k] = like.copy_(new) if donate else torch.empty_like(like, dtype=new.dtype).copy_(new)
    return done
