"""Trees read and made in plain Python, which a compiler follows at less cost than it follows a pytree library."""

import collections
from collections.abc import Iterator
from typing import Any

import torch

from .._runtime.spec import PLAIN
from .._tree import Tree


LEAF = "*"
# LEAF, or the class of a container with the keys of a dict (else None) and the structures of its children
Structure = Any
DICTS = (dict, collections.OrderedDict)


def read(tree: Tree, leaves: list[Any], strange: list[str]) -> Structure:
    """The structure of a tree.

    Args:
      tree: dicts, lists, tuples and NamedTuples of tensors and None.
      leaves: a list that the tensors are appended to, and None where a leaf is absent.
      strange: a list that anything else is noted in.

    Example:
      >>> read({"a": None, "b": (None,)}, [], [])
      (<class 'dict'>, ('a', 'b'), ('*', (<class 'tuple'>, None, ('*',))))
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
        return type(tree), tuple(tree), tuple([read(x, leaves, strange) for x in tree.values()])
    if isinstance(tree, (tuple, list)):
        return type(tree), None, tuple([read(x, leaves, strange) for x in tree])
    strange.append("another object")
    return LEAF


def rebuild(structure: Structure, leaves: Iterator[Any]) -> Tree:
    """The tree of a structure with these leaves.

    Example:
      >>> rebuild((dict, ("a",), ((list, None, ("*", "*")),)), iter([1, 2]))
      {'a': [1, 2]}
    """
    if isinstance(structure, str):
        return next(leaves)
    kind, keys, inside = structure
    children = [rebuild(x, leaves) for x in inside]
    if keys is not None:
        return kind(zip(keys, children, strict=True))
    return kind(*children) if hasattr(kind, "_fields") else kind(children)


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
    return rebuild(
        structure,
        iter([x if x is None or y is None else (x + y).to(x.dtype) for x, y in zip(p, u, strict=True)]),
    )
