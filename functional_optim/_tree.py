"""Pytrees: the one file that names a pytree library.

`None` is a leaf, the absent one: a parameter without a gradient. Register a container of your own with
`optree.register_pytree_node(cls, ..., namespace="functional_optim")` or in optree's global namespace.
"""

import copyreg
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import optree
import torch

from ._packed import Form, Packed, form
from ._runtime.checks import at
from ._runtime.internals import leaves_as_written, register_with_torch, structure_as_text, tree_from_text
from ._runtime.packing import PackedColumn, Place
from ._runtime.recent import in_front


Tree = Any
Spec = optree.PyTreeSpec
NAMESPACE = "functional_optim"


class MaskedNode(NamedTuple):
    """Stands for a leaf that a transformation does not see. It has no leaves of its own.

    Example:
      >>> from functional_optim import masked, trace
      >>> masked(trace(0.9), {"w": True, "b": False}).init({"w": torch.zeros(1), "b": torch.zeros(1)}).inner_state
      TraceState(trace={'w': tensor([0.]), 'b': MaskedNode()})
    """


def flatten(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], Spec]:
    """The leaves of a tree, and its structure; a node that `is_leaf` accepts is a leaf.

    Those of a packed tree are the views of its buffers.
    """
    if isinstance(tree, Packed):
        return list(tree.views), tree.form.spec
    return optree.tree_flatten(tree, is_leaf=is_leaf, none_is_leaf=True, namespace=NAMESPACE)


def flatten_to_buffers(tree: Tree) -> tuple[list[Any], Spec]:
    """The leaves of a tree, and its structure; a packed tree is a container of its buffers."""
    return optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)


def leaves_like(spec: Spec, tree: Tree) -> list[Any]:
    """The objects that a tree has in the places of the leaves of `spec`.

    Raises:
      ValueError: the tree has another structure.
    """
    return spec.flatten_up_to(unpacked(tree))


def unpacked(tree: Tree) -> Tree:
    """The tree of views that a packed tree stands for; any other as it is."""
    return tree.tree() if isinstance(tree, Packed) else tree


def packed_like(like: Tree, tree: Tree) -> Tree:
    """A tree, packed if another one is."""
    if not isinstance(like, Packed) or isinstance(tree, Packed):
        return tree
    leaves, spec = flatten(tree)
    return Packed.of(spec, leaves)


def packed_inside(tree: Tree) -> str | None:
    """The path of a packed tree that is only a part of a tree."""
    if isinstance(tree, Packed):
        return None
    leaves, spec = flatten(tree, is_leaf=lambda x: isinstance(x, Packed))
    return next((path for path, x in zip(paths(spec), leaves, strict=True) if isinstance(x, Packed)), None)


def refuse_packed_inside(name: str, tree: Tree) -> None:
    """Refuses a tree of which only a part is packed.

    Raises:
      TypeError: with the path of that part.
    """
    path = packed_inside(tree)
    if path is not None:
        raise TypeError(f"{name}{at(path)} is packed, but not the whole tree: call `pack` of the whole tree.")


