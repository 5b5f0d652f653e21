"""Taking a step: by kernels, or while a compiler traces, as an operation in its graph."""

from collections.abc import Mapping
from typing import Any

import torch

from .._runtime.internals import uncompiled
from .._step import take_step
from .._transform import GradientTransformation
from .._tree import Tree
from . import operations as operations  # registered where files of graphs are loaded


def run(
    tx: GradientTransformation,
    apply: bool,
    updates: Tree,
    state: Any,
    params: Tree | None,
    extra: Mapping[str, Any],
    donate: bool,
) -> tuple[Tree, Any]:
    """Takes a step of a transformation; for the arguments see `take_step`."""
    if torch.compiler.is_compiling():
        from .trace import trace_step  # an import of the compiler, which takes seconds

        return trace_step(tx, apply, updates, state, params, extra, donate)
    return uncompiled(take_step)(tx, apply, updates, state, params, extra, donate)
