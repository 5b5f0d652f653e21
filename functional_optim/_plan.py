"""Laying a transformation out over a tree: which leaves share a program, and whether everything fits.

This is where wrong shapes, dtypes and devices are refused, with the path of the leaf.
"""

import functools
import itertools
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ._compiler.fuse import Counting, Part, Recipe, fuse_all
from ._compiler.rule import Bound, Slot, slot
from ._groups import Fit, Lists, Member, fit_of, group_of
from ._overlap import Overlap
from ._transform import GradientTransformation, Link
from ._tree import Reader, Spec, Tree, View, at, check_fit, check_leaf, difference, flatten, paths
from .kernels import Column, Shard
from .kernels.alike import distinct
from .kernels.guard import Guards
from .kernels.versions import count_up


KEEP = 8  # how many kinds of trees a transformation is remembered for


SlotKey = tuple[int, str]


@functools.lru_cache(maxsize=64)
def _fused(parts: tuple[Any, ...], apply: bool, counting: tuple[Any, ...] | None) -> dict[tuple[int, ...], Recipe]:
    """`fuse_all`, once for the same transformations: trees that lack other gradients have programs in common."""
    return fuse_all(dict(parts), apply, None if counting is None else dict(counting))


class Stored(NamedTuple):
    """A slot of state as a segment uses it.

    Args:
      key: the list that holds it.
      name: what messages call it.
      slot: its declaration.
      seen: for each leaf, whether it has one.
    """

    key: Any
    name: str
    slot: Slot
    seen: tuple[bool, ...]


class Segment:
    """Neighbouring rule-made transformations: one program for each kind of leaf.

    Args:
      links: the transformations and their positions in the chain.
      apply: whether the programs end by adding updates to parameters.
      n_leaves: number of leaves of the tree.
      scopes: the position of each transformation as reductions over the tree know it.
      counting: for each leaf, how its steps are counted; None where transformations count for all leaves.
    """

    def __init__(
        self,
        links: Mapping[int, Link],
        apply: bool,
        n_leaves: int,
        scopes: Sequence[int],
        counting: Sequence[Counting] | None = None,
    ) -> None:
        self.links, self.apply, self.n_leaves, self.scopes, self.counting = links, apply, n_leaves, scopes, counting
        self.bounds: dict[int, Bound] = {k: link.bound for k, link in links.items() if link.bound is not None}
        self.slots: list[SlotKey] = [(k, name) for k, bound in self.bounds.items() for name in bound.rule.slots]
        self.recent: list[Prepared] = []

    def prepare(self, plan: "Plan", lists: Lists, remember: bool) -> "Prepared":
        """What the segment is prepared for such leaves."""
        found = next((p for p in self.recent if p.holds(plan, lists)), None) if remember else None
        if found is None:
            found = Prepared(self, plan, lists)
            if remember:
                self.recent = [found, *self.recent[: KEEP - 1]]
        return found

    @functools.cached_property
    def kinds(self) -> list[tuple[int, ...]]:
        """For each leaf, the transformations that see it, and how it counts: leaves of a kind share a program."""
        positions, seen = tuple(self.links), [link.seen for link in self.links.values()]
        kinds = [tuple(itertools.compress(positions, column)) for column in zip(*seen, strict=True)]
        kinds = kinds if seen else [()] * self.n_leaves
        if self.counting is None:
            return kinds
        # a negative number can be no position
        return [(*kind, -1 - c.advance - 2 * c.guarded) for kind, c in zip(kinds, self.counting, strict=True)]

    @functools.cached_property
    def recipes(self) -> dict[tuple[int, ...], Recipe]:
        """The program of each kind of leaf."""
        parts = {
            kind: [Part(k, self.scopes[k], self.bounds[k]) for k in kind if k >= 0]
            for kind in dict.fromkeys(self.kinds)
        }
        counting = None if self.counting is None else dict(zip(self.kinds, self.counting, strict=True))
        counted = None if counting is None else tuple(counting.items())
        return _fused(tuple((kind, tuple(p)) for kind, p in parts.items()), self.apply, counted)

    @functools.cached_property
    def stored(self) -> list[Stored]:
        """All slots of state, the counters of leaves that count for themselves among them."""
        stored = []
        if self.counting is not None:
            seen = tuple("step" in self.recipes[kind].program.leaves for kind in self.kinds)
            stored.append(Stored("step", "state step", slot(0.0, dtype=torch.float32, per="leaf"), seen))
        for k, name in self.slots:
            rule = self.bounds[k].rule
            stored.append(Stored((k, name), f"state {rule.name}.{name}", rule.slots[name], self.links[k].seen))
        return stored

    @functools.cached_property
    def hosts(self) -> list[tuple[str, Callable[[int], Any]]]:
        """The schedules that only Python can evaluate, and what they are called in programs."""
        return [host for recipe in self.recipes.values() for host in recipe.hosts.items()]

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
            if bound.counted:
                _check_count(f"state {bound.rule.name}.count", found.count)
            states[k] = found
        return states