class Reader:
    """Reads trees of one structure; plain dicts of leaves, the most common ones, without the pytree library.

    Args:
      spec: the structure.

    Example:
      >>> Reader(flatten({"b": 0, "a": 0})[1])({"b": 1, "a": 2})
      [2, 1]
    """

    KEEP = 16  # forms of packed trees

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        flat = spec.type is dict and spec.num_nodes == spec.num_leaves + 1 > 2
        self.keys = spec.entries() if flat else None
        self.get = itemgetter(*spec.entries()) if flat else None
        self.forms: list[tuple[Form, tuple[Any, ...] | None]] = []  # of packed trees that were read last

    def __call__(self, tree: Tree) -> Sequence[Any]:
        """The objects that a tree has in the places of the leaves.

        Raises:
          ValueError: the tree has another structure.
        """
        if isinstance(tree, Packed):
            picks = self._picks(tree.form)
            if picks is None:
                raise ValueError("the packed tree has another structure.")
            return PackedColumn(tree, picks)
        if self.get is not None and type(tree) is dict:
            if len(tree) == self.spec.num_leaves:
                try:  # no `contextlib.suppress`: a step reads four trees, and that calls three functions for each
                    return list(self.get(tree))
                except KeyError:
                    pass
            raise ValueError("the dict has other keys.")  # the pytree library's message shows all tensors of the tree
        return leaves_like(self.spec, tree)

    def _picks(self, form: Form) -> tuple[Any, ...] | None:
        """For each leaf, its position among those of a packed tree, or the object in its place.

        None if the packed tree has another structure.
        """
        for known, found in self.forms:
            if known is form:
                return found
        positions = range(form.spec.num_leaves)
        picks: tuple[Any, ...] | None = tuple(positions)
        if form.spec != self.spec:
            try:
                picks = tuple(self.spec.flatten_up_to(form.spec.unflatten(positions)))
            except (ValueError, TypeError):
                picks = None
            if picks is not None and not all(type(k) is int or isinstance(k, MaskedNode) for k in picks):
                picks = None
        self.forms = in_front((form, picks), self.forms, self.KEEP)
        return picks

    def rebuild(self, like: Tree, leaves: Sequence[Any]) -> Tree:
        """A tree with other leaves and the containers of `like`, which has the structure too; packed if `like` is.

        Example:
          >>> Reader(flatten({"b": 0, "a": 0})[1]).rebuild({"b": 0, "a": 0}, [1, 2])
          {'b': 2, 'a': 1}
        """
        if isinstance(like, Packed):
            if isinstance(leaves, PackedColumn) and leaves.packed.layout is like.layout:
                return like.with_buffers(leaves.packed.buffers)
            return packed_like(like, self.spec.unflatten(leaves))
        if self.is_plain(like):
            found = dict(zip(self.keys or (), leaves, strict=True))
            return {key: found[key] for key in like}
        spec = flatten(like)[1]
        if spec != self.spec:  # such as that of an ordered dict, whose leaves are in an order of their own
            leaves = spec.flatten_up_to(self.spec.unflatten(leaves))
        return spec.unflatten(leaves)

    def is_fixed(self, tree: Tree) -> bool:
        """Whether a tree that has been read has the very containers of the structure.

        It is a plain dict of leaves, as the structure is, or packed: then every leaf has a place of its own.
        """
        return self.is_plain(tree) or (isinstance(tree, Packed) and self._picks(tree.form) is not None)

    def is_plain(self, tree: Tree) -> bool:
        """Whether a tree is a plain dict of leaves, as the structure is."""
        return self.keys is not None and type(tree) is dict


def one_level(x: Any) -> tuple[list[Any], Spec] | None:
    """The children of a container, and its structure with a leaf for each of them; None for a leaf."""
    if optree.tree_is_leaf(x, none_is_leaf=True, namespace=NAMESPACE):
        return None
    children, spec = optree.tree_flatten(x, is_leaf=lambda y: y is not x, none_is_leaf=True, namespace=NAMESPACE)
    return children, spec


