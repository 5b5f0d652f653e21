"""Extra arguments of `update`: the numbers and trees that transformations of a chain take by name."""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ._regions import Opaque, Region
from ._runtime.checks import as_number


# names that training loops pass to any transformation, as with optax
ALWAYS_ACCEPTED = frozenset({"value", "grad", "value_fn"})


class Extras(NamedTuple):
    """The extra arguments of a chain.

    Args:
      needed: the numbers that rules need, each with a rule.
      trees: the trees that rules need, each with a rule.
      taken: all names that are taken; None if any is.
    """

    needed: dict[str, str]
    trees: dict[str, str]
    taken: frozenset[str] | None

    def check(self, extra: Mapping[str, Any], call: str) -> None:
        """Refuses extra arguments among which one is missing, or has a tree in the place of a number.

        Args:
          extra: the extra arguments of a step.
          call: the call that is to be made, with a pair of braces for the name of an argument.

        Raises:
          TypeError: one is missing.
          ValueError: one is a tree, but a rule takes a number.
        """
        for name, rule in (*self.needed.items(), *self.trees.items()):
            if name not in extra:
                raise TypeError(f"{rule} needs the extra argument `{name}`: call `{call.format(name)}`.")
        for name, rule in self.needed.items():
            check_no_tree(name, rule, extra[name])

    def extra_numbers(self, extra: Mapping[str, Any]) -> Mapping[str, Any]:
        """The extra arguments of a step that are numbers.

        Raises:
          TypeError: one is missing, or nothing in the chain takes one that is given.
        """
        self.check(extra, "update(updates, state, params, {}=...)")
        unknown = [] if self.taken is None else [name for name in extra if name not in self.taken]
        if unknown:
            hint = " `apply_gradients` takes it, which writes in place." if unknown[0] == "donate" else ""
            raise TypeError(
                f"no transformation of the chain takes the extra argument `{unknown[0]}`; "
                f"they take {', '.join(map(repr, sorted(self.taken or ()))) or 'none'}.{hint}"
            )
        return {name: as_number(f"the extra argument `{name}` is", extra[name]) for name in self.needed}


def extras_of(segments: Sequence[Region | Opaque]) -> Extras:
    """The extra arguments of the segments of a chain.

    Raises:
      TypeError: one is a number for a rule and a tree for another.
    """
    needed: dict[str, str] = {}
    trees: dict[str, str] = {}
    taken: set[str] | None = set()
    for segment in segments:
        if isinstance(segment, Region):
            for bound in segment.bound_rules.values():
                needed |= dict.fromkeys(bound.rule.extras, bound.rule.name)
            trees |= segment.tree_extras
        elif taken is not None:
            own = segment.link.tx._extra_names()
            taken = None if own is None else taken | own
    both = next((name for name in needed if name in trees), None)
    if both is not None:
        raise TypeError(
            f"the extra argument `{both}` is a number for {needed[both]} and a tree for {trees[both]}; rename one."
        )
    known = None if taken is None else frozenset(taken | set(needed) | set(trees)) | ALWAYS_ACCEPTED
    return Extras(needed, trees, known)


def check_no_tree(name: str, rule: str, x: Any) -> None:
    """Refuses a tree where a rule takes a number.

    Raises:
      ValueError: the argument is a tree.
    """
    if isinstance(x, (Mapping, list, tuple)):
        raise ValueError(
            f"the extra argument `{name}` is a {type(x).__name__}, but {rule} takes a number; a rule that takes a tree "
            f"like the parameters is declared with `extra={{{name!r}: 'element'}}`."
        )


def check_no_number(name: str, rule: str, x: Any, expected: str, one_leaf: bool = False) -> None:
    """Refuses a number, or one tensor for all leaves, where a rule takes a tree.

    Raises:
      ValueError: the argument is a number, or such a tensor.
    """
    number = not isinstance(x, torch.Tensor) and isinstance(x, numbers.Number)
    if number or (isinstance(x, torch.Tensor) and not one_leaf):
        shown = repr(x) if number else f"one tensor of shape {tuple(x.shape)}"
        raise ValueError(
            f"the extra argument `{name}` is {shown}, but {rule} takes {expected}, a tensor for each leaf."
        )
