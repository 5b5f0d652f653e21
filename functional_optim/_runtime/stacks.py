"""Stacks: the tensors of all members of an ensemble, which stand behind the wrappers of `torch.vmap`."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .internals import MapLevel, members_unwrapper, outside_transformations


Levels = Sequence[MapLevel]  # the calls of `vmap` that are active, outermost first
Stacked = tuple[bool, ...]  # for each level, whether members have tensors of their own


class Stack(NamedTuple):
    """A tensor of all members, without wrappers.

    Args:
      tensor: the tensor; the dimensions of members come first, those of outer levels before those of inner ones.
      stacked: the levels that it has a dimension of.
    """

    tensor: torch.Tensor
    stacked: Stacked

    @classmethod
    def of(cls, x: torch.Tensor, levels: Levels) -> "Stack":
        """The tensor that stands behind one within `vmap`, which need not be a wrapper."""
        unwrap = members_unwrapper()
        if len(levels) == 1:
            x, dim = unwrap(x, levels[0].level)
            return cls(x.movedim(dim, 0) if dim else x, (dim is not None,))
        dims: list[int | None] = []
        for level in reversed(levels):
            x, dim = unwrap(x, level.level)
            dims.insert(0, dim)
        if any(dims):  # an inner dimension is counted without those of outer levels
            rest = list(range(x.ndim))
            first = [rest.pop(dim) for dim in dims if dim is not None]
            x = x.permute(first + rest)
        return cls(x, tuple(dim is not None for dim in dims))


def different_numbers(x: torch.Tensor, levels: Levels) -> list[float]:
    """The numbers that members have, each once."""
    tensor = Stack.of(x, levels).tensor
    with outside_transformations():
        return list(dict.fromkeys(tensor.flatten().tolist()))


class Ensemble:
    """The members of a step: those of nested calls of `vmap` in one row.

    Args:
      sizes: the number of members at each level; 1 where no tensor has some of its own.

    Example:
      >>> pair = Ensemble((2, 3))
      >>> pair.offsets(Stack(torch.zeros(3, 5), (False, True)))
      [0, 5, 10, 0, 5, 10]
      >>> pair.numbers(Stack(torch.tensor([1.0, 2.0]), (True, False))).tolist()
      [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes, self.n = tuple(sizes), math.prod(sizes)

    def offsets(self, stack: Stack) -> list[int]:
        """For each member, the offset of its part of a tensor, in elements."""
        strides = iter(stack.tensor.stride())
        steps = [next(strides) if there else 0 for there in stack.stacked]
        members = itertools.product(*map(range, self.sizes))
        return [sum(k * step for k, step in zip(member, steps, strict=True)) for member in members]

    def numbers(self, stack: Stack) -> torch.Tensor:
        """For each member, its number, in one tensor."""
        shape = [size if there else 1 for size, there in zip(self.sizes, stack.stacked, strict=True)]
        return stack.tensor.detach().reshape(shape).expand(self.sizes).flatten()
