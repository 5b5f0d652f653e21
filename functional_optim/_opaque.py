"""State of an opaque transformation, split among the parameters.

An optimizer keeps its state with each parameter, so the state of a transformation that can only be called has to be
taken apart: which entries belong to a parameter, which to the whole tree? The structure answers it, once. `init` is
called a second time for a tree with one more parameter, and the two states are compared: a container that has grown by
an entry holds one entry per parameter, everything else belongs to the tree. What fits neither is refused.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ._runtime.checks import at
from ._runtime.internals import is_wrapper_of_a_transformation
from ._runtime.spec import PLAIN
from ._state_nodes import brief
from ._transform import GradientTransformation, Link
from ._tree import Spec, View, flatten, key_name, one_level, paths


# The entries of a state: by the parameter's name, None for an entry of the tree, and the path
Entries = dict[tuple[str | None, str], Any]


class SplitState:
    """The state of an opaque transformation in the flat dicts of parameters.

    Entries of a parameter are in its own dict; those of the tree are in the dict of the first parameter that the
    transformation sees. Keys begin with `prefix`.

    Args:
      link: the transformation.
      prefix: the beginning of its keys.
      view: the parameters.

    Raises:
      TypeError, ValueError: the state holds something else than tensors and numbers, or cannot be split.
    """

    def __init__(self, link: Link, prefix: str, view: View) -> None:
        self.tx, self.prefix, self.view = link.tx, prefix, view._replace(seen=link.seen)
        self.seen = [name for name, seen in zip(view.spec.entries(), link.seen, strict=True) if seen]
        state = link.tx.init(self.view.tree())
        names = dict(zip(view.spec.entries(), link.seen, strict=True))
        self.shape = _compare(state, link.tx.init(_with_one_more(self.view)), names, self._fail)
        self.initial = self.split(state)  # entries that no parameter has taken over yet
        self.keys = {entry: self._key(*entry) for entry in self.initial}
        self.filled = [entry for entry, x in self.initial.items() if x is not None]

    def _fail(self, path: str, reason: str) -> Exception:
        return ValueError(
            f"the state of {brief(self.tx)}{at(path)} {reason}, so it cannot be split among the parameters of an "
            f"optimizer; keep one entry per parameter, in a dict by its name or in a list in their order."
        )

    def _key(self, name: str | None, path: str) -> str:
        start = f"{self.prefix}:tree" if name is None else self.prefix
        return f"{start}.{path}" if path else start

    def split(self, state: Any) -> Entries:
        """Takes a state apart.

        Raises:
          TypeError, ValueError: its structure is not that of the state that `init` made.
        """
        return self.shape.split(state, "", self)

    def join(self, found: Entries) -> Any:
        """The state of which these are the entries."""
        return self.shape.join("", found)

    def holder(self, entry: tuple[str | None, str]) -> str:
        """The parameter in whose dict an entry is put."""
        return self.seen[0] if entry[0] is None else entry[0]

    def find(self, entry: tuple[str | None, str], states: Mapping[str, Mapping[str, Any]]) -> Any:
        """An entry within the dicts of parameters; `MISSING` if it is nowhere."""
        key, holders = self.keys[entry], self.seen if entry[0] is None else (entry[0],)
        return next((states[name][key] for name in holders if key in states[name]), MISSING)

    def missing(self, states: Mapping[str, Mapping[str, Any]], present: Sequence[str]) -> list[tuple[str | None, str]]:
        """The entries that `init` makes and that are nowhere.

        Args:
          states: the dict of each parameter, by name.
          present: the parameters that take the step; others may lack their entries.
        """
        there = {*present, None} if self.seen else set(present)  # an entry of the tree needs a parameter that holds it
        return [entry for entry in self.filled if entry[0] in there and self.find(entry, states) is MISSING]

    def make(self, entries: Sequence[tuple[str | None, str]]) -> list[tuple[str, str, Any]]:
        """Initial values of entries, as the parameter's name, the key and the value.

        They are given away, since `update` may write to them: an entry that starts anew is made anew.
        """
        made, taken = [], _addresses_of(self.view.leaves)
        for entry in entries:
            if entry not in self.initial:
                self.initial = self.split(self.tx.init(self.view.tree()))
            made.append((self.holder(entry), self.keys[entry], _apart(self.initial.pop(entry), taken)))
        return made

    def gather(self, states: Mapping[str, Mapping[str, Any]]) -> Any:
        """The state whose entries are in the dicts of parameters; those of parameters without any are of `init`.

        Args:
          states: the dict of each parameter, by name.
        """
        found = {entry: self.find(entry, states) for entry in self.keys}
        return self.join({e: self.initial.get(e) if x is MISSING else x for e, x in found.items()})

    def entries(self, state: Any, present: Sequence[str]) -> list[tuple[str, str, Any]]:
        """The entries of a new state, as the parameter's name, the key and the value.

        Args:
          state: the state.
          present: the parameters that took the step; entries of others are left out.
        """
        there, found = {*present, None} if self.seen else set(present), self.split(state)
        # a gradient is its owner's, who clears it or adds to it
        grads = [getattr(p, "grad", None) for p in self.view.leaves]
        taken = _addresses_of([*self.view.leaves, *grads]) if found else frozenset()
        return [
            (self.holder((name, path)), self.keys[name, path], _apart(x, taken))
            for (name, path), x in found.items()
            if name in there
        ]


MISSING = object()


def check_apart(tx: GradientTransformation, state: Any, params: Sequence[Any]) -> None:
    """Refuses a state whose memory is that of parameters, which a step that is donated writes to.

    Raises:
      ValueError: with the path of the entry.
    """
    leaves, spec = flatten(state)
    taken = _addresses_of(params)
    for path, x in zip(paths(spec), leaves, strict=True):
        if _address(x) in taken:
            raise ValueError(
                f"the state of {brief(tx)}{at(path)} shares memory with a parameter, which donate=True "
                f"writes to; store `x.detach().clone()`."
            )


def _apart(x: Any, taken: frozenset[int]) -> Any:
    """An entry that is written to by nobody else: a copy of one whose memory is taken."""
    return x.detach().clone() if _address(x) in taken else x


def _addresses_of(tensors: Iterable[Any]) -> frozenset[int]:
    """The addresses of the storages of tensors that have one."""
    return frozenset(address for address in map(_address, tensors) if address is not None)


def _address(x: Any) -> int | None:
    if type(x) not in PLAIN or x.layout is not torch.strided or is_wrapper_of_a_transformation(x):
        return None
    return x.untyped_storage().data_ptr() or None


# The shape of a state is a nest of these, one per node. Each splits a node of a state and joins it again.


class _Leaf(NamedTuple):
    """A tensor, a number or None that belongs to the tree."""

    def split(self, x: Any, path: str, owner: SplitState) -> Entries:
        _check_entry(x, path, owner)
        return {(None, path): x}

    def join(self, path: str, found: Entries) -> Any:
        return found[None, path]


class _Container(NamedTuple):
    """A container: its entries belong to parameters, one each, or to the tree.

    Args:
      spec: its type and keys.
      names: the names of its children in paths.
      children: for each child, what it belongs to.
    """

    spec: Spec
    names: list[str]
    children: "Sequence[_OfParam | StateShape]"

    def split(self, x: Any, path: str, owner: SplitState) -> Entries:
        children, spec, _ = _open(x)
        if spec != self.spec:
            raise _other_structure(owner, path, x)
        found: Entries = {}
        for name, shape, child in zip(self.names, self.children, children, strict=True):
            own = isinstance(shape, _OfParam)  # the name of a parameter is part of its entries' keys already
            found |= shape.split(child, path if own else _at(path, _escaped(name)), owner)
        return found

    def join(self, path: str, found: Entries) -> Any:
        pairs = zip(self.names, self.children, strict=True)
        return self.spec.unflatten(
            [
                shape.join(path if isinstance(shape, _OfParam) else _at(path, _escaped(name)), found)
                for name, shape in pairs
            ]
        )


class _OfParam(NamedTuple):
    """The entry of a parameter in such a container.

    Args:
      name: the parameter's name; None for one that is not seen, whose entry holds nothing.
      spec: its structure.
      paths: the paths of its leaves.
    """

    name: str | None
    spec: Spec
    paths: list[str]

    def split(self, x: Any, path: str, owner: SplitState) -> Entries:
        leaves, spec = flatten(x)
        if spec != self.spec or (self.name is None and any(leaf is not None for leaf in leaves)):
            raise _other_structure(owner, _at(path, self.name or ""), x)
        found: Entries = {}
        for leaf_path, leaf in zip(self.paths, leaves, strict=True):
            _check_entry(leaf, _at(path, leaf_path), owner)
            if self.name is not None:
                found[self.name, _at(path, leaf_path)] = leaf
        return found

    def join(self, path: str, found: Entries) -> Any:
        return self.spec.unflatten(
            [None if self.name is None else found[self.name, _at(path, leaf)] for leaf in self.paths]
        )


StateShape = _Leaf | _Container
_EXTRA = "one more parameter"  # the name of the one that the second state has an entry for


def _with_one_more(view: View) -> Any:
    """The tree that a transformation sees, with a parameter more, which is like the first and another object."""
    tree = view.tree()
    like = next((x for x, seen in zip(view.leaves, view.seen, strict=True) if seen), None)
    if like is None:
        return tree
    more = like.detach()
    if isinstance(like, torch.nn.Parameter):
        more = torch.nn.Parameter(more, requires_grad=like.requires_grad)
    return type(tree)([*tree.items(), (_EXTRA, more)])


def _compare(
    a: Any, b: Any, names: Mapping[str, bool], fail: Callable[[str, str], Exception], path: str = ""
) -> StateShape:
    """The shape of a state.

    Args:
      a: the state.
      b: the state of a tree with one more parameter.
      names: the parameters, and whether the transformation sees them.
      fail: makes the error of a state that cannot be split.
      path: the path of the state.
    """
    (one, one_spec, one_names), (two, two_spec, two_names) = _open(a), _open(b)
    if one_spec is None or two_spec is None:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape != b.shape:
            raise fail(path, f"is a tensor of shape {tuple(a.shape)} that depends on the number of parameters")
        if (one_spec is None) != (two_spec is None):
            raise fail(path, "is of another kind if there is one more parameter")
        return _Leaf()
    if one_names == two_names:
        children = [_compare(x, y, names, fail, _at(path, n)) for x, y, n in zip(one, two, one_names, strict=True)]
        return _Container(one_spec, one_names, children)
    seen = [name for name, own in names.items() if own]
    if set(two_names) - set(one_names) == {_EXTRA} and set(seen) <= set(one_names):
        owners = one_names
    elif len(two) == len(one) + 1 and not isinstance(a, Mapping) and len(one) in (len(seen), len(names)):
        owners = seen if len(one) == len(seen) else list(names)
    else:
        raise fail(path, f"has {len(one)} entries for {len(seen)} parameters, and {len(two)} if there is one more")
    others = dict(zip(two_names, two, strict=True))
    found: list[_OfParam | StateShape] = []
    for name, owner, child in zip(one_names, owners, one, strict=True):
        if owner not in names:
            found.append(_compare(child, others[name], names, fail, _at(path, name)))
            continue
        leaves, spec = flatten(child)
        if not names[owner] and any(leaf is not None for leaf in leaves):
            raise fail(_at(path, name), "has an entry for a parameter that the transformation does not see")
        found.append(_OfParam(owner if names[owner] else None, spec, escaped_paths(spec)))
    return _Container(one_spec, one_names, found)


def _open(x: Any) -> tuple[list[Any], Spec | None, list[str]]:
    """The children of a container, its type, and their names; a leaf has no type."""
    opened = one_level(x)
    if opened is None:
        return [], None, []
    children, spec = opened
    return children, spec, [key_name(path[0]) for path in spec.accessors()]


def _at(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _escaped(key: Any) -> str:
    """A key of a path, with its dots written otherwise, so that different entries have different paths."""
    return str(key).replace("%", "%25").replace(".", "%2E")


def escaped_paths(spec: Spec) -> list[str]:
    """The paths of the leaves of an entry."""
    return [".".join(_escaped(key_name(entry)) for entry in path) for path in spec.accessors()]


def _check_entry(x: Any, path: str, owner: SplitState) -> None:
    if x is not None and not isinstance(x, (torch.Tensor, int, float)):
        if one_level(x) is not None:
            raise _other_structure(owner, path, x)
        raise TypeError(
            f"the state of {brief(owner.tx)} holds {x!r:.60}{at(path)}, expected tensors and numbers, which is what "
            f"the state of an optimizer can hold."
        )


def _other_structure(owner: SplitState, path: str, x: Any) -> ValueError:
    return ValueError(
        f"`update` of {brief(owner.tx)} returned a state with {x!r:.60}{at(path)}, another structure than `init` made; "
        f"a state in an optimizer keeps its structure from the first step on."
    )
