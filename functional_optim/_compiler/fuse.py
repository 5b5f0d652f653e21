"""Fusing: the rules of neighbouring transformations become one program.

Fusing is composition: the rules are called one after another, as Python functions, while one tracer records. The
first argument of each is what the one before returned, and the program's inputs are all of their states.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from .._schedules.schedule import Schedule
from .._schedules.traced import calls_functions, traced_key
from .errors import RuleError
from .program import Level, Program
from .rule import Bound, Option, Rule
from .symbols import Symbol
from .trace import Tracer, trace_together


_Key = TypeVar("_Key")


def extra_key(name: str) -> tuple[int, str]:
    """The key of the column that an extra argument is: it has no position, which a slot has."""
    return -1, name


class ScalarSource(NamedTuple):
    """The source of a number of the scalar table.

    Args:
      kind: a fixed number or tensor; an extra argument of `update`; an option that each leaf looks up; or whether it
        is a leaf's first step.
      link: position of the transformation among those fused.
      name: its name in messages.
      value: the number, the tensor, the schedule or the option.
    """

    kind: Literal["value", "extra", "option", "first"]
    link: int
    name: str
    value: Any = None


class Recipe(NamedTuple):
    """The program of some fused transformations.

    Args:
      program: the program.
      scalars: the source of each number of a row of the scalar table.
      slots: for each stored input and output, the position of its transformation and the slot's name; for an extra
        argument that is a tree, its `extra_key`.
      host_schedules: schedules that Python evaluates, by the name of the input that their value is.
    """

    program: Program
    scalars: tuple[ScalarSource, ...]
    slots: dict[str, tuple[int, str]]
    host_schedules: dict[str, "HostSchedule"]

    def key_of(self, name: str) -> str | tuple[int, str]:
        """The key of the column that an input or output of the program is."""
        host = self.host_schedules.get(name)
        return self.slots.get(name, name) if host is None else host.column

    def column_keys(self) -> list[str | tuple[int, str]]:
        """The keys of the columns that the program reads and writes."""
        names = (*self.program.arrays, *self.program.leaves, *[o.name for o in self.program.outputs])
        return list(dict.fromkeys(["updates", *map(self.key_of, names)]))


class HostSchedule(NamedTuple):
    """A schedule that only Python can evaluate.

    Args:
      name: its name in messages.
      schedule: the function of the count.
      counter: the key of the counter that it is given.
      column: the key of the column of its values, by position: a name is unique in one program alone.
    """

    name: str
    schedule: Callable[[int], Any]
    counter: str | tuple[int, str]
    column: str


class FusedRule(NamedTuple):
    """A transformation to be fused.

    Args:
      position: its position in the chain, by which its state is found.
      scope: its position as reductions over the tree know it: leaves meet where it is the same.
      bound: its rule and hyper-parameters.
      opens: the position of the first transformation inside it, if it wraps some that are among those fused.
      entered: the column of the updates that entered the transformations inside it, if they are not.
    """

    position: int
    scope: int
    bound: Bound
    opens: int | None = None
    entered: str | None = None


class StepCounter(NamedTuple):
    """The counter of a leaf that counts its own steps, and the condition under which one is taken.

    Without it each transformation has a counter for all leaves, `count`, which the program reads and does not write.

    Args:
      advance: whether the program moves the counter, `step`, on.
      guarded: whether a step is taken only if the extra argument `found_inf` is 0, on updates divided by the extra
        argument `grad_scale`.
    """

    advance: bool = False
    guarded: bool = False


def fuse_all(
    recipes: Mapping[_Key, Sequence[FusedRule]], apply: bool, counting: Mapping[_Key, StepCounter] | None = None
) -> dict[_Key, Recipe]:
    """Traces the programs of leaves that different transformations see; see `trace_together`.

    Args:
      recipes: for each kind of leaf, rules with their hyper-parameters and positions in the chain.
      apply: whether the programs end by adding updates to parameters.
      counting: for each kind of leaf, its own counter; None where transformations count for all leaves.

    Returns:
      The program of each kind of leaf.

    Raises:
      RuleError: a rule does something that a kernel cannot.
    """

    def trace(stages: Mapping[str, int]) -> dict[_Key, Recipe]:
        return {
            key: fuse(fused_rules, apply, stages, counting[key] if counting is not None else None)
            for key, fused_rules in recipes.items()
        }

    return trace_together(trace, lambda traced: [recipe.program for recipe in traced.values()])


def fuse(
    fused_rules: Sequence[FusedRule],
    apply: bool,
    stages: Mapping[str, int] | None = None,
    counting: StepCounter | None = None,
) -> Recipe:
    """Traces transformations, in order, into one program.

    Args:
      fused_rules: rules with their hyper-parameters and positions in the chain.
      apply: whether the program ends by adding the updates to the parameters.
      stages: the earliest stages of tree reductions.
      counting: the counter of each leaf; None where transformations count for all leaves.

    Returns:
      The program and where its inputs come from. It writes `updates`, or `params` if `apply`, and every slot that
      changes.

    Raises:
      RuleError: a rule does something that a kernel cannot.
    """
    return _Fusion(stages, counting).run(fused_rules, apply)


def follows_counter(schedule: Callable[[Any], Any]) -> bool:
    """Whether operations of torch alone make the value of a schedule from a counter, wherever that is.

    Any other one is evaluated in Python, and is given a number.
    """
    fusion = _Fusion(None, None)
    fusion.schedule(schedule, fusion.number_per_leaf("count"), 0, "schedule")
    return not fusion.host_schedules and not calls_functions(schedule)


class _Fusion:
    """One tracing of some transformations."""

    def __init__(self, stages: Mapping[str, int] | None, counting: StepCounter | None) -> None:
        self.t = Tracer(stages)
        self.counting = counting
        self.sources: dict[str, ScalarSource] = {}
        self.host_schedules: dict[str, HostSchedule] = {}
        self.slots: dict[str, tuple[int, str]] = {}
        self.per_leaf: set[str] = set()
        self.own_numbers: set[str] = set()  # numbers per leaf that are not one for all leaves
        self.stored: dict[str, Symbol] = {}  # the content of every slot before the step

    def run(self, fused_rules: Sequence[FusedRule], apply: bool) -> Recipe:
        """The program of all rules; see `fuse`."""
        t, counting = self.t, self.counting
        updates, params = t.input("array", "updates"), t.input("array", "params")
        u: Any = updates
        if counting is not None and counting.guarded:
            u = t.op("div", u, self.scalar("grad_scale", ScalarSource("extra", -1, "grad_scale")))
        outputs: dict[str, Any] = {}
        names: list[str] = []
        trail = [(-1, u)]  # the update behind each rule
        for fused in fused_rules:
            rule = fused.bound.rule
            numbered = (rule.name if k == 1 else f"{rule.name}_{k}" for k in itertools.count(1))
            name = next(n for n in numbered if n not in names)
            names.append(name)
            t.scope = f"{rule.name}@{fused.scope}"
            before: Any = t.input("array", fused.entered) if fused.entered is not None else None
            if fused.opens is not None:
                before = next(x for position, x in reversed(trail) if position < fused.opens)
            u, after = self.call(fused, name, u, before, params)
            trail.append((fused.position, u))
            outputs.update({k: x for k, x in after.items() if not self.unchanged(k, x)})
        final = {"params": params + u} if apply else {"updates": u}
        if counting is not None and counting.advance:
            outputs["step"] = t.op("add", self.number_per_leaf("step"), 1.0)
        outputs = {**final, **outputs}
        if counting is not None and counting.guarded:
            found = self.scalar("found_inf", ScalarSource("extra", -1, "found_inf"))
            before = {"params": params, **self.stored}
            outputs = {k: t.op("where", t.op("eq", found, 0.0), x, before[k]) for k, x in outputs.items()}
        program = t.finish(outputs, frozenset(self.per_leaf))
        self.sources |= {name: ScalarSource("value", -1, name, x) for name, x in t.captured.items()}
        host_schedules = {name: host for name, host in self.host_schedules.items() if name in program.leaves}
        return Recipe(program, tuple(self.sources[name] for name in program.scalars), self.slots, host_schedules)

    def scalar(self, name: str, source: ScalarSource) -> Symbol:
        """A number of the scalar table."""
        self.sources[name] = source
        return self.t.input("scalar", name)

    def number_per_leaf(self, name: str) -> Symbol:
        """A stored number of each leaf, such as the number of steps taken so far."""
        self.per_leaf.add(name)
        self.stored[name] = self.t.input("leaf", name)
        return self.stored[name]

    def unchanged(self, name: str, x: Any) -> bool:
        """Whether the new value of a slot is the one before, so that there is nothing to write."""
        return isinstance(x, Symbol) and x.index == self.stored[name].index

    def call(self, fused: FusedRule, name: str, u: Any, entered: Any, params: Symbol) -> tuple[Any, dict[str, Any]]:
        """Calls one rule: the new update, and the new values of its slots.

        Args:
          fused: the rule.
          name: its name, which no other has.
          u: the update.
          entered: the update that entered the transformations inside it, if it wraps some.
          params: the parameter.
        """
        rule, count = fused.bound.rule, self.count_of(fused, name)
        keywords = self.keywords(fused, name, count)
        first = self.first(fused, name, count)
        if rule.takes_first:
            keywords["first"] = first
        before = self.slots_before(fused, name, u, first)
        outer = [entered] if rule.wraps else []
        result = rule.fn(u, *outer, *([params] if rule.uses_params else []), *before, **keywords)
        u, *after = _results(rule, result)
        for (slot_name, slot), x in zip(rule.slots.items(), after, strict=True):
            if slot.per_tree and isinstance(x, Symbol):
                self.refuse_parts(rule, slot_name, x)
        return self.t.broadcast(u), {f"{name}.{k}": x for k, x in zip(rule.slots, after, strict=True)}

    def count_of(self, fused: FusedRule, name: str) -> Symbol | None:
        """The number of steps taken so far, for a rule that counts them."""
        if self.counting is None and fused.bound.counted:
            self.slots[f"{name}.count"] = (fused.position, "count")
            return self.number_per_leaf(f"{name}.count")
        return self.number_per_leaf("step") if fused.bound.uses_step else None

    def keywords(self, fused: FusedRule, name: str, count: Symbol | None) -> dict[str, Any]:
        """The keyword arguments of a rule: the step, hyper-parameters and extra arguments."""
        t, position, bound = self.t, fused.position, fused.bound
        found: dict[str, Any] = {}
        if bound.rule.uses_step:
            found["step"] = t.op("add", count, 1.0)
        for hyper, value in bound.values.items():
            label = f"{name}.{hyper}"
            if bound.is_schedule(hyper):
                assert count is not None
                found[hyper] = self.schedule(value, count, position, label)
            elif bound.is_scalar(hyper):
                kind: Literal["value", "option"] = "option" if isinstance(value, Option) else "value"
                found[hyper] = self.scalar(label, ScalarSource(kind, position, label, value))
            else:
                found[hyper] = value
        for extra in bound.rule.extras:
            found[extra] = self.scalar(extra, ScalarSource("extra", position, extra))
        for extra in bound.rule.tree_extras:
            self.slots[extra] = extra_key(extra)
            found[extra] = t.input("array", extra)
        return found

    def first(self, fused: FusedRule, name: str, count: Symbol | None) -> Symbol | None:
        """The condition that a step is the first one, for a rule to which it makes a difference."""
        rule = fused.bound.rule
        if not rule.uses_first:
            return None
        if self.counting is None or not rule.slots:
            return self.t.op("eq", count, 0.0)
        label = f"{name}.first"
        return self.t.op("ne", self.scalar(label, ScalarSource("first", fused.position, label)), 0.0)

    def slots_before(self, fused: FusedRule, name: str, u: Any, first: Symbol | None) -> list[Any]:
        """The content of the slots of a rule before the step."""
        before = []
        for slot_name, slot in fused.bound.rule.slots.items():
            full = f"{name}.{slot_name}"
            self.slots[full] = (fused.position, slot_name)
            x = self.number_per_leaf(full) if slot.per_leaf else self.t.input("array", full)
            self.stored[full] = x
            if slot.per_leaf and not slot.per_tree:
                self.own_numbers.add(full)
            before.append(self.t.op("where", first, u, x) if slot.start == "first_update" else x)
        return before

    def refuse_parts(self, rule: Rule, slot: str, x: Symbol) -> None:
        """Refuses a new value of a number for the whole tree that follows from a single leaf."""
        stack, known = [x.index], set[int]()
        while stack:
            i = stack.pop()
            value = self.t.values[i]
            if i in known or value.spans_tree:
                continue
            known.add(i)
            stack += value.args
            if value.op == "size" or value.reduction or value.name in self.own_numbers:
                sources = {"size": "the size of a leaf", "leaf": f"the slot `{value.name.partition('.')[2]}`"}
                source = sources.get(value.op, "a reduction of a leaf")
                raise RuleError(
                    f"{_name(rule)}: the new value of `{slot}` follows from {source}, which differs from leaf to leaf, "
                    f"but its slot holds one number per tree; reduce over the tree, with `tree_sum` and its siblings."
                )

    def schedule(self, schedule: Callable[[Any], Any], count: Symbol, position: int, name: str) -> Any:
        """Traces a schedule; one that cannot be traced becomes a number that Python computes at every step."""
        x = None
        for form in self.forms(schedule, position, name):
            try:
                x = form(count)
                break
            except Exception:  # a function that no symbol can follow may still follow a number
                continue
        if isinstance(x, torch.Tensor) and x.ndim:
            raise ValueError(f"the schedule of {name} returned a tensor of shape {tuple(x.shape)}, expected a number.")
        if isinstance(x, Symbol) and self.t.values[x.index].uniform:
            return x
        if isinstance(schedule, Schedule) and isinstance(x, (int, float)):
            return self.t.symbol(x)
        name = f"{name}()" if name in self.slots else name  # a hyper-parameter `count`, beside the counter
        counter = (position, "count") if self.counting is None else "step"
        self.host_schedules[name] = HostSchedule(name, schedule, counter, f"{name.rpartition('.')[2]}@{position}")
        return self.t.input("leaf", name)

    def forms(self, schedule: Callable[[Any], Any], position: int, name: str) -> list[Callable[[Any], Any]]:
        """The functions that may be traced in place of a schedule, the best one first."""
        if traced_key(schedule) is None:
            return []
        if not isinstance(schedule, Schedule):
            return [schedule]
        values = []

        def number(label: str, value: Any) -> Symbol:
            values.append(value)
            return self.scalar(f"{name}.{label}", ScalarSource("value", position, f"{name}.{label}", value))

        read = schedule.replace_numbers(number)
        # Python may branch on a number, but not on a tensor, which may hold another one at the next step
        return [read] if any(isinstance(x, torch.Tensor) for x in values) else [read, schedule]


def _name(rule: Rule) -> str:
    """A rule in messages, with the place of its formula."""
    return f"{rule.name} ({rule.fn.__code__.co_filename}:{rule.fn.__code__.co_firstlineno})"


def _results(rule: Rule, result: Any) -> list[Any]:
    """Checks the values that a rule returned: the update, then the new value of every slot."""
    slots = list(rule.slots)
    name = _name(rule)
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    expected = ", ".join(["u", *slots])
    if len(results) != 1 + len(slots):
        raise RuleError(f"{name} returned {len(results)} results, expected {1 + len(slots)}: ({expected}).")
    for label, x in zip(["u", *slots], results, strict=True):
        if not isinstance(x, (Symbol, int, float)) and not (isinstance(x, torch.Tensor) and not x.ndim):
            raise RuleError(f"{name} returned {type(x).__name__} for `{label}`, expected what it computed from `u`.")
        slot = rule.slots.get(label)
        per_element = isinstance(x, Symbol) and x.tracer.values[x.index].level is Level.ELEMENT
        if per_element and slot is not None and slot.per_leaf:
            raise RuleError(
                f"{name}: the new value of `{label}` differs per element, but its slot holds one number per "
                f"{'tree' if slot.per_tree else 'leaf'}."
            )
    return results
