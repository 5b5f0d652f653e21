"""Scripts of the repository as modules."""

import importlib.util
import sys
from pathlib import Path
from typing import Any
from unittest import mock


ROOT = Path(__file__).parents[2]


def load_script(path: str) -> Any:
    """The module that a script is, which finds those beside it as it does when it is run.

    Args:
      path: its path from the root of the repository.
    """
    file = ROOT / path
    spec = importlib.util.spec_from_file_location(f"script_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for dataclasses, and for the source of its functions
    with mock.patch.object(sys, "path", [str(file.parent), *sys.path]):
        spec.loader.exec_module(module)
    return module
