"""State of an opaque transformation, split among the parameters.

An optimizer keeps its state with each parameter, so the state of a transformation that can only be called has to be
taken apart: which entries belong to a parameter, which to the whole tree? The structure answers it, once. `init` is
called a second time for a tree with a few parameters more, and the two states are compared: a container that has grown
by their entries holds one entry per parameter, everything else belongs to the tree. A state that fits neither is
refused.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch

from ._runtime.checks import at
from ._runtime.internals import is_wrapper_of_a_transformation
from ._runtime.spec import PLAIN
from ._state_nodes import brief
from ._transform import GradientTransformation, Link
from ._tree import Spec, View, flatten, key_name, one_level, paths


Entry = tuple[str | None, str]  # a parameter's name, None for an entry of the tree, and the path
Entries = dict[Entry, Any]
StatesByName = Mapping[str, Mapping[str, Any]]


class Kind(NamedTuple):
    """The kind of an entry of state.

    Args:
      shape: the shape of a tensor; None for a number, and for nothing.
      filled: whether it is something.
      of_tree: whether it belongs to the tree.
    """

    shape: tuple[int, ...] | None
    filled: bool
    of_tree: bool

    @classmethod
    def of(cls, x: Any, of_tree: bool) -> "Kind":
        """The kind of an entry."""
        return cls(tuple(x.shape) if isinstance(x, torch.Tensor) else None, x is not None, of_tree)


class SplitState:
    """The state of an opaque transformation in the flat dicts of parameters.

    Entries of a parameter are in its own dict; those of the tree are in the dict of each parameter that takes steps,
    so that they stay when any of them goes. Keys begin with `prefix`.

    Args:
      link: the transformation.
      prefix: the beginning of its keys.
      view: the parameters.
      later: the names of parameters that took no part before; entries of the tree that they hold may be old.

    Attributes:
      seen: the names of the parameters that the transformation sees.
      searched: the same, in the order in which entries of the tree are looked for.
      shape: the structure of the state.
      keys: the key of each entry.
      kinds: the kind of each entry, as `init` makes it.
      stand_ins: entries of `init` in the place of those of parameters that have none and take no step.

    Raises:
      TypeError, ValueError: the state holds something else than tensors and numbers, or cannot be split.
    """

    def __init__(self, link: Link, prefix: str, view: View, later: Set[str] = frozenset()) -> None:
        self.tx, self.prefix, self.view, self.later = link.tx, prefix, view._replace(seen=link.seen), later
        self.seen = [name for name, seen in zip(view.spec.entries(), link.seen, strict=True) if seen]
        self.searched = sorted(self.seen, key=later.__contains__) if later else self.seen
        state = link.tx.init(self.view.tree())
        names = dict(zip(view.spec.entries(), link.seen, strict=True))
        tree, extras = _with_more(self.view)
        self.shape = _compare(state, link.tx.init(tree), names, extras, self._fail)
        made = self.split(state)
        self.keys = {entry: self._key(*entry) for entry in made}
        self.kinds = {entry: Kind.of(x, entry[0] is None) for entry, x in made.items()}
        self.filled = [entry for entry, x in made.items() if x is not None]
        self.stand_ins: Entries = {}

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

    def holders(self, entry: Entry, present: Collection[str]) -> Sequence[str]:
        """Names of the parameters in whose dicts an entry is put.

        An entry of the tree is with all parameters that take the step; with the first one, if the transformation sees
        none of them.
        """
        if entry[0] is not None:
            return (entry[0],)
        return [name for name in self.seen if name in present] or self.seen[:1]

    def find(self, entry: Entry, states: StatesByName) -> Any:
        """An entry within the dicts of parameters; `MISSING` if it is nowhere."""
        key, holders = self.keys[entry], self.searched if entry[0] is None else (entry[0],)
        return next((states[name][key] for name in holders if key in states[name]), MISSING)

    def missing(self, states: StatesByName, present: Collection[str]) -> list[Entry]:
        """The entries that `init` makes and that are nowhere.

        Args:
          states: the dict of each parameter, by name.
          present: the parameters that take the step; others may lack their entries.
        """
        there = {*present, None} if self.seen else set(present)  # an entry of the tree needs a parameter that holds it
        return [entry for entry in self.filled if entry[0] in there and self.find(entry, states) is MISSING]

    def make(self, entries: Sequence[Entry], present: Collection[str]) -> list[tuple[Sequence[str], str, Any]]:
        """Initial values of entries, as the names of parameters, the key and the value.

        They are those of the parameters as they are now, and given away, since `update` may write to them.
        """
        if not entries:
            return []
        found, taken, made = self.split(self.tx.init(self.view.tree())), _addresses_of(self.view.leaves), []
        for entry in entries:
            x = found[entry]
            # a leaf of autograd's graph starts a state of its own, as in `init` of rules
            x = _apart(x.detach() if isinstance(x, torch.Tensor) and x.is_leaf else x, taken)
            made.append((self.holders(entry, present), self.keys[entry], x))
        return made

    def gather(self, states: StatesByName) -> Any:
        """The state whose entries are in the dicts of parameters; those of parameters without any are of `init`.

        Args:
          states: the dict of each parameter, by name.

        Raises:
          ValueError: parameters hold an entry of the tree that differs.
        """
        found = {entry: self.find(entry, states) for entry in self.keys}
        for entry, x in found.items():
            if entry[0] is None and x is not MISSING:
                self._refuse_others(self.keys[entry], x, states)
        lacking = [entry for entry, x in found.items() if x is MISSING]
        if not all(entry in self.stand_ins for entry in lacking):
            self.stand_ins = self.split(self.tx.init(self.view.tree()))
        self.stand_ins = {entry: self.stand_ins[entry] for entry in lacking}
        return self.join({**found, **self.stand_ins})

    def _refuse_others(self, key: str, x: Any, states: StatesByName) -> None:
        """Refuses an entry of the tree that another parameter holds with another value; a loaded one has copies."""
        for name in self.searched:
            other = states[name].get(key, x)
            if other is not x and name not in self.later and not _is_equal(x, other):
                raise ValueError(
                    f"state {key!r} is one for all parameters, but it is {other!r:.60} at {name!r} and {x!r:.60} at "
                    f"others; set it for all of them."
                )

    def entries(
        self, state: Any, states: StatesByName, present: Collection[str]
    ) -> list[tuple[Sequence[str], str, Any]]:
        """The entries of a new state, as the names of parameters, the key and the value.

        Args:
          state: the state.
          states: the dict of each parameter, by name; a dict that has an entry of the tree is given the new one.
          present: the parameters that took the step; entries of others are left out.
        """
        there, found = {*present, None} if self.seen else set(present), self.split(state)
        # a gradient is its owner's, who clears it or adds to it
        grads = [getattr(p, "grad", None) for p in self.view.leaves]
        taken = _addresses_of([*self.view.leaves, *grads]) if found else frozenset()
        holders = self.holders((None, ""), present)
        absent = [name for name in self.seen if name not in present and name not in holders[:1]]
        put: list[tuple[Sequence[str], str, Any]] = []
        for entry, x in found.items():
            if entry[0] in there:
                key, names = self.keys[entry], self.holders(entry, ()) if entry[0] is not None else holders
                if entry[0] is None and absent:
                    names = [*names, *(name for name in absent if key in states[name])]
                put.append((names, key, _apart(x, taken)))
        return put


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


def _is_equal(a: Any, b: Any) -> bool:
    """Whether two entries are the same numbers."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return bool(type(a) is type(b) and a == b)
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _apart(x: Any, taken: frozenset[int]) -> Any:
    """An entry that is written to by nobody else: a copy of one whose memory is taken, which autograd follows."""
    return x.clone() if _address(x) in taken else x


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
        children, spec, names = _open(x)
        if spec != self.spec:
            # dicts of any class with the same keys are the same structure, as they are for rules
            mappings = isinstance(x, Mapping) and issubclass(self.spec.type or object, Mapping)
            if not mappings or sorted(names) != sorted(self.names):
                raise _other_structure(owner, path, x)
            by_name = dict(zip(names, children, strict=True))
            children = [by_name[name] for name in self.names]
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
_EXTRA = "one more parameter"  # the name of one that the second state has an entry for


