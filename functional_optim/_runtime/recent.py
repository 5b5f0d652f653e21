"""Short lists of bindings in the order of their last use: the first one that fits is found soon."""

from collections.abc import Sequence
from typing import TypeVar


T = TypeVar("T")


def in_front(x: T, known: Sequence[T], keep: int) -> list[T]:
    """An object in front of the ones used before it; the ones used longest ago are dropped.

    A list is made anew and never changed in place, for other threads may be looking through it.

    Args:
      x: the object that is used now, which may be among the others.
      known: the others, in the order of their last use.
      keep: the number of all that are kept.

    Example:
      >>> in_front("c", ["a", "b", "c"], keep=3), in_front("d", ["a", "b", "c"], keep=3)
      (['c', 'a', 'b'], ['d', 'a', 'b'])
    """
    return [x, *[y for y in known if y is not x][: keep - 1]]
