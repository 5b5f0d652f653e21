"""Reading back: hyper-parameters and slots by name, from the state of a chain."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from . import _walk
from ._compiler.rule import Bound, Rule
from ._compiler.states import rule_of
from ._runtime.checks import schedule_value
from ._runtime.internals import has_members, needs_dispatch
from ._state_nodes import check_state, get_state
from ._transform import GradientTransformation, Path, as_transformation, parts
from ._tree import Tree


def unique(names: Sequence[str], owners: Sequence[tuple[Path, str]], taken: frozenset[str]) -> list[str]:
    """Names that differ: a clash is qualified by the keys that lead to the owner, else by its name and a number.

    Args:
      names: the names wanted.
      owners: for each, the path and the name of the rule.
      taken: names that are not to be had.

    Returns:
      The names.
    """
    chosen: dict[str, None] = {}
    counts = Counter(names)
    for name, (path, rule) in zip(names, owners, strict=True):
        labels = "_".join(str(k) for k in path if isinstance(k, str))
        plain = [name] if counts[name] == 1 else []
        labelled = [f"{labels}_{name}"] if labels else []
        candidates = itertools.chain(plain, labelled, _numbered(f"{rule}_{name}"))
        chosen[next(x for x in candidates if x not in taken and x not in chosen)] = None
    return list(chosen)


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{k}" for k in itertools.count(2))


def slot_names(rules: Mapping[Path, Rule], renamed: Mapping[str, str] | None = None) -> dict[tuple[Path, str], str]:
    """The name of each slot of a chain, by the path of its rule and its name there.

    Args:
      rules: the rules, by path.
      renamed: other names of some slots.
    """
    places = [(path, slot) for path, rule in rules.items() for slot in rule.slots]
    wanted = [(renamed or {}).get(slot, slot) for _, slot in places]
    names = unique(wanted, [(path, rules[path].name) for path, _ in places], frozenset({"step"}))
    return dict(zip(places, names, strict=True))


def marked_slots(rules: Mapping[Path, Rule], chosen: str | None = None) -> dict[tuple[Path, str], str]:
    """The slots that hold the parameters to evaluate at, with their names.

    Args:
      rules: the rules, by path.
      chosen: the name of the one to read: its name in the chain, or in its rule, or both with a point between.

    Raises:
      ValueError: none has that name.
    """
    names = slot_names(rules)
    marked = {(path, slot): name for (path, slot), name in names.items() if rules[path].slots[slot].evaluate}
    if chosen is None:
        return marked
    found = {
        (path, slot): name
        for (path, slot), name in marked.items()
        if chosen in (name, slot, f"{rules[path].name}.{slot}")
    }
    if not found:
        raise ValueError(
            f"no slot that is marked by `slot(..., evaluate=True)` is called {chosen!r}; there are "
            f"{', '.join(map(repr, marked.values())) or 'none'}."
        )
    return found


def rule_states(state: Any, path: Path = ()) -> dict[Path, Any]:
    """The states of rules within the state of a chain, by path; those that keep nothing are left out."""
    if rule_of(state) is not None:
        return {path: state}
    if not isinstance(state, (tuple, list, dict)):
        return {}
    entries = state.items() if isinstance(state, dict) else enumerate(state)
    return {k: own for key, inner in entries for k, own in rule_states(inner, (*path, key)).items()}


def hyperparams(tx: GradientTransformation, state: Any) -> dict[str, Any]:
    """The hyper-parameters of a chain by name, as the next step will have them: schedules are evaluated.

    Where two have one name, the names of a `named_chain` and the labels of a `partition` come first, else the name of
    the rule, as in options of parameter groups: `scale_by_adam_b1`. Numbers that only say how state is stored, such as
    dtypes, are left out. A transformation that is not made of rules has those of the mapping `hyperparams` in its
    state, if there is one.

    Args:
      tx: the chain.
      state: the result of `tx.init(params)`, or the state of the last step.

    Returns:
      The values by name: as they were given, or as schedules compute them, a tensor where it has a derivative.

    Raises:
      TypeError: the state was made by another transformation.
      ValueError: a schedule returned something else than a number.

    Example:
      >>> import functional_optim as fo, torch
      >>> tx = fo.adamw(fo.linear_schedule(1.0, 0.0, 4))
      >>> params = torch.ones(1)
      >>> params, state = fo.apply_gradients(tx, params, torch.ones(1), tx.init(params))
      >>> hyperparams(tx, state)["learning_rate"]
      0.75
    """
    tx = as_transformation(tx, "`tx` of hyperparams")
    check_state(tx._state_nodes(()), state)
    found: list[tuple[str, tuple[Path, str], Any]] = []
    for path, part in parts(tx).items():
        bound = part._bound
        if bound is not None:
            own = get_state(state, path)
            for name, value in bound.values.items():
                if value is not None and not isinstance(value, torch.dtype):
                    value = scheduled(bound, name, _count_of(own.count, bound)) if bound.is_schedule(name) else value
                    found.append((name, (path, bound.rule.name), value))
        else:
            injected = getattr(get_state(state, path), "hyperparams", None)
            for name, value in injected.items() if isinstance(injected, Mapping) else ():
                found.append((str(name), (path, "transformation"), value))
    names = unique([name for name, _, _ in found], [owner for _, owner, _ in found], frozenset())
    return {name: value for name, (_, _, value) in zip(names, found, strict=True)}


def _count_of(count: torch.Tensor, bound: Bound) -> int | torch.Tensor:
    """The number of steps that a counter tells; that of a member of `torch.vmap` is the counter itself.

    Raises:
      ValueError: there are counters of several members, or the counter has no memory.
    """
    if count.ndim:
        raise ValueError(
            f"the counter of {bound.rule.name} has shape {tuple(count.shape)}: the state is that of several members, "
            f"which `torch.vmap` maps, as in `vmap(lambda state: fo.hyperparams(tx, state)['learning_rate'])(state)`."
        )
    if count.is_meta:
        raise ValueError(
            f"the counter of {bound.rule.name} is on meta and holds no number; read a state with elements."
        )
    return count if has_members(count) else int(count)


def scheduled(bound: Bound, name: str, count: int | torch.Tensor) -> Any:
    """The value of a schedule after some steps.

    Raises:
      ValueError: the value is no number.
    """
    value = schedule_value(f"{bound.rule.name}.{name}", bound.values[name](count))
    return value if isinstance(value, torch.Tensor) and (value.requires_grad or needs_dispatch()) else float(value)


def slots(tx: GradientTransformation, state: Any) -> dict[str, Tree]:
    """The slots of state of a chain by name, as in the state of a parameter in an optimizer.

    Where two have one name, the names of a `named_chain` and the labels of a `partition` come first, else the name of
    the rule: `scale_by_adam_mu`.

    Args:
      tx: the chain.
      state: the result of `tx.init(params)`, or the state of the last step.

    Returns:
      By name, a tree like the parameters, or a tensor where a slot holds one number for the tree.

    Raises:
      TypeError: the state was made by another transformation.

    Example:
      >>> import functional_optim as fo, torch
      >>> tx = fo.adam(1e-3)
      >>> slots(tx, tx.init({"w": torch.ones(2)}))["mu"]
      {'w': tensor([0., 0.])}
    """
    tx = as_transformation(tx, "`tx` of slots")
    check_state(tx._state_nodes(()), state)
    bounds = {path: rule._bound for path, rule in _walk.rules(tx).items()}
    names = slot_names({path: bound.rule for path, bound in bounds.items()})
    return {name: getattr(get_state(state, path), slot) for (path, slot), name in names.items()}