def _with_more(view: View) -> tuple[Any, frozenset[str]]:
    """The tree that a transformation sees with some parameters more, and their names.

    They are one for each dtype and number of dimensions: like the smallest parameter of that kind, and other objects.
    """
    tree, kinds = view.tree(), dict[tuple[int, torch.dtype], Any]()
    for x, seen in zip(view.leaves, view.seen, strict=True):
        if seen:
            least = kinds.setdefault((x.ndim, x.dtype), x)
            kinds[x.ndim, x.dtype] = x if x.numel() < least.numel() else least
    more: dict[str, Any] = {}
    for like in kinds.values():
        x = like.detach()
        if isinstance(like, torch.nn.Parameter):
            x = torch.nn.Parameter(x, requires_grad=like.requires_grad)
        name = f"{_EXTRA} ({len(more)})"
        while name in tree:  # a parameter may be called so
            name += "'"
        more[name] = x
    return type(tree)([*tree.items(), *more.items()]) if more else tree, frozenset(more)


def _compare(
    a: Any,
    b: Any,
    names: Mapping[str, bool],
    extras: frozenset[str],
    fail: Callable[[str, str], Exception],
    path: str = "",
) -> StateShape:
    """The shape of a state.

    Args:
      a: the state.
      b: the state of a tree with some parameters more.
      names: the parameters, and whether the transformation sees them.
      extras: the names of the parameters that the other tree has more.
      fail: makes the error of a state that cannot be split.
      path: the path of the state.
    """
    for x in (a, b):
        if isinstance(x, Mapping) and any(isinstance(key, torch.Tensor) for key in x):
            raise fail(path, "has tensors for keys")
    (one, one_spec, one_names), (two, two_spec, two_names) = _open(a), _open(b)
    more = "there is one more parameter" if len(extras) == 1 else "there are more parameters"
    if one_spec is None or two_spec is None:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape != b.shape:
            raise fail(path, f"is a tensor of shape {tuple(a.shape)} that depends on the number of parameters")
        if (one_spec is None) != (two_spec is None):
            raise fail(path, f"is of another kind if {more}")
        return _Leaf()
    if one_names == two_names:
        pairs = zip(one, two, one_names, strict=True)
        children = [_compare(x, y, names, extras, fail, _at(path, n)) for x, y, n in pairs]
        return _Container(one_spec, one_names, children)
    seen = [name for name, own in names.items() if own]
    grown = set(two_names) - set(one_names)
    if grown and grown <= extras and not set(one_names).isdisjoint(seen):
        owners = one_names  # by name: of all parameters, or of some, such as the matrices
    elif len(two) == len(one) + len(extras) and not isinstance(a, Mapping) and len(one) in (len(seen), len(names)):
        owners = seen if len(one) == len(seen) else list(names)
    else:
        n = "one more" if len(extras) == 1 else f"{len(extras)} more"
        raise fail(
            path,
            f"has {len(one)} entries for {len(seen)} parameters, and {len(two)} if there "
            f"{'is' if len(extras) == 1 else 'are'} {n}",
        )
    others = dict(zip(two_names, two, strict=True))
    found: list[_OfParam | StateShape] = []
    for name, owner, child in zip(one_names, owners, one, strict=True):
        if owner not in names:
            found.append(_compare(child, others[name], names, extras, fail, _at(path, name)))
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