class Prepared:
    """A segment prepared for leaves of certain dtypes, shapes and layouts. Refuses what no kernel may be handed."""

    def __init__(self, segment: Segment, plan: "Plan", lists: Lists) -> None:
        self.present, self.first = plan.present, plan.first
        for key, name, declared, seen in segment.stored:
            for i in distinct((i for i in self.present if seen[i]), lists[key].looks, lists["updates"].looks):
                _check_slot(name, plan.paths[i], lists[key][i], lists["updates"][i], declared)
        self.keys = [key for key, _, _, _ in segment.stored]
        where = {key: [i for i in self.present if seen[i]] for key, _, _, seen in segment.stored}
        self.guards = Guards({key: lists[key] for key in self.keys}, where)
        # updates that came from another transformation
        self.arrived = Guards({"updates": lists["updates"]} if plan.later else {}, {"updates": self.present})
        self.plain = self.guards.plain and self.arrived.plain
        self.requires_grad = self.guards.requires_grad or self.arrived.requires_grad
        looks = {key: column.looks for key, column in lists.items()}
        keys = {kind: ["params" if "params" in lists else "updates", *r.lists()] for kind, r in segment.recipes.items()}
        fits: dict[Any, Fit] = {}
        members: dict[Any, list[Member]] = {}
        for i in self.present:
            kind = segment.kinds[i]
            recipe = segment.recipes[kind]
            # a part without elements still takes part where its tensor's other parts are added up
            if not (kind or segment.apply) or not (lists["updates"][i].numel() or plan.shards[i] is not None):
                continue
            leaf_looks = (kind, *[looks[key][i] for key in keys[kind]])
            if leaf_looks not in fits:
                fits[leaf_looks] = fit_of(recipe, lists, i)
            fit = fits[leaf_looks]
            member = Member(i, (kind, (plan.options[i], i in plan.first)), plan.wholes[i] or fit.size, recipe, fit)
            members.setdefault((id(fit.signature), fit.device, plan.shards[i]), []).append(member)
        self.groups = [group_of(m, shard, len(plan.paths)) for (_, _, shard), m in members.items()]
        self.moving = [
            k
            for k, bound in segment.bounds.items()
            if bound.counted and any(segment.links[k].seen[i] for i in self.present)
        ]
        self.overlap = Overlap(self.groups)
        rows = {id(row): row for g in self.groups for row in g.sources}.values()
        asked = {source.kind for row in rows for source in row}
        self.asks_options_only, self.asks_python = asked <= {"option", "value"}, "host" in asked
        self.settled: object = None  # the options that the tables were made of
        self.tables: list[Any] = []
        applied = [g for g in self.groups if any(o.name == "params" for o in g.signature.program.outputs)]
        written = where | {"params": [i for g in applied for i in g.leaves]}
        self.written = {key: array("q", positions) for key, positions in written.items() if positions}

    def holds(self, plan: "Plan", lists: Lists) -> bool:
        """Whether these leaves are like those it was prepared for."""
        same = self.present == plan.present and self.first == plan.first
        return same and self.arrived.holds(lists) and self.guards.holds(lists)

    def check_again(self, plan: "Plan", lists: Lists) -> None:
        """Makes sure once more, after Python code of somebody else has run, and finds out where tensors are now.

        Raises:
          RuntimeError: a tensor has become another one.
        """
        first = {name: guard for name, guard in plan.guards.each.items() if not (plan.later and name == "updates")}
        for name, guard in (first | self.arrived.each | self.guards.each).items():
            lists[name] = Column(lists[name])
            if not guard.holds(lists[name]):
                what = name if isinstance(name, str) else f"the state {name[1]!r}"
                raise RuntimeError(
                    f"{what} changed while the step was computed: a transformation or a schedule that runs in Python "
                    f"made something else of a tensor (another shape, dtype, layout, device, or no memory). Change "
                    f"tensors between steps."
                )

    def count_up(self, lists: Lists) -> None:
        """Counts up the versions of all stored tensors and parameters, written to in place behind torch's back."""
        for key, positions in self.written.items():
            count_up(lists[key], positions)


