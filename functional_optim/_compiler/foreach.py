"""Evaluate programs with `torch._foreach_*`: one call per operation over all leaves. Needs no compiler."""

from collections.abc import Sequence

import torch

from .call import Call, Column, Join
from .ops import OPS
from .program import Value
from .reference import each_leaf, run_reference


COMMUTES = {"add", "mul"}


def run_foreach(calls: Sequence[Call], join: Join | None = None) -> list[list[Column]]:
    """Evaluates programs that belong together, pass by pass, with one torch call per operation and group."""
    return run_reference(calls, join, all_leaves)


def all_leaves(value: Value, operands: list[Column], dtype: torch.dtype) -> Column:
    """Applies an operation to lists of leaves where torch has it in that form, else leaf by leaf."""
    name = OPS[value.op].foreach
    uniform = [not column[0].ndim for column in operands]
    if len(operands) == 2 and uniform == [True, False] and value.op in COMMUTES:
        operands, uniform = operands[::-1], [False, True]
    first, *rest = operands
    if not name or uniform[0] or dtype in {x.dtype for x in first} ^ {dtype}:
        return each_leaf(value, operands, dtype)
    function = getattr(torch, f"_foreach_{name}")
    if rest and uniform[1]:
        if first[0].device.type != "cpu":  # reading a number back would wait for the device
            return each_leaf(value, operands, dtype)
        numbers = {id(x): x for x in rest[0]}
        known = {key: x.item() for key, x in numbers.items()}
        return list(function(first, [known[id(x)] for x in rest[0]]))
    return list(function(first, *rest))
