"""Fusing: the rules of neighbouring transformations become one program.

Fusing is composition: the rules are called one after another, as Python functions, while one tracer records. The
first argument of each is what the one before returned, and the program's inputs are all of their states.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from ._spec import Bound, Rule
from .kernels.program import Level, Program
from .kernels.trace import RuleError, Symbol, Tracer
from .schedules import Schedule


_Key = TypeVar("_Key")


class Source(NamedTuple):
    """Where a number of the scalar table comes from.

    Args:
      kind: a fixed number or tensor; the step counter of a transformation; an extra argument of `update`; or a
        schedule that only Python can evaluate.
      link: position of the transformation among those fused.
      name: what messages call it.
      value: the number, the tensor or the schedule.
    """

    kind: Literal["value", "count", "extra", "host"]
    link: int
    name: str
    value: Any = None


class Recipe(NamedTuple):
    """The program of some fused transformations.

    Args:
      program: the program.
      scalars: where each column of the scalar table comes from.
      slots: for each stored input and output, the position of its transformation and the slot's name.
    """

    program: Program
    scalars: tuple[Source, ...]
    slots: dict[str, tuple[int, str]]


def fuse_all(recipes: Mapping[_Key, Sequence[tuple[int, Bound]]], apply: bool) -> dict[_Key, Recipe]:
    """Traces the programs of leaves that different transformations see.

    Where leaves meet in one reduction, it ends in the same pass for all of them: that of the leaf with the most
    reductions behind it.

    Args:
      recipes: for each kind of leaf, rules with their hyper-parameters and positions in the chain.
      apply: whether the programs end by adding updates to parameters.

    Returns:
      The program of each kind of leaf.

    Raises:
      RuleError: a rule does what a kernel cannot.
    """
    stages: dict[str, int] = {}
    while True:
        done = {key: fuse(links, apply, stages) for key, links in recipes.items()}
        ends: dict[str, int] = {}
        for recipe in done.values():
            for value in recipe.program.values:
                if value.op.startswith("tree_"):
                    ends[value.name] = max(ends.get(value.name, 0), value.stage)
        if all(
            value.stage == ends[value.name]
            for recipe in done.values()
            for value in recipe.program.values
            if value.op.startswith("tree_")
        ):
            return done
        stages = ends


def fuse(links: Sequence[tuple[int, Bound]], apply: bool, stages: Mapping[str, int] | None = None) -> Recipe:
    """Traces transformations, in order, into one program.

    Args:
      links: rules with their hyper-parameters, each with its position among the transformations of the chain.
      apply: whether the program ends by adding the updates to the parameters.
      stages: the earliest stages of tree reductions.

    Returns:
      The program and where its inputs come from. It writes `updates`, or `params` if `apply`, and every slot.

    Raises:
      RuleError: a rule does what a kernel cannot.
    """
    t = Tracer(stages)
    updates, params = t.input("array", "updates"), t.input("array", "params")
    u: Any = updates
    outputs: dict[str, Any] = {}
    sources: dict[str, Source] = {}
    slots: dict[str, tuple[int, str]] = {}
    per_leaf: set[str] = set()
    names: list[str] = []
    for position, bound in links:
        rule = bound.rule
        name = next(n for k in itertools.count(1) if (n := rule.name if k == 1 else f"{rule.name}_{k}") not in names)
        names.append(name)
        t.scope = f"{rule.name}@{position}"

        def scalar(label: str, source: Source, name: str = name) -> Symbol:
            sources[f"{name}.{label}"] = source
            return t.input("scalar", f"{name}.{label}")

        count = scalar("count", Source("count", position, f"{name}.count")) if bound.counted else None
        keywords: dict[str, Any] = {}
        if rule.uses_step and count is not None:
            keywords["step"] = t.op("add", count, 1.0)
        for hyper, value in bound.values.items():
            if bound.is_schedule(hyper):
                assert count is not None
                keywords[hyper] = _schedule(t, value, count, hyper, position, f"{name}.{hyper}", scalar)
            elif bound.is_scalar(hyper):
                keywords[hyper] = scalar(hyper, Source("value", position, f"{name}.{hyper}", value))
            else:
                keywords[hyper] = value
        for extra in rule.extras:
            sources[extra] = Source("extra", position, extra)
            keywords[extra] = t.input("scalar", extra)
        before = []
        for slot_name, slot in rule.slots.items():
            full = f"{name}.{slot_name}"
            slots[full] = (position, slot_name)
            x = t.input("leaf" if slot.per_leaf else "array", full)
            if slot.per_leaf:
                per_leaf.add(full)
            if slot.start == "first_update":
                assert count is not None
                x = t.op("where", t.op("eq", count, 0.0), u, x)
            before.append(x)
        if "step" in keywords and not _takes_step(rule.fn):
            del keywords["step"]
        result = rule.fn(u, *([params] if rule.uses_params else []), *before, **keywords)
        u, *after = _results(rule, result)
        u = t.spread(u)
        outputs.update({f"{name}.{k}": x for k, x in zip(rule.slots, after, strict=True)})
    final = {"params": params + u} if apply else {"updates": u}
    program = t.finish({**final, **outputs}, frozenset(per_leaf))
    sources |= {name: Source("value", -1, name, x) for name, x in t.captured.items()}
    return Recipe(program, tuple(sources[name] for name in program.scalars), slots)


def _takes_step(fn: Callable[..., Any]) -> bool:
    code = fn.__code__
    return "step" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def _results(rule: Rule, result: Any) -> list[Any]:
    """Checks what a rule returned: the update, then the new value of every slot."""
    slots = list(rule.slots)
    name = f"{rule.name} ({rule.fn.__code__.co_filename}:{rule.fn.__code__.co_firstlineno})"
    results = list(result) if isinstance(result, tuple) else [result]
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
                f"{name}: the new value of `{label}` differs per element, but its slot holds one number per leaf."
            )
    return results


def _schedule(
    t: Tracer,
    schedule: Callable[[Any], Any],
    count: Symbol,
    hyper: str,
    position: int,
    name: str,
    scalar: Callable[[str, Source], Symbol],
) -> Any:
    """Traces a schedule; one that cannot be traced becomes a number that Python computes at every step."""

    def number(label: str, value: float) -> Symbol:
        return scalar(f"{hyper}.{label}", Source("value", position, f"{name}.{label}", value))

    x = None
    for form in ([schedule.replace_numbers(number)] if isinstance(schedule, Schedule) else []) + [schedule]:
        try:
            x = form(count)
            break
        except Exception:  # whatever it is that a function cannot do with a symbol, Python can do with a number
            continue
    if isinstance(x, torch.Tensor) and x.ndim:
        raise ValueError(f"the schedule of {name} returned a tensor of shape {tuple(x.shape)}, expected a number.")
    if isinstance(x, Symbol) and t.values[x.index].level is Level.ROW:
        return x
    if isinstance(schedule, Schedule) and isinstance(x, (int, float, torch.Tensor)):
        return t.symbol(x)
    # what does not depend on the step while it is traced may yet be another number at the next one
    return scalar(hyper, Source("host", position, name, schedule))