def tree_map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Applies a function to the leaves of trees of one structure; the result is packed if the first one is."""
    if isinstance(tree, Packed):
        return packed_like(tree, tree_map(fn, tree.tree(), *rest))
    return optree.tree_map(fn, tree, *map(unpacked, rest), none_is_leaf=True, namespace=NAMESPACE)


@functools.lru_cache(maxsize=64)
def paths(spec: Spec) -> list[str]:
    """The path of each leaf: keys, indices and field names, joined by dots."""
    return [".".join(map(key_name, accessor)) for accessor in spec.accessors()]


def key_name(entry: optree.PyTreeEntry) -> str:
    """A step on the path to a leaf: a key, an index, or the name of a field."""
    return str(getattr(entry, "field", entry.entry))


def broadcast_prefix(prefix: Tree, spec: Spec) -> list[Any]:
    """Spreads a tree that ends earlier than `spec`, or where it does, over the leaves of `spec`.

    Raises:
      ValueError: the tree is not a prefix.
    """
    leaves, own = flatten(prefix)
    filled: list[Any] = [None] * spec.num_leaves
    # by key: the leaves of a plain dict and of an ordered one with the same keys come in different orders
    for x, part in zip(leaves, leaves_like(own, spec.unflatten(range(spec.num_leaves))), strict=True):
        for k in flatten(part)[0]:
            filled[k] = x
    return filled


def difference(expected: Spec, tree: Tree) -> str:
    """Says in words where the structure of a tree departs from the expected one."""
    have, want = paths(flatten(tree)[1]), paths(expected)
    missing = [p for p in want if p not in set(have)]
    extra = [p for p in have if p not in set(want)]
    parts = [
        f"{change} {', '.join(map(repr, ps[:5]))}{' ...' if len(ps) > 5 else ''}"
        for change, ps in (("it lacks", missing), ("it has the unknown", extra))
        if any(ps)
    ]
    if have != want and "" in have:
        parts.append(f"it is one leaf, {type(tree).__name__}")
    return " and ".join(parts) or f"the leaves agree but the containers do not: {flatten(tree)[1]}, not {expected}"


class View(NamedTuple):
    """A tree as a transformation sees it: some leaves of the whole.

    Args:
      spec: structure of the whole tree.
      leaves: leaves of the whole tree.
      seen: for each leaf, whether the transformation sees it.
      packed: whether the tree is packed.
    """

    spec: Spec
    leaves: tuple[Any, ...]
    seen: tuple[bool, ...]
    packed: bool = False

    @classmethod
    def of(cls, tree: Tree) -> "View":
        """The view of a tree all of whose leaves are seen.

        Raises:
          TypeError: a part of the tree is packed.
        """
        refuse_packed_inside("the tree", tree)
        leaves, spec = flatten(tree)
        return cls(spec, tuple(leaves), tuple(x is not None for x in leaves), isinstance(tree, Packed))

    def narrow(self, mask: Sequence[bool]) -> "View":
        """The same tree with fewer leaves seen."""
        return self._replace(seen=tuple(bool(m) and s for m, s in zip(mask, self.seen, strict=True)))

    def tree(self, leaves: Sequence[Any] | None = None) -> Tree:
        """The tree with a `MaskedNode` in place of leaves that are there and are not seen.

        Args:
          leaves: others in the places of its own, some perhaps None.
        """
        chosen = self.leaves if leaves is None else leaves
        return self.spec.unflatten(
            MaskedNode() if own is not None and not seen else x
            for x, own, seen in zip(chosen, self.leaves, self.seen, strict=True)
        )

    def map(self, fn: Callable[[Any], Any]) -> Tree:
        """Applies a function to the leaves that are seen; the result is packed if the tree is."""
        made = self.tree([fn(x) if seen else x for x, seen in zip(self.leaves, self.seen, strict=True)])
        if not self.packed:
            return made
        leaves, spec = flatten(made)
        return Packed.of(spec, leaves)


def show(x: Any) -> str:
    """A value as it stands in a call; a function by its name."""
    return x.__qualname__ if inspect.isfunction(x) else repr(x)


def restore_packed(skeleton: Tree, places: Sequence[Any], buffers: Sequence[Any]) -> Packed:
    """A packed tree from the parts that `pickle` keeps: the tree with positions for leaves, the places, the buffers."""
    found = tuple(None if place is None else Place(*place) for place in places)
    return Packed(form(flatten(skeleton)[1], found), buffers)


def _reduce(packed: Packed) -> tuple[Any, ...]:
    places = [None if place is None else tuple(place) for place in packed.layout.places]
    return restore_packed, (packed.form.spec.unflatten(range(len(places))), places, list(packed.buffers))


copyreg.pickle(Packed, _reduce)


def _buffers(packed: Packed) -> tuple[list[Any], Form]:
    return list(packed.buffers), packed.form


def _of_buffers(form: Form, buffers: Iterable[Any]) -> Packed:
    return Packed(form, tuple(buffers))


def _write_form(form: Form) -> list[Any]:
    """A form as an object that JSON knows."""
    skeleton = form.spec.unflatten(range(form.spec.num_leaves))
    places = [form.layout.places[k] for k in leaves_as_written(skeleton)]
    return [structure_as_text(skeleton), [None if place is None else list(place) for place in places]]


def _read_form(text: str, places: Sequence[Any]) -> Form:
    order, spec = flatten(tree_from_text(text, range(len(places))))
    found = [None if x is None else Place(x[0], x[1], tuple(x[2]), tuple(x[3])) for x in places]
    return form(spec, tuple([found[k] for k in order]))


optree.register_pytree_node(Packed, _buffers, _of_buffers, namespace=NAMESPACE)  # type: ignore[arg-type]
register_with_torch(
    Packed,
    _buffers,
    lambda buffers, form: _of_buffers(form, buffers),
    _write_form,
    lambda written: _read_form(*written),
)
torch.serialization.add_safe_globals([restore_packed, MaskedNode])
