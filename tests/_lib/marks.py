"""Marks that several modules share."""

import itertools
from collections.abc import Iterable

import pytest


# Triton's interpreter runs programs on NumPy, which warns where torch is silent, of overflow and of what is not a
# number; and it counts loops in a way that NumPy wants to forbid
INTERPRETER = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning")

# kernels compiled as users compile them, where the promise is their numbers; see the fixture
OPTIMIZED = pytest.mark.usefixtures("optimized")


def pairwise(names: str, *values: Iterable[str]) -> pytest.MarkDecorator:
    """Cases in which each value of two arguments meets the other's, and the third's come by turns.

    Args:
      names: those of the three arguments.
      values: theirs; the longest two first.
    """
    first, second, third = map(list, values)
    pairs = itertools.product(enumerate(first), enumerate(second))
    return pytest.mark.parametrize(names, [(x, y, third[(i + j) % len(third)]) for (i, x), (j, y) in pairs])
