"""Tensors that look alike: with thousands of leaves, what is known of one is not asked of all."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from .layout import PLAIN


T = TypeVar("T")


def look(x: Any) -> Hashable:
    """What can be seen of a tensor, but where and what its elements are; other objects are like none but themselves.

    Example:
      >>> look(torch.zeros(2)) == look(torch.ones(2)), look(torch.zeros(2)) == look(torch.zeros(3))
      (True, False)
    """
    if type(x) not in PLAIN or x.layout is not torch.strided:
        return id(x)
    return type(x), x.dtype, x.shape, x.stride(), x.device, x.is_neg(), x._is_zerotensor()


def distinct(positions: Iterable[int], *looks: Sequence[Hashable]) -> Iterator[int]:
    """The positions at which columns do not look like they do at an earlier one.

    Example:
      >>> list(distinct(range(4), "aaab", "aabb"))
      [0, 2, 3]
    """
    known = set()
    for i in positions:
        found = tuple([column[i] for column in looks])
        if found not in known:
            known.add(found)
            yield i


def map_alike(fn: Callable[[Any], T], tensors: Iterable[Any], looks: Sequence[Hashable]) -> list[T]:
    """Applies a function to tensors that depends on nothing but their look.

    Example:
      >>> x = torch.zeros(2)
      >>> map_alike(torch.numel, [x, x], [look(x), look(x)])
      [2, 2]
    """
    one_of_each = dict(zip(looks, tensors, strict=True))
    known = {key: fn(x) for key, x in one_of_each.items()}
    return [known[key] for key in looks]
