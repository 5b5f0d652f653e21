"""Chains whose numbers are options: looking into them, and rewriting them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .._chain import Chain
from .._compiler.rule import Slot
from .._rule import RuleTransformation
from .._transform import GradientTransformation
from .._tree import View


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


def slots_of(template: Template, view: View) -> list[dict[str, tuple[Slot, Mapping[str, Any]] | None]]:
    """What a chain keeps for each leaf, which not all of its transformations may see.

    Args:
      template: the chain.
      view: the leaves; it keeps nothing for those that are not seen.

    Returns:
      For each leaf, by key, the slot and the hyper-parameters of its rule; None for the counter `step`.
    """
    slots: list[dict[str, tuple[Slot, Mapping[str, Any]] | None]] = [{} for _ in view.seen]
    counted: list[bool] = [False] * len(slots)
    for link in template.tx._links(view, ()):
        for i in (i for i, seen in enumerate(link.seen) if seen and link.bound is not None):
            assert link.bound is not None
            counted[i] |= link.bound.uses_step
            for name, slot in link.bound.rule.slots.items():
                slots[i][template.keys[link.path, name]] = slot, link.bound.values
    return [{"step": None, **own} if own and steps else own for own, steps in zip(slots, counted, strict=True)]


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
      >>> rewrite(fo.sgd(0.1), lambda path, rule: rule.replace(learning_rate=fo.leafwise.Option("lr")))
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
