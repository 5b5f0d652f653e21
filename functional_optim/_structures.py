"""Trees read and made in plain Python, which a compiler follows at less cost than it follows a pytree library."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch

from ._runtime.packing import PackedTensors
from ._runtime.spec import PLAIN


LEAF = "*"
Tree = Any
# LEAF, or the class of a container, its keys, and the structures of its children: their number if all are leaves. The
# keys of a dict are a tuple; those of a packed tree, whose children are its buffers, the serial number of its form, or
# the form; others have none.
Structure = Any
NO_FORMS: Mapping[str, Any] = {}
FORMS: "WeakValueDictionary[str, Any]" = WeakValueDictionary()  # of packed trees, by serial number
DICTS = (dict, collections.OrderedDict)


class Contents(NamedTuple):
    """A tree that has been read.

    Args:
      structure: its structure.
      leaves: its tensors, None where a leaf is absent.
      strange: names of all else in it.
      forms: the forms of packed trees, by serial number.
    """

    structure: Structure
    leaves: list[Any]
    strange: list[str]
    forms: dict[str, Any]


NOTHING = Contents(None, [], [], {})  # in the place of a tree that is not there


def read(tree: Tree) -> Contents:
    """The structure of a tree, and its leaves.

    Args:
      tree: dicts, lists, tuples, NamedTuples and packed trees of tensors and None.

    Example:
      >>> read({"a": None, "b": (None, [None])}).structure
      (<class 'dict'>, ('a', 'b'), ('*', (<class 'tuple'>, None, ('*', (<class 'list'>, None, 1)))))
    """
    return Contents(*_read(tree))


def _read(tree: Tree) -> tuple[Structure, list[Any], list[str], dict[str, Any]]:
    """The contents of a tree as a plain tuple, which a compiler is quicker to follow, one for each container."""
    if tree is None:
        return LEAF, [None], [], {}
    if isinstance(tree, torch.Tensor):
        known = not torch.compiler.is_dynamo_compiling() or type(tree) in PLAIN
        return LEAF, [tree], [] if known else ["a tensor of another class"], {}
    keys: Any = None
    children: Any = tree
    forms: dict[str, Any] = {}
    if type(tree) in DICTS:
        keys, children = tuple(tree), tree.values()
    elif isinstance(tree, PackedTensors):
        form = tree.form
        keys, children = form.serial, tree.buffers
        forms[keys] = form
    elif not isinstance(tree, (tuple, list)):
        return LEAF, [], ["another object"], {}
    leaves: list[Any] = []
    strange: list[str] = []
    inside: list[Structure] = []
    flat = True
    for x in children:
        if x is None or type(x) in PLAIN:  # a call for each leaf is what a compiler would be slow to follow
            leaves.append(x)
            inside.append(LEAF)
        else:
            flat = False
            structure, own_leaves, own_strange, own_forms = _read(x)
            inside.append(structure)
            leaves += own_leaves
            strange += own_strange
            forms |= own_forms
    return (type(tree), keys, len(inside) if flat else tuple(inside)), leaves, strange, forms


def rebuild(structure: Structure, leaves: Sequence[Any], forms: Mapping[str, Any] = NO_FORMS) -> Tree:
    """The tree of a structure with these leaves.

    Args:
      structure: the structure.
      leaves: the leaves.
      forms: the forms of packed trees, by serial number.

    Example:
      >>> rebuild((dict, ("a", "b"), ((list, None, 2), "*")), [1, 2, 3])
      {'a': [1, 2], 'b': 3}
    """
    return _rebuild(structure, leaves, 0, forms)[0]


def _rebuild(structure: Structure, leaves: Sequence[Any], start: int, forms: Mapping[str, Any]) -> tuple[Tree, int]:
    """The tree, and the position of the first leaf behind it."""
    if isinstance(structure, str):
        return leaves[start], start + 1
    kind, keys, inside = structure
    if isinstance(inside, int):
        stop = start + inside
        children = list(leaves[start:stop])
    else:
        children, stop = [], start
        for x in inside:
            child, stop = _rebuild(x, leaves, stop, forms)
            children.append(child)
    if isinstance(keys, tuple):
        return kind(zip(keys, children, strict=True)), stop
    if keys is not None:
        return kind(forms[keys] if isinstance(keys, str) else keys, children), stop
    # a NamedTuple; a compiler of torch 2.11 cannot ask a class for `_fields`
    named = issubclass(kind, tuple) and kind is not tuple
    return kind(*children) if named else kind(children), stop


def add(params: Tree, updates: Tree) -> Tree | None:
    """Parameters with updates added, as `apply_updates` does; None if the trees are of other kinds, or do not fit."""
    p, u = read(params), read(updates)
    if p.strange or u.strange or p.structure != u.structure:
        return None
    for x, y in zip(p.leaves, u.leaves, strict=True):
        if x is not None and y is not None and (x.shape != y.shape or not x.dtype.is_floating_point):
            return None
    return rebuild(p.structure, sums(p.leaves, u.leaves), p.forms)


def sums(params: Sequence[Any], updates: Sequence[Any]) -> list[Any]:
    """Parameters with updates added, in their own dtypes; one without an update stays as it is.

    Args:
      params: the tensors, None where one is absent.
      updates: the updates, None where one is absent.
    """
    both = list(zip(params, updates, strict=True))
    new = [x if x is None or y is None else (x + y).to(x.dtype) for x, y in both]
    computed = [x for x, y in zip(new, params, strict=True) if x is not y]
    followed = torch.is_grad_enabled() and any(x.requires_grad for x in computed)
    return with_aliases(new, params) if followed else new


def with_aliases(new: Sequence[Any], old: Sequence[Any]) -> list[Any]:
    """New tensors, with aliases in the place of those old ones among them that autograd follows.

    The next step may ask for derivatives at its parameters: those of the same tensor would follow it back through this
    step, too. Leaves that are hidden are no tensors.
    """
    both = zip(new, old, strict=True)
    return [x.view_as(x) if x is y and isinstance(x, torch.Tensor) and x.requires_grad else x for x, y in both]
