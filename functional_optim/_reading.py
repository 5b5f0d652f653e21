"""Reading back: the names of slots, and the states of rules within the state of a chain."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ._compiler.rule import Rule, rule_of
from ._transform import Path


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
        for candidate in (*plain, *labelled, *_numbered(f"{rule}_{name}")):
            if candidate not in taken and candidate not in chosen:
                chosen[candidate] = None
                break
    return list(chosen)


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{k}" for k in range(2, 1000))


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
