"""Evaluate programs with torch operations: the reference that every other backend is tested against.

It runs on any device and layout, under `torch.func` transformations and autograd, because all it does is call the
eager column of the operation table.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch

from .call import Call, Column, Join, ReductionKey, reduction_key
from .ops import OPS, REDUCTIONS
from .program import Level, Value


Elementwise = Callable[[Value, list[Column], torch.dtype], Column]
K = TypeVar("K", bound=Hashable)


def each_leaf(value: Value, operands: list[Column], dtype: torch.dtype) -> Column:
    """Applies an operation leaf by leaf."""
    if value.op == "real":
        return [x.to(dtype) for x in operands[0]]
    return [OPS[value.op].eager(*xs) for xs in zip(*operands, strict=True)]


def each_distinct(fn: Callable[..., torch.Tensor], *columns: Column) -> Column:
    """Applies a function to numbers per leaf, of which many leaves may share one tensor, such as a counter."""
    known: dict[tuple[int, ...], torch.Tensor] = {}
    results = []
    for xs in zip(*columns, strict=True):
        key = tuple(map(id, xs))
        if key not in known:
            known[key] = fn(*xs)
        results.append(known[key])
    return results


def run_reference(
    calls: Sequence[Call], join: Join | None = None, elementwise: Elementwise = each_leaf
) -> list[list[Column]]:
    """Evaluates programs that belong together, pass by pass.

    Args:
      calls: the programs.
      join: the reductions over processes, if there are any.
      elementwise: computes an operation per element.

    Returns:
      For each call, a column for each output.
    """
    machines = [_Evaluation(call, elementwise) for call in calls]
    for stage in range(max([m.program.stages for m in machines] + ([] if join is None else [join.stages]), default=0)):
        parts = _merged([m.reduce(stage) for m in machines])
        joined = {} if join is None else join(stage, parts)
        of_shards = [{key[0]: [x]} for key, x in joined.items() if isinstance(key[0], str)]
        partials = _merged([*of_shards, *(m.complete(stage, joined) for m in machines)])
        for m in machines:
            m.evaluate(stage, partials)
    results = [m.outputs() for m in machines]
    for call, columns in zip(calls, results, strict=True):
        for k, target in enumerate(call.outputs):
            if target is not None:
                for t, x in zip(target, columns[k], strict=True):
                    t.copy_(x)
                columns[k] = target
    return results


def _merged(several: Sequence[Mapping[K, Column]]) -> dict[K, Column]:
    """All columns of several mappings, those of one key behind one another."""
    found: dict[K, Column] = {}
    for own in several:
        for key, column in own.items():
            found.setdefault(key, []).extend(column)
    return found


def _number(x: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        return x.to(device).double().reshape(())
    if device.type == "cpu":
        return torch.tensor(x, dtype=torch.float64, device=device)
    return torch.full((), x, dtype=torch.float64, device=device)  # written there: a copy would wait for the device


class _Evaluation:
    """The values of one call: a column with a tensor per row of the scalar table, or per leaf."""

    def __init__(self, call: Call, elementwise: Elementwise) -> None:
        self.call, self.elementwise = call, elementwise
        self.program, self.compute = call.signature.program, call.signature.compute
        self.like = call.like
        self.has_empty = not all(map(torch.Tensor.numel, call.like))
        names = (*self.program.arrays, *self.program.leaves)
        self.inputs = dict(zip(names, call.inputs, strict=True))
        self.env: dict[int, Column] = {}
        self.reduced: dict[int, Column] = {}
        self.wide: dict[int, Column] = {}
        self.cast: dict[tuple[int, torch.dtype], Column] = {}

    def reduce(self, stage: int) -> dict[ReductionKey, Column]:
        """Reduces each leaf, where reductions end before a stage: the parts that other processes are to complete."""
        parts: dict[ReductionKey, Column] = {}
        for i in self.program.reductions:
            value = self.program.values[i]
            if value.stage != stage:
                continue
            column = self.wide.get(value.args[0]) or self.env[value.args[0]]
            self.reduced[i] = [REDUCTIONS[value.reduction].eager(x.double()) for x in column]
            if self.call.shard is not None:
                for position, x in zip(self.call.positions, self.reduced[i], strict=True):
                    parts.setdefault(reduction_key(value, i, position, self.call.shard), []).append(x)
        return parts

    def complete(self, stage: int, joined: Mapping[ReductionKey, torch.Tensor]) -> dict[str, Column]:
        """Takes the reductions over leaves that have been completed; returns the part of those over the tree."""
        partials: dict[str, Column] = {}
        for i in self.reduced:
            value = self.program.values[i]
            if value.stage != stage:
                continue
            if self.call.shard is None:
                if value.spans_tree:
                    partials.setdefault(value.name, []).extend(self.reduced[i])
            elif not value.spans_tree:
                device = self.like[0].device
                self.reduced[i] = [joined[position, i].to(device) for position in self.call.positions]
        return partials

    def evaluate(self, stage: int, partials: dict[str, Column]) -> None:
        """Computes the values of a stage; `partials` are the results of reductions over the tree, leaf by leaf."""
        signature, program = self.call.signature, self.program
        for i, value in enumerate(program.values):
            if value.stage != stage:
                continue
            if value.uniform or value.op == "array":
                self.env[i] = self.value(i, partials)
                continue
            if i in program.narrow or i not in signature.wide:
                exact = i in signature.rounded
                column = self.elements(i, torch.float64 if exact else self.compute, False)
                self.env[i] = [x.to(self.compute) for x in column] if exact else column
            if i in signature.wide:
                self.wide[i] = self.elements(i, torch.float64, True)

    def elements(self, i: int, dtype: torch.dtype, wide: bool) -> Column:
        """One value per element, computed in `dtype`."""
        value = self.program.values[i]
        operands = [self.operand(a, value.level, dtype, wide) for a in value.args]
        if value.op == "broadcast":
            return [x.expand(t.shape) for x, t in zip(operands[0], self.like, strict=True)]
        return self.elementwise(value, operands, dtype)

    def value(self, i: int, partials: dict[str, Column]) -> Column:
        """A uniform value, for each row of the scalar table or each leaf; or an array."""
        value = self.program.values[i]
        device, n_rows = self.like[0].device, len(self.call.scalars)
        match value.op:
            case "const":
                return list([torch.tensor(value.const, dtype=torch.float64, device=device)] * n_rows)
            case "scalar":
                k = self.program.scalars.index(value.name)
                return [_number(row[k], device) for row in self.call.scalars]
            case "size":
                return [torch.tensor(n, dtype=torch.float64, device=device) for n in self.call.leaves.wholes]
            case "leaf":
                return each_distinct(torch.Tensor.double, self.inputs[value.name])
            case "array":
                return [x.to(self.compute) for x in self.inputs[value.name]]
        if value.spans_tree:
            parts = [x.to(device) for x in partials[value.name]]
            return list([REDUCTIONS[value.reduction].eager(torch.stack(parts))] * n_rows)
        if value.reduction:
            return self.reduced[i]
        fn = torch.Tensor.double if value.op == "real" else OPS[value.op].eager
        return each_distinct(fn, *[self.operand(a, value.level, torch.float64) for a in value.args])

    def operand(self, i: int, level: Level, dtype: torch.dtype, wide: bool = False) -> Column:
        """Spreads a value over the leaves; in elementwise operations it takes the dtype computed in."""
        value = self.program.values[i]
        if wide and i in self.wide:
            return self.wide[i]
        column = self.env[i]
        # elements are in the dtype computed in already
        if level is Level.ELEMENT and not value.boolean and (value.uniform or dtype is not self.compute):
            column = self.cast.get((i, dtype)) or each_distinct(lambda x: x.to(dtype), column)
            if value.uniform:  # one per leaf, and often used
                self.cast[i, dtype] = column
        if value.level is Level.ROW and level is not Level.ROW:
            column = [column[r] for r in self.call.leaves.rows]
        if level is Level.ELEMENT and value.uniform and self.has_empty:
            column = self.without_empty(column)
        return column

    def without_empty(self, column: Column) -> Column:
        """Numbers, of which those for leaves without elements have no derivative: 0 times infinity is no 0."""
        return [x if t.numel() else x.detach() for x, t in zip(column, self.like, strict=True)]

    def outputs(self) -> list[Column]:
        """A column for each output, of tensors of their own: no input, no other output, no number that is repeated."""
        columns: list[Column] = []
        known = {id(x) for column in self.call.inputs for x in column}
        for output, dtype in zip(self.program.outputs, self.call.signature.outputs, strict=True):
            column = self.operand(output.value, output.level, self.compute)
            value = self.program.values[output.value]
            if output.level is not Level.ELEMENT:
                column = [x.to(dtype, copy=True) for x in column]
            elif value.uniform or value.op == "broadcast":
                column = [x.to(dtype).expand(t.shape).clone() for x, t in zip(column, self.like, strict=True)]
            else:
                column = [x.to(dtype) for x in column]
            column = [x.clone() if id(x) in known else x for x in column]
            known.update(map(id, column))
            columns.append(column)
        return columns
