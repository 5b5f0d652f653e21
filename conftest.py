"""Doctests of public names run in the modules that define them, although their `__module__` is the package."""

import doctest
import inspect
import re
from types import ModuleType
from typing import Any


_from_module = doctest.DocTestFinder._from_module  # type: ignore[attr-defined]


def _is_defined_in(self: doctest.DocTestFinder, module: ModuleType, x: Any) -> Any:
    """Whether doctest finds the examples of an object in a module."""
    if not str(getattr(x, "__module__", "")).startswith("functional_optim"):
        return _from_module(self, module, x)
    if inspect.isclass(x):
        return re.search(rf"^class {x.__name__}\b", inspect.getsource(module), re.MULTILINE) is not None
    return getattr(inspect.unwrap(x), "__globals__", None) is vars(module)


doctest.DocTestFinder._from_module = _is_defined_in  # type: ignore[attr-defined]
