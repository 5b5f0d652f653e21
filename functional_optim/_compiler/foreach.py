"""Evaluate programs with `torch._foreach_*`: one call per operation over all leaves. Needs no compiler."""

from collections.abc import Sequence

import torch

from .call import Call, Column, Join, LeafTable
from .ops import OPS
from .program import Level, Value
from .reference import each_leaf, run_reference


COMMUTES = {"add", "mul"}
SMALL = 1 << 13  # the most elements of leaves that are worth a copy, in place of a call of a kernel for each
VECTOR = 1 << 15  # the most elements of them in one vector, so that values stay in the cache


def run_foreach(calls: Sequence[Call], join: Join | None = None) -> list[list[Column]]:
    """Evaluates programs that belong together, pass by pass, with one torch call per operation and group.

    Small leaves are evaluated as vectors of many, where no value of the program depends on the leaf.
    """
    bounds = [_vectors(call.leaves.sizes) if _is_joined(call) else None for call in calls]
    given = [
        call._replace(outputs=[None] * len(call.outputs)) if own is None else _joined(call, own)
        for call, own in zip(calls, bounds, strict=True)
    ]
    results = run_reference(given, join, all_leaves)
    for call, columns, own in zip(calls, results, bounds, strict=True):
        for k, (output, target) in enumerate(zip(call.signature.program.outputs, call.outputs, strict=True)):
            if own is not None:
                parts = _split(columns[k], output.level, own, call.like)
                columns[k] = parts if target is not None else list(map(torch.Tensor.clone, parts))
            if target is not None:
                torch._foreach_copy_(target, columns[k])
                columns[k] = target
    return results


def _vectors(sizes: Sequence[int]) -> list[slice]:
    """The neighbours that are one vector."""
    found, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if total and total + size > VECTOR:
            found.append(slice(start, i))
            start, total = i, 0
        total += size
    return [*found, slice(start, len(sizes))]


def _is_joined(call: Call) -> bool:
    """Whether the leaves of a call are evaluated as vectors of many."""
    program = call.signature.program
    arrays, numbers = call.inputs[: len(program.arrays)], call.inputs[len(program.arrays) :]
    return (
        len(call.like) > 1
        and bool(arrays)
        and len(call.scalars) == 1
        and call.shard is None
        and not program.reductions
        and all(value.op != "size" for value in program.values)
        and max(call.leaves.sizes) <= SMALL
        and call.like[0].device.type == "cpu"
        and all(x.is_contiguous() for column in (call.like, *arrays) for x in column)
        and not (torch.is_grad_enabled() and any(x.requires_grad for column in arrays for x in column))
        and all(map(_is_one_number, numbers))
    )


def _is_one_number(column: Column) -> bool:
    """Whether all leaves have the same number, such as a counter."""
    first = column[0]
    return all(x is first for x in column) or bool((torch.stack(column) == first).all())


def _joined(call: Call, bounds: Sequence[slice]) -> Call:
    """The call with vectors for leaves, and new tensors for outputs."""
    n = len(call.signature.program.arrays)
    sizes = tuple(sum(call.leaves.sizes[own]) for own in bounds)
    flat = [_is_flattened(call.like[own]) for own in bounds]
    arrays = [
        [
            torch.cat([x.view(-1) for x in column[own]] if f else column[own])
            for own, f in zip(bounds, flat, strict=True)
        ]
        for column in call.inputs[:n]
    ]
    return call._replace(
        like=[call.like[0].new_empty(()).expand(x.shape) for x in arrays[0]],
        inputs=[*arrays, *(column[:1] * len(sizes) for column in call.inputs[n:])],
        outputs=[None] * len(call.outputs),
        leaves=LeafTable(sizes, sizes, (0,) * len(sizes)),
        positions=tuple(call.positions[own.start] for own in bounds),
    )


def _is_flattened(leaves: Column) -> bool:
    """Whether leaves of one vector have other shapes, so that each has to be flattened before."""
    return any(not x.ndim or x.shape[1:] != leaves[0].shape[1:] for x in leaves)


def _split(column: Column, level: Level, bounds: Sequence[slice], like: Column) -> Column:
    """The leaves as parts of vectors, or a number that all leaves have."""
    if level is not Level.ELEMENT:
        return column[:1] * len(like)
    parts: Column = []
    for x, own in zip(column, bounds, strict=True):
        if _is_flattened(like[own]):
            flat = x.split_with_sizes([t.numel() for t in like[own]])
            parts += [part.view(t.shape) for part, t in zip(flat, like[own], strict=True)]
        else:
            parts += x.split_with_sizes([len(t) for t in like[own]])
    return parts


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
