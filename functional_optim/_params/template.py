"""Templates and lists of parameters: the parameters of an optimizer, and the chains that step them."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .._compiler.slots import Slot
from .._transform import GradientTransformation, Path, parts
from .._tree import View


States = Sequence[dict[str, Any]]  # the state of each parameter
Keys = Mapping[tuple[Path, str], str]  # for each path of a rule and slot, the key in the state of a parameter


class Template(NamedTuple):
    """A transformation whose numbers are options, and the names of its slots.

    Args:
      tx: the transformation.
      keys: for each rule's path in it and slot, the key in the state of a parameter.
      prefixes: for each path of a transformation that is not made of rules, the beginning of its keys, which is the
        same under all switches.
    """

    tx: GradientTransformation
    keys: Keys
    prefixes: Mapping[Path, str] = {}


class ParamList(NamedTuple):
    """The parameters of a step, an entry per parameter in each field.

    Args:
      names: the name of each, in messages and for masks; no name occurs twice.
      tensors: the parameters.
      templates: the transformation of each, as a position in a list of templates.
      groups: the options of each, as a position in a list of options.
      later: the names of parameters that joined behind the first step of others.
    """

    names: Sequence[str]
    tensors: Sequence[torch.Tensor]
    templates: Sequence[int]
    groups: Sequence[int]
    later: frozenset[str] = frozenset()


def prefixes_of(tx: GradientTransformation, path: Path = ()) -> dict[Path, str]:
    """The beginnings of the keys of transformations that are not made of rules, by path.

    Args:
      tx: a chain.
      path: its path in a larger one.
    """
    numbered = enumerate(parts(tx).items())
    return {(*path, *own): f"transformation_{k}" for k, (own, part) in numbered if part._bound is None}


def view_of(names: Sequence[str], params: Sequence[torch.Tensor]) -> View:
    """Parameters as the tree that masks are asked about."""
    return View.of(OrderedDict(zip(names, params, strict=True)))


def gradient_dtype(p: torch.Tensor) -> torch.dtype:
    """The dtype of a parameter's gradient; that of one which it is about to get, where it has none."""
    if p.grad is not None:
        return p.grad.dtype
    return getattr(p, "grad_dtype", None) or p.dtype


def slots_of(template: Template, view: View) -> list[dict[str, tuple[Slot, Mapping[str, Any]] | None]]:
    """The slots that a chain keeps for each parameter, which not all of its transformations may see.

    Args:
      template: the chain.
      view: the parameters; it keeps nothing for one that is not seen.

    Returns:
      For each parameter, by key, the slot and the hyper-parameters of its rule; None for the counter `step`.
    """
    slots: list[dict[str, tuple[Slot, Mapping[str, Any]] | None]] = [{} for _ in view.seen]
    counted: list[bool] = [False] * len(slots)
    for link in template.tx._links(view, ()):
        for i in (i for i, seen in enumerate(link.seen) if seen and link.bound is not None):
            assert link.bound is not None
            counted[i] |= link.bound.uses_step
            for name, slot in link.bound.rule.slots.items():
                if i not in link.lacking.get(name, ()):
                    slots[i][template.keys[link.path, name]] = slot, link.bound.values
    return [{"step": None, **own} if own and steps else own for own, steps in zip(slots, counted, strict=True)]
