"""Graph breaks: calls of functions outside of a compiled graph, each with a reason. Imported while a compiler runs."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch


R = TypeVar("R")


class Outside(Protocol):
    """A call of a function, with its arguments, outside of the graph."""

    def __call__(self, fn: Callable[..., R], *arguments: Any) -> R: ...


def _call(fn: Callable[..., Any], *arguments: Any) -> Any:
    return fn(*arguments)


def outside(reason: str) -> Outside:
    """A call outside of the graph.

    Args:
      reason: a sentence for the one who asks torch why the graph is broken.
    """
    return torch.compiler.disable(_call, reason=reason)  # type: ignore[no-any-return, no-untyped-call]


followed_outside = outside("Python reads a number in the step, so operations of torch compute it outside of the graph")
