"""From rules, plain Python functions of one leaf, to a `Program`.

A rule is called with symbols in place of tensors, which record its operations. Equal values are recorded once. Python
control flow runs while tracing: an `if` on a flag specialises the program.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch

from .errors import RuleError, where
from .ops import OPS
from .program import INPUTS, Level, Output, Program, Value
from .rewrites import REWRITES
from .symbols import Symbol


T = TypeVar("T")


class Tracer:
    """Collects the values of one program.

    Args:
      stages: the earliest stage of tree reductions, by scope: a reduction ends when the last leaf has had its part.

    Example:
      >>> tracer = Tracer()
      >>> program = tracer.finish({"updates": 2 * tracer.input("array", "u")})
      >>> print(program)
      %0 = array u
      %1 = 2.0
      %2 = mul(%1, %0)
      updates <- %2
    """

    def __init__(self, stages: Mapping[str, int] | None = None) -> None:
        self.values: list[Value] = []
        self.index: dict[Value, int] = {}
        self.stages = stages or {}
        self.captured: dict[str, torch.Tensor] = {}  # tensors of one number that a rule refers to, read at every step
        self.scope = ""
        self.reduced: dict[str, int] = {}  # number of tree reductions in each scope

    @staticmethod
    def knows(name: str) -> bool:
        """Whether there is a function of a name: a row of the operation table, or one in terms of such."""
        return name in REWRITES or name in OPS

    def call(self, name: str, *args: Any, **kwargs: Any) -> Symbol:
        """The result of a function that it knows."""
        if name in REWRITES:
            result: Symbol = REWRITES[name](self, *args, **kwargs)
            return result
        return self.op(name, *args, **kwargs)

    def add(self, value: Value) -> Symbol:
        if value not in self.index:
            self.index[value] = len(self.values)
            self.values.append(value)
        return Symbol(self, self.index[value])

    def input(self, op: str, name: str = "") -> Symbol:
        """Adds an input: `"array"`, `"leaf"`, `"scalar"` or `"size"`."""
        return self.add(Value(op, name=name, level=INPUTS[op]))

    def symbol(self, x: Any) -> Symbol:
        """Takes an operand: a symbol, a number, or a tensor that holds one number."""
        if isinstance(x, Symbol):
            if x.tracer is not self:
                raise RuleError(f"{where()} uses a value of another trace.")
            return x
        if isinstance(x, torch.Tensor):
            if x.ndim:
                raise RuleError(
                    f"{where()} uses a tensor of shape {tuple(x.shape)} that is not an argument of the rule. "
                    f"Declare it as state, or pass it as a hyper-parameter."
                )
            if x.is_complex():
                raise RuleError(f"{where()} uses a complex tensor as a number.")
            name = next((k for k, y in self.captured.items() if y is x), f"captured.{len(self.captured)}")
            self.captured[name] = x
            return self.input("scalar", name)
        if not isinstance(x, (bool, int, float)):
            raise RuleError(f"{where()} uses {x!r} as a number.")
        # repr tells -0.0 from 0.0 and one NaN from another, which == does not
        return self.add(Value("const", name=repr(float(x)), const=float(x)))

    def op(self, op: str, *args: Any) -> Symbol:
        """Adds an operation of the table."""
        row = OPS[op]
        if len(args) != row.arity:
            raise TypeError(f"it takes {row.arity} operands, got {len(args)}.")
        if op in ("mul", "div"):
            op, args = self.gather_factors(op, *args)
        if op in ("add", "mul") and all(isinstance(a, Symbol) and self.values[a.index].boolean for a in args):
            return self.op("logical_or" if op == "add" else "logical_and", *args)  # as torch does with bools
        symbols = []
        for k, arg in enumerate(args):
            x = self.symbol(arg)
            wants_truth = row.logical is True or (row.logical == "first" and k == 0)
            is_truth = self.values[x.index].boolean
            if wants_truth and not is_truth:
                x = self.op("ne", x, 0.0)
            elif is_truth and not wants_truth:
                x = self.op("real", x)
            symbols.append(x)
        operands = [self.values[x.index] for x in symbols]
        return self.add(
            Value(
                op,
                tuple(x.index for x in symbols),
                level=max(v.level for v in operands),
                stage=max(v.stage for v in operands),
                boolean=row.boolean,
            )
        )

    def gather_factors(self, op: str, x: Any, y: Any) -> tuple[str, tuple[Any, Any]]:
        """An operation with numbers that follow from reductions taken together: (x * a) * b as x * (a * b).

        Otherwise each clip of a chain would compute the products of all before it, in every pass; and x * a could
        leave the range that x and the result are in.
        """
        element, factor = (y, x) if op == "mul" and self.follows(x) else (x, y)
        if not self.follows(factor) or not isinstance(element, Symbol):
            return op, (x, y)
        inner = self.values[element.index]
        a, b = [Symbol(self, i) for i in inner.args] if inner.op in ("mul", "div") else (None, None)
        if inner.op == "mul" and self.follows(a):
            a, b = b, a
        if a is None or not self.follows(b) or self.values[a.index].uniform:
            return op, (x, y)
        if inner.op == "mul":
            return "mul", (a, self.op(op, b, factor))
        return (op, (a, self.op("mul", b, factor))) if op == "div" else (op, (a, self.op("div", factor, b)))

    def follows(self, x: Any) -> bool:
        """Whether a value is a number that follows from a reduction."""
        return isinstance(x, Symbol) and self.values[x.index].uniform and self.values[x.index].stage > 0

    def broadcast(self, x: Any) -> Symbol:
        """Makes a value one per element, so that later operations may reduce it."""
        y = self.symbol(x)
        y = self.op("real", y) if self.values[y.index].boolean else y
        value = self.values[y.index]
        if value.level is Level.ELEMENT:
            return y
        return self.add(Value("broadcast", (y.index,), level=Level.ELEMENT, stage=value.stage))

    def level(self, x: Any) -> Level:
        """The number of values that a symbol stands for: per row, per leaf, or per element."""
        return self.values[self.symbol(x).index].level

    def behind_broadcast(self, x: Any) -> Symbol | None:
        """The uniform value that a value per element repeats, if it is known to."""
        value = self.values[self.symbol(x).index]
        return Symbol(self, value.args[0]) if value.op == "broadcast" else None

    def reduce(self, kind: str, x: Any) -> Symbol:
        """Adds a reduction; `kind` is `"leaf_"` or `"tree_"` and a row of `REDUCTIONS`."""
        x = self.symbol(x)
        same = self.behind_broadcast(x)
        if same is not None and kind.startswith("leaf_"):  # needs no pass
            return self.op("mul", self.input("size"), same) if kind == "leaf_sum" else same
        if self.values[x.index].boolean:
            x = self.op("real", x)
        value = self.values[x.index]
        if value.level is not Level.ELEMENT:
            raise RuleError(f"{where()} reduces a value that is the same for every element.")
        tree, scope = kind.startswith("tree_"), ""
        if tree:
            # leaves with other rules meet in the same scope, so reductions are numbered in the order of their calls
            number = self.reduced.get(self.scope, 0)
            self.reduced[self.scope] = number + 1
            scope = f"{self.scope}.{number}" if number else self.scope
        return self.add(
            Value(
                kind,
                (x.index,),
                name=scope,
                level=Level.ROW if tree else Level.LEAF,
                stage=max(self.values[x.index].stage + 1, self.stages.get(scope, 0)),
            )
        )

    def finish(self, outputs: Mapping[str, Any], per_leaf: frozenset[str] = frozenset()) -> Program:
        """Closes the program over its outputs, dropping values that none of them needs."""
        symbols: dict[str, Symbol] = {}
        for name, x in outputs.items():
            y = self.symbol(x)
            if self.values[y.index].boolean:
                y = self.op("real", y)
            if name in per_leaf and self.values[y.index].level is Level.ELEMENT:
                raise RuleError(
                    f"The new value of `{name}` differs per element, but its slot holds one number per leaf."
                )
            symbols[name] = y
        needed: set[int] = set()
        stack = [x.index for x in symbols.values()]
        # other leaves wait for this one's part in a reduction, whether or not this one wants the result
        stack += [i for i, v in enumerate(self.values) if v.spans_tree]
        while stack:
            i = stack.pop()
            if i not in needed:
                needed.add(i)
                stack.extend(self.values[i].args)
        new = {old: k for k, old in enumerate(sorted(needed))}
        values = tuple(
            Value(v.op, tuple(new[a] for a in v.args), v.name, v.const, v.level, v.stage, v.boolean)
            for v in (self.values[old] for old in new)
        )
        return Program(
            values,
            tuple(
                Output(name, new[x.index], Level.LEAF if name in per_leaf else Level.ELEMENT)
                for name, x in symbols.items()
            ),
        )


def trace_together(trace: Callable[[Mapping[str, int]], T], programs_of: Callable[[T], Iterable[Program]]) -> T:
    """Traces programs over leaves that meet in reductions over the tree.

    Such a reduction ends in the same pass for all of them: that of the leaf with the most reductions behind it.

    Args:
      trace: a function of the earliest stages of tree reductions, by scope, that traces the programs.
      programs_of: the programs that it has traced.

    Returns:
      The result of `trace` with stages that agree.
    """
    stages: dict[str, int] = {}
    while True:
        traced = trace(stages)
        values = (value for program in programs_of(traced) for value in program.values)
        ends = [(value.name, value.stage) for value in values if value.spans_tree]
        stages = {}
        for name, stage in ends:
            stages[name] = max(stages.get(name, 0), stage)
        if all(stage == stages[name] for name, stage in ends):
            return traced
