"""Packed trees as a compiler traces them: places are constants of the graph, and no variables.

A compiler may take numbers that it finds in objects for variables, and all of them with `dynamic=True`. Graphs are
guarded by the serial number of a form in their place. Imported while a compiler runs.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ._graph_breaks import outside
from ._runtime.packing import BufferSplit, views_of
from ._structures import FORMS, Structure, rebuild


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def splits_of(serial: str) -> tuple[BufferSplit, ...]:
    """The split of each buffer of a form into leaves."""
    splits: tuple[BufferSplit, ...] = FORMS[serial].layout.splits
    return splits


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def order_of(serial: str) -> tuple[int, ...]:
    """The position of each leaf of a form's containers among its leaves."""
    return tuple(FORMS[serial].order)


def traced_tree(serial: str, containers: Structure, buffers: Sequence[torch.Tensor]) -> Any:
    """The tree of a form in these containers, whose leaves are views of buffers."""
    order = order_of(serial)
    leaves = views_of(splits_of(serial), len(order), buffers)
    return rebuild(containers, [leaves[k] for k in order])


PACK = "`pack` is called inside of the compiled function; pack once, outside, and make trees by `packed.map(...)`"
READ = "averages of some leaves alone, or packed otherwise than the parameters, are packed anew"
MODULE = (
    "`params`, `grads` or `zero_grad` of a `PackedModule` is used inside of the compiled function; give "
    "`packed.params` and `packed.grads` to the function as arguments, which checks the module at each step"
)
pack_outside, read_outside, module_outside = outside(PACK), outside(READ), outside(MODULE)
