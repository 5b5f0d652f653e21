"""Graph breaks: calls of functions outside of a compiled graph, each with a reason. Imported while a compiler runs."""

from collections.abc import Callable
from typing import Any

import torch


def _call(fn: Callable[..., Any], *arguments: Any) -> Any:
    return fn(*arguments)


def outside(reason: str) -> Callable[..., Any]:
    """A call outside of the graph: of a function, with its arguments.

    Args:
      reason: a sentence for the one who asks torch why the graph is broken.
    """
    return torch.compiler.disable(_call, reason=reason)  # type: ignore[no-any-return, no-untyped-call]


followed_outside = outside("Python reads a number in the step, so operations of torch compute it outside of the graph")
