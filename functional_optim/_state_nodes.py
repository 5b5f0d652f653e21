"""The form of a state: the containers in which a transformation keeps it, and errors of states of another form."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple


Path = tuple[int | str, ...]


def get_state(state: Any, path: Path) -> Any:
    """The state at a path of indices and keys."""
    for k in path:
        state = state[k]
    return state


def brief(x: object, most: int = 100) -> str:
    """The `repr` of a transformation, as it is or cut where dots say so."""
    text = repr(x)
    return text if len(text) <= most else f"{text[: most - 3]}..."


class StateNode(NamedTuple):
    """A container within the state of a transformation, or the state of an innermost one.

    Args:
      owner: the transformation that keeps it.
      path: the indices and keys that lead to it.
      kind: its class; a tuple may be a list, and a dict any mapping.
      keys: the keys of a tuple or a dict.
    """

    owner: object
    path: Path
    kind: type
    keys: Sequence[Hashable] = ()

    @property
    def is_container(self) -> bool:
        """Whether states of transformations are in it."""
        return bool(self.keys) or self.kind is tuple or self.kind is dict

    def is_like(self, found: Any) -> bool:
        """Whether a value has the class and the keys of this node."""
        if self.kind is tuple:
            return isinstance(found, (tuple, list)) and len(found) == len(self.keys)
        if self.kind is dict:
            return isinstance(found, Mapping) and set(found) == set(self.keys)
        return type(found) is self.kind or _declared(type(found)) == _declared(self.kind)


def _declared(kind: type) -> tuple[str, str, Any]:
    """The name and the fields of a class of states, which are equal for a rule that has been written anew."""
    return kind.__module__, kind.__qualname__, getattr(kind, "_fields", ())


def wrong_state(node: StateNode, found: Any) -> TypeError:
    """The error of a state that another transformation has made, or none, which has something else for a node."""
    where = "".join(f"[{key!r}]" for key in node.path)
    return TypeError(
        f"state{where} is {_shown(found, node.kind)}, expected the {_expected(node, found)} of {brief(node.owner)}; "
        f"{FROM_INIT}"
    )


def check_nest(state: Any) -> None:
    """Refuses a value that is the state of no transformation.

    Raises:
      TypeError: it holds no states.
    """
    if not isinstance(state, (tuple, list, Mapping)):
        raise TypeError(f"state is {_shown(state)}, expected the state of a transformation; {FROM_INIT}")


FROM_INIT = "`tx.init(params)` of the same transformation makes the state, and each step returns the next one."


def _shown(found: Any, kind: type | None = None) -> str:
    """A value in a message; with its size or keys if a value of its kind was expected."""
    if found is None:
        return "None"
    if kind is tuple and isinstance(found, (tuple, list)) and not hasattr(found, "_fields"):
        return f"a {type(found).__name__} of {_counted(len(found))}"
    if kind is dict and isinstance(found, Mapping):
        return f"a {type(found).__name__} with the keys {_listed(list(found))}"
    return _class_of_states(type(found), kind)


def _expected(node: StateNode, found: Any) -> str:
    if node.kind is tuple:
        return f"tuple of {_counted(len(node.keys))}"
    if node.kind is dict:
        return f"dict with the keys {_listed(node.keys)}"
    return _class_of_states(node.kind, type(found))


def _class_of_states(kind: type, other: type | None) -> str:
    """The name of a class, with its fields where another one has the same, as that of a rule written anew has."""
    alike = other is not None and other is not kind and other.__name__ == kind.__name__
    return f"{kind.__name__}({', '.join(getattr(kind, '_fields', ()))})" if alike else kind.__name__


def _counted(n: int) -> str:
    return f"{n} state{'' if n == 1 else 's'}"


def _listed(keys: Sequence[Hashable]) -> str:
    return ", ".join([*map(repr, keys[:5]), *(["..."] if len(keys) > 5 else [])])


def check_state(nodes: Iterable[StateNode], state: Any) -> None:
    """Refuses a state that has something else in the place of a node.

    Args:
      nodes: the nodes to look at, each after the containers that it is in.
      state: the state.

    Raises:
      TypeError: the state was made by another transformation, or is none.
    """
    for node in nodes:
        found = get_state(state, node.path)
        if not node.is_like(found):
            raise wrong_state(node, found)
