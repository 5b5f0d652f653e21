"""A journal of entries of state, by which a step that fails takes them back."""

from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any


_MISSING = object()


class Journal(list[tuple[MutableMapping[Any, Any], Any, Any]]):
    """Entries of state that a step has put in place, to be taken back if it fails before anything is written.

    A list of the dicts, keys and values before, in order.
    """

    def set(self, state: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Puts an entry in place."""
        self.append((state, key, state.get(key, _MISSING)))
        state[key] = value

    def set_each(self, states: Sequence[MutableMapping[Any, Any]], key: Any, values: Iterable[Any]) -> None:
        """Puts an entry of one key in place in each of several states."""
        self += [(state, key, state.get(key, _MISSING)) for state in states]
        for state, value in zip(states, values, strict=True):
            state[key] = value

    def undo(self) -> None:
        """Takes all entries back."""
        for state, key, before in reversed(self):
            if before is _MISSING:
                state.pop(key, None)
            else:
                state[key] = before
