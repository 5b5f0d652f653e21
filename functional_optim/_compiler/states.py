"""States of rules: a NamedTuple class for each rule, and the files that hold its states."""

import collections
import copy
import operator
import pickle
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .rule import Rule


class EmptyState(NamedTuple):
    """The state of a transformation that keeps none.

    Example:
      >>> from functional_optim import scale
      >>> scale(-0.1).init({})
      EmptyState()
    """


def state_type(rule: Rule, counted: bool) -> Any:
    """The NamedTuple that holds the state of a rule: `count` if it counts steps, and its slots.

    The rule keeps it: states of two classes would not fit each other.
    """
    if counted not in rule.state_types:
        rule.state_types[counted] = _made_state_type(rule, counted)
    return rule.state_types[counted]


def _made_state_type(rule: Rule, counted: bool) -> Any:
    fields = (*(("count",) if counted else ()), *rule.slots)
    if not fields:
        return EmptyState
    name = "".join(word.capitalize() for word in rule.name.split("_")) + "State"
    namedtuple: Any = collections.namedtuple  # a type checker wants fields that it can read
    made = namedtuple(name, fields, module=rule.fn.__module__)
    made.__doc__ = f"The state of `{rule.name}`."
    made._rule, made._counted = rule, counted  # no field can have these names
    # pickled by way of the rule's public name, since this class has none
    made.__deepcopy__ = lambda self, memo: type(self)(*copy.deepcopy(tuple(self), memo))  # of the rule that it is of
    made.__reduce__ = lambda self: (restore_slots, (_factory_to_save(rule), counted, tuple(rule.slots), *self))
    return made


def _rule_by_name(rule: Rule) -> Rule | None:
    """The rule that pickle finds under the name of one, which may have been written anew since; None if it is gone."""
    try:
        found = operator.attrgetter(rule.factory.__qualname__)(sys.modules[rule.factory.__module__])
    except (AttributeError, KeyError):  # within a function, or gone
        return None
    now = getattr(found, "rule", None)
    return now if isinstance(now, Rule) and now.name == rule.name else None  # not another one that has the name, too


def _factory_to_save(rule: Rule) -> Any:
    """The function of a rule that pickle finds by name.

    Raises:
      PicklingError: the rule under that name has other slots.
    """
    now = _rule_by_name(rule) or rule
    if set(now.slots) != set(rule.slots):
        raise pickle.PicklingError(
            f"this state of {rule.name} has {_listed(rule.slots)}, but the rule has been written anew with "
            f"{_listed(now.slots)}, and a file would be read by the new one; give the new rule another name."
        )
    return now.factory


def _listed(slots: Iterable[str]) -> str:
    return f"the slots {', '.join(slots)}" if slots else "no slots"


def rule_of(state: Any) -> Rule | None:
    """The rule that an object is the state of; None if it is anything else."""
    rule = getattr(type(state), "_rule", None)
    return rule if isinstance(rule, Rule) else None


def restore_slots(factory: Any, counted: bool, slots: Sequence[str], *values: Any) -> Any:
    """Makes the state of a rule, for unpickling. Slots go by name, for the rule may have been written anew.

    Raises:
      TypeError: the rule has other slots now.
    """
    # of several functions that had a name, `torch.load(weights_only=True)` knows all, and takes one
    known = [_rule_by_name(factory.rule) or factory.rule, factory.rule]
    rule = next((x for x in known if set(x.slots) == set(slots)), None)
    if rule is None:
        raise TypeError(
            f"this file has a state of {known[0].name} with {_listed(slots)}, but the rule has been written anew with "
            f"{_listed(known[0].slots)}; load it with the rule that it was saved with."
        )
    found = dict(zip(slots, values[counted:], strict=True))
    return state_type(rule, counted)(*values[: int(counted)], *(found[name] for name in rule.slots))


def restore_state(factory: Any, counted: bool, *values: Any) -> Any:
    """Makes the state of a rule from a file without names of slots, which are in order."""
    return state_type(_rule_by_name(factory.rule) or factory.rule, counted)(*values)
