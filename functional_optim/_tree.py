"""Pytrees: the one file that names a pytree library.

`None` is a leaf, the absent one: a parameter without a gradient. Register a container of your own with
`optree.register_pytree_node(cls, ..., namespace="functional_optim")` or in optree's global namespace.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import optree


Tree = Any
Spec = optree.PyTreeSpec
NAMESPACE = "functional_optim"


class MaskedNode(NamedTuple):
    """Stands for a leaf that a transformation does not see. It has no leaves of its own."""


def flatten(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], Spec]:
    """The leaves of a tree, and its structure; a node that `is_leaf` accepts is a leaf."""
    return optree.tree_flatten(tree, is_leaf=is_leaf, none_is_leaf=True, namespace=NAMESPACE)


def leaves_like(spec: Spec, tree: Tree) -> list[Any]:
    """The objects that a tree has in the places of the leaves of `spec`.

    Raises:
      ValueError: the tree has another structure.
    """
    return spec.flatten_up_to(tree)


class Reader:
    """Reads trees of one structure; plain dicts of leaves, the most common ones, without the pytree library.

    Args:
      spec: the structure.

    Example:
      >>> Reader(flatten({"b": 0, "a": 0})[1])({"b": 1, "a": 2})
      [2, 1]
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        flat = spec.type is dict and spec.num_nodes == spec.num_leaves + 1 > 2
        self.keys = spec.entries() if flat else None
        self.get = itemgetter(*spec.entries()) if flat else None

    def __call__(self, tree: Tree) -> list[Any]:
        """The objects that a tree has in the places of the leaves.

        Raises:
          ValueError: the tree has another structure.
        """
        if self.get is not None and type(tree) is dict and len(tree) == self.spec.num_leaves:
            with contextlib.suppress(KeyError):
                return list(self.get(tree))
        return leaves_like(self.spec, tree)

    def rebuild(self, like: Tree, leaves: Sequence[Any]) -> Tree:
        """A tree with other leaves and the containers of `like`, which has the structure too.

        Example:
          >>> Reader(flatten({"b": 0, "a": 0})[1]).rebuild({"b": 0, "a": 0}, [1, 2])
          {'b': 2, 'a': 1}
        """
        if self.is_plain(like):
            found = dict(zip(self.keys or (), leaves, strict=True))
            return {key: found[key] for key in like}
        return flatten(like)[1].unflatten(leaves)

    def is_plain(self, tree: Tree) -> bool:
        """Whether a tree is a plain dict of leaves, as the structure is."""
        return self.keys is not None and type(tree) is dict


def one_level(x: Any) -> tuple[list[Any], Spec] | None:
    """The children of a container, and its structure with a leaf for each of them; None for a leaf."""
    if optree.tree_is_leaf(x, none_is_leaf=True, namespace=NAMESPACE):
        return None
    children, spec = optree.tree_flatten(x, is_leaf=lambda y: y is not x, none_is_leaf=True, namespace=NAMESPACE)
    return children, spec


def unflatten(spec: Spec, leaves: Sequence[Any]) -> Tree:
    """The tree of that structure with these leaves."""
    return spec.unflatten(leaves)


def tree_map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Applies a function to the leaves of trees of one structure."""
    return optree.tree_map(fn, tree, *rest, none_is_leaf=True, namespace=NAMESPACE)


@functools.lru_cache(maxsize=64)
def paths(spec: Spec) -> list[str]:
    """The path of each leaf: keys, indices and field names, joined by dots."""
    return [".".join(str(getattr(e, "field", e.entry)) for e in accessor) for accessor in spec.accessors()]


def broadcast_prefix(prefix: Tree, spec: Spec) -> list[Any]:
    """Spreads a tree that ends earlier than `spec`, or where it does, over the leaves of `spec`.

    Raises:
      ValueError: it is not a prefix.
    """
    leaves, own = flatten(prefix)
    spread: list[Any] = [None] * spec.num_leaves
    # by key: the leaves of a plain dict and of an ordered one with the same keys come in different orders
    for x, part in zip(leaves, leaves_like(own, spec.unflatten(range(spec.num_leaves))), strict=True):
        for k in flatten(part)[0]:
            spread[k] = x
    return spread


def difference(expected: Spec, tree: Tree) -> str:
    """Says in words where the structure of a tree departs from the expected one."""
    have, want = paths(flatten(tree)[1]), paths(expected)
    missing = [p for p in want if p not in set(have)]
    extra = [p for p in have if p not in set(want)]
    parts = [
        f"{what} {', '.join(map(repr, ps[:5]))}{' ...' if len(ps) > 5 else ''}"
        for what, ps in (("it lacks", missing), ("it has the unknown", extra))
        if ps
    ]
    return " and ".join(parts) or f"the leaves agree but the containers do not: {flatten(tree)[1]}, not {expected}"


class View(NamedTuple):
    """A tree as a transformation sees it: some leaves of the whole.

    Args:
      spec: structure of the whole tree.
      leaves: leaves of the whole tree.
      seen: for each leaf, whether the transformation sees it.
    """

    spec: Spec
    leaves: tuple[Any, ...]
    seen: tuple[bool, ...]

    @classmethod
    def of(cls, tree: Tree) -> "View":
        leaves, spec = flatten(tree)
        return cls(spec, tuple(leaves), tuple(x is not None for x in leaves))

    def narrow(self, mask: Sequence[bool]) -> "View":
        """The same tree with fewer leaves seen."""
        return self._replace(seen=tuple(bool(m) and s for m, s in zip(mask, self.seen, strict=True)))

    def tree(self, leaves: Sequence[Any] | None = None) -> Tree:
        """The tree with a `MaskedNode` in place of leaves that are not seen."""
        chosen = self.leaves if leaves is None else leaves
        return self.spec.unflatten(
            x if seen or x is None else MaskedNode() for x, seen in zip(chosen, self.seen, strict=True)
        )

    def map(self, fn: Callable[[Any], Any]) -> Tree:
        """Applies a function to the leaves that are seen."""
        return self.tree([fn(x) if seen else x for x, seen in zip(self.leaves, self.seen, strict=True)])


def show(x: Any) -> str:
    """A value as it stands in a call; a function by its name."""
    return x.__qualname__ if inspect.isfunction(x) else repr(x)
