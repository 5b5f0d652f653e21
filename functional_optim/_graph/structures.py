"""Trees read and made in plain Python, which a compiler follows at less cost than it follows a pytree library."""

import collections
from collections.abc import Sequence
from typing import Any

import torch

from .._runtime.spec import PLAIN
from .._tree import Tree


LEAF = "*"
# LEAF, or the class of a container, the keys of a dict (else None), and the structures of its children: their number if
# all are leaves
Structure = Any
DICTS = (dict, collections.OrderedDict)


def read(tree: Tree, leaves: list[Any], strange: list[str]) -> Structure:
    """The structure of a tree.

    Args:
      tree: dicts, lists, tuples and NamedTuples of tensors and None.
      leaves: a list that the tensors are appended to, and None where a leaf is absent.
      strange: a list that anything else is noted in.

    Example:
      >>> read({"a": None, "b": (None, [None])}, [], [])
      (<class 'dict'>, ('a', 'b'), ('*', (<class 'tuple'>, None, ('*', (<class 'list'>, None, 1)))))
    """
    if tree is None:
        leaves.append(None)
        return LEAF
    if isinstance(tree, torch.Tensor):
        if torch.compiler.is_dynamo_compiling() and type(tree) not in PLAIN:
            strange.append("a tensor of another class")
        leaves.append(tree)
        return LEAF
    if type(tree) in DICTS:
        keys, children = tuple(tree), tree.values()
    elif isinstance(tree, (tuple, list)):
        keys, children = None, tree
    else:
        strange.append("another object")
        return LEAF
    inside: list[Structure] = []
    flat = True
    for x in children:
        if x is None or type(x) in PLAIN:  # a call for each leaf is what a compiler would be slow to follow
            leaves.append(x)
            inside.append(LEAF)
        else:
            flat = False
            inside.append(read(x, leaves, strange))
    return type(tree), keys, len(inside) if flat else tuple(inside)


def rebuild(structure: Structure, leaves: Sequence[Any]) -> Tree:
    """The tree of a structure with these leaves.

    Example:
      >>> rebuild((dict, ("a", "b"), ((list, None, 2), "*")), [1, 2, 3])
      {'a': [1, 2], 'b': 3}
    """
    return _rebuild(structure, leaves, 0)[0]


def _rebuild(structure: Structure, leaves: Sequence[Any], start: int) -> tuple[Tree, int]:
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
            child, stop = _rebuild(x, leaves, stop)
            children.append(child)
    if keys is not None:
        return kind(zip(keys, children, strict=True)), stop
    # a NamedTuple; a compiler of torch 2.11 cannot ask a class for `_fields`
    named = issubclass(kind, tuple) and kind is not tuple
    return kind(*children) if named else kind(children), stop


def add(params: Tree, updates: Tree) -> Tree | None:
    """Parameters with updates added, as `apply_updates` does; None if the trees are of other kinds, or do not fit."""
    p: list[Any] = []
    u: list[Any] = []
    strange: list[str] = []
    structure, other = read(params, p, strange), read(updates, u, strange)
    if strange or structure != other:
        return None
    for x, y in zip(p, u, strict=True):
        if x is not None and y is not None and (x.shape != y.shape or not x.dtype.is_floating_point):
            return None
    both = zip(p, u, strict=True)
    return rebuild(structure, [x if x is None or y is None else (x + y).to(x.dtype) for x, y in both])
