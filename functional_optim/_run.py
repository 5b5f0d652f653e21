"""Running a transformation: from trees to calls of kernels, and back.

The first call with some structure, shapes and dtypes makes a plan; later calls only make sure that nothing has
changed.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ._backend import choose_backend, give_up, transforming
from ._compiler.fuse import Source
from ._compiler.rule import Bound
from ._groups import Group, Lists
from ._plan import KEEP, Plan, Prepared, Segment, get_state, lists_of
from ._transform import GradientTransformation, Link
from ._tree import MaskedNode, Spec, Tree, View, at, check_fit, difference, flatten, unflatten
from .kernels import BACKENDS, BuildError, Call, Column


class Executor:
    """Runs one transformation; remembers the plans of its last trees."""

    def __init__(self, tx: GradientTransformation, apply: bool) -> None:
        self.tx, self.apply = tx, apply
        self.plans: list[Plan] = []

    def __call__(
        self, updates: Tree, state: Any, params: Tree | None, extra: Mapping[str, Any], donate: bool
    ) -> tuple[Tree, Any]:
        seen = transforming()
        # a donated step returns its very arguments; any other returns trees whose containers are those it was given
        spec = None if donate else flatten(updates if params is None else params)[1]
        plan, lists = self.plan(updates, params, spec, remember=not seen)
        differentiable = torch.is_grad_enabled()
        if donate and (seen or (differentiable and plan.requires_grad)):
            self.refuse_donation(plan, lists, seen)
        new_states: dict[tuple[int | str, ...], Any] = {}
        for segment in plan.segments:
            if isinstance(segment, Segment):
                last = segment is plan.segments[-1]
                run_segment(segment, plan, spec or plan.spec, lists, state, new_states, extra, donate and last, seen)
            else:
                link = segment[1]
                new_states[link.path] = run_barrier(link, plan, lists, get_state(state, link.path), extra)
        name = "params" if self.apply else "updates"
        tree = params if spec is None else unflatten(spec, lists[name])
        return tree, set_states(state, new_states)

    def plan(self, updates: Tree, params: Tree | None, spec: Spec | None, remember: bool) -> tuple[Plan, Lists]:
        if remember:
            for plan in self.plans:
                lists = plan.match(updates, params) if spec is None or spec == plan.spec else None
                if lists is not None:
                    return plan, lists
        plan = Plan.of(self.tx, self.apply, updates, params)
        if remember:
            self.plans = [plan, *self.plans[: KEEP - 1]]
        return plan, lists_of(plan.read, updates, params)

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


def run_barrier(link: Link, plan: Plan, lists: Lists, state: Any, extra: Mapping[str, Any]) -> Any:
    """Runs a transformation that is not made of rules; its updates go to `lists`.

    Returns:
      Its new state.

    Raises:
      TypeError, ValueError: it returned something else than updates and a state.
    """
    view = View(plan.spec, tuple(lists["updates"]), link.seen)
    params = view.tree(lists["params"]) if "params" in lists else None
    result = link.tx.update(view.tree(), state, params, **extra)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"{link.tx!r:.60} returned {result!r:.60} from `update`, expected (updates, state).")
    tree, new_state = result
    try:
        out = plan.read(tree)
    except (ValueError, TypeError):
        raise ValueError(
            f"the update that {link.tx!r:.60} returned does not have the structure of params: "
            f"{difference(plan.spec, tree)}."
        ) from None
    lists["updates"] = Column(
        x if seen and not isinstance(x, MaskedNode) else u
        for x, u, seen in zip(out, lists["updates"], link.seen, strict=True)
    )
    for i in plan.present:
        name = f"the update that {link.tx!r:.60} returned"
        check_fit(name, "parameter", plan.paths[i], lists["updates"][i], lists.get("params", lists["updates"])[i])
    return new_state


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
        reason = "functional_optim runs kernels of its own, so a step is a graph break; optimizers of adapters are none"
        _opaque.append(torch.compiler.disable(_run, reason=reason))  # type: ignore[no-untyped-call]
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


@functools.lru_cache(maxsize=256)
def executor(tx: GradientTransformation, apply: bool) -> Executor:
    """The executor of a transformation; equal transformations share it."""
    return Executor(tx, apply)


def run_segment(
    segment: Segment,
    plan: Plan,
    spec: Spec,
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
    prepared = segment.prepare(plan, lists, remember=not seen)
    tables = [[_scalars(row, segment, states, extra) for row in g.sources] for g in prepared.groups]
    if prepared.asks_python or runs_python(segment, plan, extra):
        prepared.check_again(plan, lists)
    reference = reference_reason(plan, prepared, tables, seen)
    if any(states[k].count.is_meta for k in prepared.moving) and not any(
        g.device.type == "meta" for g in prepared.groups
    ):
        raise ValueError("a counter of the state is on meta and has no memory; make the state anew with `init`.")
    if donate:
        if reference == GRADIENT:
            raise RuntimeError(
                "a hyper-parameter or a tensor of the state requires a gradient, and donate=True would write where "
                "autograd is recording; wrap the step in `torch.no_grad()`, or use donate=False."
            )
        prepared.overlap.check(plan.paths, lists, pure=True)
        counters = {states[k].count.data_ptr(): segment.bounds[k].rule.name for k in prepared.moving}
        if len(counters) < len(prepared.moving):
            names = [segment.bounds[k].rule.name for k in prepared.moving]
            raise ValueError(
                f"two of the counters `count` of {', '.join(names)} share memory, so donate=True would count twice; "
                f"make the state with `init`, or clone one of them."
            )
    compute(prepared, tables, lists, donate, bool(reference))
    if donate:
        for k in prepared.moving:
            states[k].count.add_(1)
        return
    for k, bound in segment.bounds.items():
        fields = {name: unflatten(spec, lists[k, name]) for name in bound.rule.slots} if plan.present else {}
        if k in prepared.moving:
            fields["count"] = states[k].count + 1
        if fields:
            new_states[segment.links[k].path] = states[k]._replace(**fields)


def _slot_leaves(plan: Plan, bound: Bound, name: str, tree: Tree) -> Column:
    try:
        return Column(plan.read(tree))
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
        elif kind == "option":
            raise TypeError(f"{name} is {value!r}, which only `functional_optim.leafwise` can look up.")
        elif kind == "host":
            row.append(number(f"the schedule of {name} returned", value(int(states[link].count))))
        else:
            if name not in extra:
                raise TypeError(
                    f"{segment.bounds[link].rule.name} needs the extra argument `{name}`: call "
                    f"`update(updates, state, params, {name}=...)`."
                )
            row.append(number(f"the extra argument `{name}` is", extra[name]))
    return row


def number(what: str, x: Any) -> float | torch.Tensor:
    """A number, or a tensor that holds one.

    Raises:
      ValueError: it is neither; `what` begins the message.
    """
    if isinstance(x, torch.Tensor):
        if x.ndim:
            raise ValueError(f"{what} a tensor of shape {tuple(x.shape)}, expected a number.")
        return x
    try:
        return float(x if not isinstance(x, (str, bytes)) else None)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{what} {x!r:.60}, expected a number.") from None


def runs_python(segment: Segment, plan: Plan, extra: Mapping[str, Any]) -> bool:
    """Whether code of somebody else runs before a segment: a transformation, or what makes a number of an argument."""
    return segment is not plan.segments[0] or any(type(x) not in NUMBERS for x in extra.values())


NUMBERS = (float, int, bool, torch.Tensor)
GRADIENT = "a tensor requires a gradient and autograd is recording"


def reference_reason(plan: Plan, prepared: Prepared, tables: Sequence[Any], seen: bool) -> str:
    """Why only the reference can compute a segment, or an empty string."""
    if seen:
        return "a torch.func transformation or torch.compile is looking on"
    if not (plan.guards.plain and prepared.plain):
        return "some tensors are on meta or of a class of their own"
    if torch.is_grad_enabled():
        scalars = (x for table in tables for row in table for x in row)
        if (
            plan.requires_grad
            or prepared.requires_grad
            or any(isinstance(x, torch.Tensor) and x.requires_grad for x in scalars)
        ):
            return GRADIENT
    if len({g.device for g in prepared.groups}) > 1 and any(g.signature.program.spans_tree for g in prepared.groups):
        return "a reduction over the tree spans several devices"
    return ""


def compute(prepared: Prepared, tables: Sequence[Any], lists: Lists, donate: bool, reference: bool) -> None:
    """Evaluates the programs of a segment and puts what they write into `lists`."""
    results: dict[int, list[Column]] = {}
    bare: list[int] = []  # groups written to behind torch's back
    by_device: dict[torch.device | None, list[int]] = {}
    for k, group in enumerate(prepared.groups):
        by_device.setdefault(None if reference else group.device, []).append(k)
    for device, members in by_device.items():
        backend = "reference" if device is None else choose_backend(device)[0]
        groups = [prepared.groups[k] for k in members]
        if backend in ("c", "triton"):
            try:
                done = _run_kernels(backend, groups, [tables[k] for k in members], lists, donate)
                bare += members
            except BuildError as error:
                give_up(backend, str(error))
                backend = "foreach"
        if backend in ("reference", "foreach"):
            done = BACKENDS[backend]([_call(g, tables[k], lists, donate) for g, k in zip(groups, members, strict=True)])
        results.update(zip(members, done, strict=True))
    if donate and len(bare) == len(prepared.groups):
        prepared.count_up(lists)
    elif donate:
        torch.autograd.graph.increment_version([x for k in bare for column in results[k] for x in column])
    if not donate:  # the caller's lists are left as they are
        for group in prepared.groups:
            for places in group.outputs:
                if places.whole is None:
                    for key in {key for key, _ in places.pairs}:
                        lists[key] = Column(lists[key])
    for k, group in enumerate(prepared.groups):
        for places, column in zip(group.outputs, results[k], strict=True):
            places.scatter(column, lists)


def _call(group: Group, table: Any, lists: Lists, donate: bool) -> Call:
    return Call(
        group.signature,
        group.updates.gather(lists),
        [places.gather(lists) for places in group.inputs],
        [group.target(k, lists) if donate else None for k in range(len(group.outputs))],
        table,
        group.table,
        group.shard,
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
