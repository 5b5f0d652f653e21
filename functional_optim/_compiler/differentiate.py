"""The derivative of a program, which is a program: from cotangents of the outputs to cotangents of the inputs.

Its values are those of the program, computed again from the same inputs, followed by their cotangents in reverse order.
A number that elements share gathers its cotangent from all of them, so it becomes a reduction, and a reduction spreads
its own over the elements. Cotangents of rows of the scalar table are kept per leaf, and added up by the caller.

Everything that a program has is had by its derivative, too: passes, kernels on every backend, a text to read.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from .passes import Signature
from .program import Level, Program, Value
from .symbols import Symbol
from .trace import Tracer, trace_together


Cotangents = Sequence[Any]  # a symbol, a number or None for each operand
# of an operation: the operands, the result, and its cotangent, to a cotangent of each operand, None for one of zeros
DerivativeRule = Callable[..., Cotangents]

PREFIX = "d "  # of names of cotangents
LN2, LN10, TWO_OVER_ROOT_PI = math.log(2), math.log(10), 2 / math.sqrt(math.pi)


class NoDerivative(Exception):
    """A program has an operation without a row in `RULES`."""


def cotangent(name: str) -> str:
    """The name of the cotangent of an input or an output."""
    return PREFIX + name


def _half_where(x: Symbol, y: Symbol, greater: bool, d: Symbol) -> Symbol:
    """The share of an operand in the cotangent of a maximum or a minimum: a half where both are equal."""
    t = d.tracer
    tie = t.op("where", t.op("eq", x, y), 0.5, 0.0)
    return t.op("mul", d, t.op("where", t.op("gt" if greater else "lt", x, y), 1.0, tie))


def _zeros(n: int) -> DerivativeRule:
    return lambda *_: [None] * n


def _pow(x: Symbol, y: Symbol, out: Symbol, d: Symbol) -> Cotangents:
    t = d.tracer
    base = t.op("mul", t.op("mul", d, y), t.op("pow", x, t.op("sub", y, 1.0)))
    exponent = t.op("mul", t.op("mul", d, out), t.op("log", x))
    vanishes = t.op("logical_and", t.op("eq", x, 0.0), t.op("ge", y, 0.0))
    return [t.op("where", t.op("eq", y, 0.0), 0.0, base), t.op("where", vanishes, 0.0, exponent)]


def _lerp(x: Symbol, y: Symbol, w: Symbol, out: Symbol, d: Symbol) -> Cotangents:
    t = d.tracer
    return [t.op("mul", d, t.op("sub", 1.0, w)), t.op("mul", d, w), t.op("mul", d, t.op("sub", y, x))]


def _addcdiv(s: Symbol, x: Symbol, y: Symbol, v: Symbol, out: Symbol, d: Symbol) -> Cotangents:
    t = d.tracer
    share = t.op("div", t.op("mul", d, v), y)
    ratio = t.op("div", x, y)
    return [d, share, t.op("neg", t.op("mul", share, ratio)), t.op("mul", d, ratio)]


def _atan2(y: Symbol, x: Symbol, out: Symbol, d: Symbol) -> Cotangents:
    t = d.tracer
    length = t.op("hypot", x, y)  # whose square may leave the range of the dtype
    origin, share = t.op("eq", length, 0.0), t.op("div", d, length)
    return [
        t.op("where", origin, 0.0, t.op("mul", share, t.op("div", x, length))),
        t.op("where", origin, 0.0, t.op("neg", t.op("mul", share, t.op("div", y, length)))),
    ]


def _copysign(x: Symbol, y: Symbol, out: Symbol, d: Symbol) -> Cotangents:
    t = d.tracer
    return [t.op("where", t.op("eq", x, 0.0), 0.0, t.op("mul", d, t.op("div", out, x))), None]


# A row per operation; those of truth values have none to pass on. The derivatives are torch's, ties and zeros included.
RULES: dict[str, DerivativeRule] = {
    "neg": lambda x, out, d: [-d],
    "abs": lambda x, out, d: [d * d.tracer.op("sign", x)],
    "sqrt": lambda x, out, d: [d.tracer.op("where", d.tracer.op("eq", x, 0.0), d * 0.0, d * 0.5 / out)],
    "rsqrt": lambda x, out, d: [d * out * -0.5 / x],
    "cbrt": lambda x, out, d: [d / (3.0 * (out * out))],
    "exp": lambda x, out, d: [d * out],
    "exp2": lambda x, out, d: [d * (out * LN2)],
    "expm1": lambda x, out, d: [d * (out + 1.0)],
    "log": lambda x, out, d: [d / x],
    "log2": lambda x, out, d: [d / (x * LN2)],
    "log1p": lambda x, out, d: [d / (x + 1.0)],
    "log10": lambda x, out, d: [d / (x * LN10)],
    "erf": lambda x, out, d: [d * (TWO_OVER_ROOT_PI * d.tracer.op("exp", -(x * x)))],
    "sinh": lambda x, out, d: [d * d.tracer.op("cosh", x)],
    "cosh": lambda x, out, d: [d * d.tracer.op("sinh", x)],
    "tanh": lambda x, out, d: [d * (1.0 - out * out)],
    "sin": lambda x, out, d: [d * d.tracer.op("cos", x)],
    "cos": lambda x, out, d: [-(d * d.tracer.op("sin", x))],
    "tan": lambda x, out, d: [d * (1.0 + out * out)],
    "atan": lambda x, out, d: [d / (1.0 + x * x)],
    "atan2": _atan2,
    "hypot": lambda x, y, out, d: [d * (x / out), d * (y / out)],
    **dict.fromkeys(("floor", "ceil", "trunc", "round", "sign"), _zeros(1)),
    "copysign": _copysign,
    "fmod": lambda x, y, out, d: [d, -(d * d.tracer.op("trunc", x / y))],
    "add": lambda x, y, out, d: [d, d],
    "sub": lambda x, y, out, d: [d, -d],
    "mul": lambda x, y, out, d: [d * y, d * x],
    "div": lambda x, y, out, d: [d / y, -(d * (out / y))],
    "pow": _pow,
    "maximum": lambda x, y, out, d: [_half_where(x, y, True, d), _half_where(y, x, True, d)],
    "minimum": lambda x, y, out, d: [_half_where(x, y, False, d), _half_where(y, x, False, d)],
    "where": lambda c, x, y, out, d: [None, d.tracer.op("where", c, d, 0.0), d.tracer.op("where", c, 0.0, d)],
    "broadcast": lambda x, out, d: [d],
    "real": _zeros(1),
    "lerp": _lerp,
    "addcmul": lambda s, x, y, v, out, d: [d, d * (v * y), d * (v * x), d * (x * y)],
    "addcdiv": _addcdiv,
    "fused_mean": lambda x, y, b, w, out, d: [d * (1.0 - w), d * w, None, d * (y - x)],
    "fused_mean_square": lambda x, y, b, w, out, d: [d * b, 2.0 * d * (w * y), d * x, d * (y * y)],
    "fused_weight": lambda b, n, out, d: _pow(b, n, 1.0 - out, -d),
    "fused_shrink": lambda x, r, rest, out, d: [d * rest, None, d * x],
    "fused_number": lambda x, out, d: [d],
    "to_float32": lambda x, out, d: [d.tracer.op("to_float32", d)],
    "to_bfloat16": lambda x, out, d: [d.tracer.op("to_bfloat16", d)],
    "to_float16": lambda x, out, d: [d.tracer.op("to_float16", d)],
}


class _Reversal:
    """The derivative of one program.

    Args:
      program: the program.
      given: the outputs whose cotangents are given.
      wanted: the inputs whose cotangents are wanted.
      stages: the earliest stages of tree reductions.
    """

    def __init__(self, program: Program, given: Set[str], wanted: Set[str], stages: Mapping[str, int]) -> None:
        self.program, self.given, self.wanted, self.t = program, given, wanted, Tracer(stages)
        # cotangents of values: as numbers that elements share, and as numbers of elements
        self.shared: dict[int, Symbol] = {}
        self.elements: dict[int, Symbol] = {}
        self.values: list[Symbol] = []

    def run(self) -> Program:
        """The derivative; see `differentiate`."""
        t, program = self.t, self.program
        for value in program.values:
            self.values.append(t.add(self.again(value)))
        matters = self.inputs_matter()
        for output in program.outputs:
            if output.name in self.given and output.value in matters:
                kind = "array" if output.level is Level.ELEMENT else "leaf"
                self.accumulate(output.value, t.input(kind, cotangent(output.name)))
        for i in reversed(range(len(program.values))):
            if i in matters and program.values[i].args:
                self.step_back(i, matters)
        outputs = {}
        for i, value in enumerate(program.values):
            if value.name in self.wanted and value.op in ("array", "leaf", "scalar"):
                d = self.total(i)
                outputs[cotangent(value.name)] = 0.0 if d is None else d
        per_leaf = {v.name for v in program.values if v.op in ("leaf", "scalar")}
        return t.finish(outputs, frozenset(map(cotangent, per_leaf)))

    def again(self, value: Value) -> Value:
        """A value of the program, as one of the derivative."""
        args = tuple(self.values[a].index for a in value.args)
        stage = max([self.t.values[a].stage for a in args], default=0)
        if value.reduction:
            stage = max(stage + 1, self.t.stages.get(value.name, 0) if value.spans_tree else 0)
        return Value(value.op, args, value.name, value.const, value.level, stage, value.boolean)

    def inputs_matter(self) -> set[int]:
        """The values that follow from wanted inputs."""
        found: set[int] = set()
        for i, value in enumerate(self.program.values):
            if (value.name in self.wanted and value.op in ("array", "leaf", "scalar")) or (
                not value.boolean and any(a in found for a in value.args)
            ):
                found.add(i)
        return found

    def accumulate(self, i: int, d: Symbol) -> None:
        """Adds to the cotangent of a value."""
        kept = self.elements if self.t.level(d) is Level.ELEMENT else self.shared
        kept[i] = self.t.op("add", kept[i], d) if i in kept else d

    def total(self, i: int) -> Symbol | None:
        """The cotangent of a value; that of a number which elements share is gathered from all of them."""
        shared, elements = self.shared.get(i), self.elements.get(i)
        if self.program.values[i].uniform and elements is not None:
            gathered = self.t.reduce("leaf_sum", elements)
            return gathered if shared is None else self.t.op("add", shared, gathered)
        if shared is not None and elements is not None:
            return self.t.op("add", shared, elements)
        return elements if shared is None else shared

    def step_back(self, i: int, matters: set[int]) -> None:
        """Passes the cotangent of a value on to its operands."""
        value, d = self.program.values[i], self.total(i)
        if value.op == "tree_sum":  # other leaves may have a part where this one has none
            self.accumulate(value.args[0], self.over_the_tree(value, self.t.symbol(0.0) if d is None else d))
            return
        if d is None:
            return
        if value.op == "leaf_sum":
            self.accumulate(value.args[0], d)
            return
        if value.op not in RULES:
            raise NoDerivative(value.op)
        operands = [self.values[a] for a in value.args]
        for a, part in zip(value.args, RULES[value.op](*operands, self.values[i], d), strict=True):
            if part is not None and a in matters:
                self.accumulate(a, self.t.symbol(part))

    def over_the_tree(self, value: Value, d: Symbol) -> Symbol:
        """The sum of a number of each leaf over all leaves."""
        t = self.t
        t.scope = cotangent(value.name)
        return t.reduce("tree_sum", t.broadcast(t.op("div", d, t.input("size"))))


def differentiate(
    program: Program, given: Set[str], wanted: Set[str], stages: Mapping[str, int] | None = None
) -> Program:
    """The derivative of a program.

    Args:
      program: the program.
      given: the outputs whose cotangents are given; others have none.
      wanted: the inputs whose cotangents are wanted: arrays, numbers per leaf, and numbers of the scalar table.
      stages: the earliest stages of tree reductions.

    Returns:
      A program that reads the inputs and the cotangents that are given, and writes those that are wanted. That of a
      number of the scalar table is one per leaf, the leaf's part in it.

    Raises:
      NoDerivative: there is no rule for one of its operations.

    Example:
      >>> t = Tracer()
      >>> program = t.finish({"updates": t.input("scalar", "rate") * t.input("array", "u")})
      >>> print(differentiate(program, {"updates"}, {"rate", "u"}))
      %0 = scalar rate
      %1 = array u
      %2 = array d updates
      %3 = mul(%2, %1)  # wide
      %4 = mul(%2, %0)
      %5 = leaf_sum(%3)  # leaf, stage 1
      d rate <- %5
      d u <- %4
    """
    return _Reversal(program, given, wanted, stages or {}).run()


@functools.lru_cache(maxsize=256)
def differentiate_all(
    programs: tuple[Program, ...], given: tuple[frozenset[str], ...], wanted: tuple[frozenset[str], ...]
) -> tuple[Program, ...]:
    """The derivatives of programs that meet in reductions over the tree; see `differentiate` and `trace_together`."""

    def trace(stages: Mapping[str, int]) -> tuple[Program, ...]:
        each = zip(programs, given, wanted, strict=True)
        return tuple(differentiate(program, g, w, stages) for program, g, w in each)

    return trace_together(trace, lambda traced: traced)


def differentiate_signatures(signatures: Sequence[Signature]) -> list[Signature]:
    """The derivatives of programs with dtypes, from cotangents of all that they write to those of all arrays."""
    programs = tuple(signature.program for signature in signatures)
    given = tuple(frozenset(o.name for o in program.outputs if o.level is Level.ELEMENT) for program in programs)
    derivatives = differentiate_all(programs, given, tuple(frozenset(program.arrays) for program in programs))
    found = []
    for signature, derivative in zip(signatures, derivatives, strict=True):
        outputs = zip(signature.program.outputs, signature.outputs, strict=True)
        dtypes = {**{cotangent(output.name): dtype for output, dtype in outputs}, **signature.dtypes}
        own = {cotangent(name): dtype for name, dtype in signature.dtypes.items()}
        names = (*derivative.arrays, *derivative.leaves)
        found.append(
            Signature(
                derivative,
                tuple(dtypes[name] for name in names),
                tuple(own[output.name] for output in derivative.outputs),
                signature.compute,
            )
        )
    return found