def _check_count(name: str, x: Any) -> None:
    """Refuses a counter that is not one number."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is {type(x).__name__} {x!r:.60}, expected a tensor that holds one integer.")
    if x.ndim or x.is_floating_point() or x.is_complex():
        raise ValueError(f"{name} is {x.dtype} of shape {tuple(x.shape)}, expected one integer.")


def _check_slot(name: str, path: str, x: Any, u: torch.Tensor, slot: Slot) -> None:
    """Refuses a stored tensor that does not go with its leaf."""
    if slot.per_leaf and isinstance(x, torch.Tensor):
        if x.ndim:
            raise ValueError(f"{name}{at(path)} has shape {tuple(x.shape)}, expected one number.")
        u = u.new_empty(())
    check_fit(name, "update", path, x, u)


def get_state(state: Any, path: Sequence[int | str]) -> Any:
    """The state at a path of indices and keys."""
    for k in path:
        state = state[k]
    return state


def lists_of(read: Reader, updates: Tree, params: Tree | None, explain: bool = False) -> Lists:
    """The leaves of updates and parameters.

    Raises:
      ValueError: a tree has another structure; which, if `explain`.
    """
    lists: Lists = {}
    for name, tree in (("updates", updates), ("params", params)):
        if name == "updates" or tree is not None:
            try:
                lists[name] = Column(read(tree))
            except (ValueError, TypeError):
                if not explain:
                    raise
                raise ValueError(
                    f"{name} does not have the structure of params: {difference(read.spec, tree)}."
                ) from None
    return lists


class Plan:
    """A transformation laid out over a tree of certain shapes: segments between barriers.

    Args:
      spec: structure of the tree.
      names: what messages call each leaf.
      lists: its leaves: updates, and parameters if there are any.
      links: the transformations.
      apply: whether to add the updates to the parameters.
      scopes: the position of each transformation as reductions over the tree know it; by default its own.
    """

    def __init__(
        self,
        spec: Spec,
        names: Sequence[str],
        lists: Lists,
        links: Sequence[Link],
        apply: bool,
        scopes: Sequence[int] | None = None,
    ) -> None:
        self.spec, self.paths, self.links = spec, names, links
        self.read = Reader(spec)
        us, ps = lists["updates"], lists.get("params", lists["updates"])
        self.present = tuple(i for i, x in enumerate(us) if x is not None and ps[i] is not None)
        self.absent = tuple(i for i, x in enumerate(us) if x is None or ps[i] is None)
        for i in distinct(self.present, us.looks, ps.looks):
            u = check_leaf("updates", names[i], us[i])
            if "params" in lists:
                check_fit("updates", "parameter", names[i], u, check_leaf("params", names[i], ps[i]))
        self.guards = Guards(lists, dict.fromkeys(lists, self.present))
        self.requires_grad = self.guards.requires_grad
        self.scopes = range(len(links)) if scopes is None else scopes
        self.counting: Sequence[Counting] | None = None
        self.options: Sequence[int] = [0] * len(names)
        self.first: frozenset[int] = frozenset()
        self.shards: Sequence[Shard | None] = [None] * len(names)
        self.wholes: Sequence[int | None] = [None] * len(names)
        self.segments = self._segments(apply)
        self.later = len(self.segments) > 1

    @classmethod
    def of(cls, tx: GradientTransformation, apply: bool, updates: Tree, params: Tree | None) -> "Plan":
        """Lays a transformation out over trees.

        Raises:
          ValueError, TypeError: the trees do not fit.
        """
        leaves, spec = flatten(updates if params is None else params)
        lists = lists_of(Reader(spec), updates, params, explain=True)
        names = paths(spec)
        there = (i for i, u in enumerate(lists["updates"]) if u is not None and leaves[i] is not None)
        for i in distinct(there, lists["updates"].looks):  # before masks are asked about the tree
            check_leaf("updates", names[i], lists["updates"][i])
        links = tx._links(View(spec, tuple(leaves), tuple(x is not None for x in leaves)), ())
        plan = cls(spec, names, lists, links, apply)
        if params is None:
            for link in links:
                if link.bound is not None and link.bound.rule.uses_params:
                    raise ValueError(
                        f"{link.bound.rule.name} needs the parameters: call `update(updates, state, params)`."
                    )
        return plan

    def _segments(self, apply: bool) -> list[Segment | tuple[int, Link]]:
        segments: list[Segment | tuple[int, Link]] = []
        numbered = list(enumerate(self.links))
        for fusible, run in itertools.groupby(numbered, key=lambda x: x[1].bound is not None):
            part = list(run)
            if fusible:
                last = part[-1][0] == len(numbered) - 1
                segments.append(Segment(dict(part), apply and last, len(self.paths), self.scopes))
            else:
                segments.extend(part)
        if apply and not (segments and isinstance(segments[-1], Segment)):
            segments.append(Segment({}, True, len(self.paths), self.scopes))
        return segments

    def match(self, updates: Tree, params: Tree | None) -> Lists | None:
        """The leaves of both trees, if they are like those of the trees that this plan was made for."""
        try:
            lists = lists_of(self.read, updates, params)
        except (ValueError, TypeError):
            return None
        return lists if self.fits(lists) else None

    def fits(self, lists: Lists) -> bool:
        """Whether leaves are like those that this plan was made for."""
        if any(
            lists["updates"][i] is not None and lists.get("params", lists["updates"])[i] is not None
            for i in self.absent
        ):
            return False
        return lists.keys() == self.guards.each.keys() and self.guards.holds(lists)
