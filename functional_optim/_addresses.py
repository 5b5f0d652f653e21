"""Addresses of objects in pickles, which stay the same when a definition moves to another module."""

from collections.abc import Iterable
from typing import Any

import torch


def publish(module: str, objects: Iterable[Any]) -> None:
    """Makes a module the address of functions and classes: pickles, `repr` and tracebacks refer to it.

    Args:
      module: the name of a module that has the objects under their own names.
      objects: functions and classes; any others are left as they are.
    """
    for x in objects:
        name = getattr(x, "__qualname__", None)
        if name is not None:
            x.__module__ = module
            if hasattr(x, "rule"):  # states name their rule, and `torch.load(weights_only=True)` loads them
                torch.serialization.add_safe_globals([(x, f"{module}.{name}")])
