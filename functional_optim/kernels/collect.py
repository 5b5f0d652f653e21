"""Reading thousands of Python objects, and comparing them, at once."""

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any, NamedTuple

from .native import loaded


def items(dicts: list[Any], keys: list[str]) -> list[list[Any] | None]:
    """For each key, what each of some dicts has under it; None where one has nothing.

    Example:
      >>> items([{"a": 1, "b": 2}, {"a": 3}], ["a", "b"])
      [[1, 3], None]
    """
    if loaded:
        found: list[list[Any] | None] = [[None] * len(dicts) for _ in keys]
        native = loaded[0]
        if native.items(native.torch, dicts, len(dicts), keys, len(keys), found) == len(dicts):
            return found
    return [_column(dicts, key) for key in keys]


def _column(dicts: list[Any], key: str) -> list[Any] | None:
    try:
        return list(map(itemgetter(key), dicts))
    except KeyError:
        return None


class Contents(NamedTuple):
    """What some dicts contain.

    Args:
      sizes: of each.
      keys: of all.
      values: of all.
    """

    sizes: list[int]
    keys: list[Any]
    values: list[Any]

    @classmethod
    def of(cls, dicts: Sequence[Mapping[Any, Any]]) -> "Contents":
        """What dicts contain now."""
        return cls(
            list(map(len, dicts)),
            list(chain.from_iterable(dicts)),
            list(chain.from_iterable(x.values() for x in dicts)),
        )

    def are_in(self, dicts: Sequence[Mapping[Any, Any]]) -> bool:
        """Whether dicts contain these very objects, in their order, and nothing else.

        Example:
          >>> key, value = object(), object()
          >>> known = Contents.of([{key: value}])
          >>> known.are_in([{key: value}]), known.are_in([{key: object()}])
          (True, False)
        """
        if list(map(len, dicts)) != self.sizes:
            return False
        if not loaded:
            _, keys, values = Contents.of(dicts)
            return are_parts([keys], self.keys) and are_parts([values], self.values)
        native = loaded[0]
        return bool(native.hold(native.torch, list(dicts), len(dicts), self.keys, self.values, len(self.keys)))


def are_parts(parts: list[list[Any]], whole: list[Any]) -> bool:
    """Whether lists, one after another, hold the very same objects as another list.

    Example:
      >>> x, y = object(), object()
      >>> are_parts([[x], [y]], [x, y]), are_parts([[x, x]], [x, y])
      (True, False)
    """
    if sum(map(len, parts)) != len(whole):
        return False
    if not loaded:
        return all(map(is_, chain.from_iterable(parts), whole))
    native = loaded[0]
    return bool(native.are_parts(native.torch, parts, len(parts), whole))
