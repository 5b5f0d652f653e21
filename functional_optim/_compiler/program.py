"""The typed, frozen, printable program that every backend reads.

A program is a straight line of values, each computed from earlier ones. Its text, `str(program)`, is what golden
tests compare and what belongs in a bug report:

    %0 = array u
    %1 = scalar scale.step_size
    %2 = mul(%1, %0)
    updates <- %2

A value lives at one of three levels. `ROW` values are the same for every leaf that shares a row of the scalar
table (a learning rate, a bias correction, a global norm), `LEAF` values for every element of one leaf (its norm,
its size), and `ELEMENT` values differ per element. ROW and LEAF values are *uniform*: they are computed in double
precision, once, before the loop over elements.

A value also has a stage: 0 if it can be computed in a first pass over memory, and one more behind each reduction
that it depends on.

ELEMENT values have the dtype of the leaf, but for those around a reduction, where numbers may lie far outside of it.
Values that are reduced, and values that nothing else needs, are *wide*: they stay in double precision, so that the
square of a float32 neither overflows nor vanishes. An operation of an element with a number that follows from a
reduction, such as a ratio of norms, is computed in double precision and *rounded* to the dtype of the leaf.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property

from .ops import OPS, REDUCTIONS


class Level(IntEnum):
    """The number of values that one stands for: per row of the scalar table, per leaf, or per element."""

    ROW = 0
    LEAF = 1
    ELEMENT = 2


INPUTS = {"scalar": Level.ROW, "size": Level.LEAF, "leaf": Level.LEAF, "array": Level.ELEMENT, "const": Level.ROW}


@dataclass(frozen=True)
class Value:
    """One value of a program.

    Args:
      op: a row of `OPS`; `"leaf_"` or `"tree_"` and a row of `REDUCTIONS`; or an input: `"array"` (one number per
        element), `"leaf"` (a stored number per leaf), `"size"` (a leaf's number of elements), `"scalar"`, `"const"`.
      args: indices of the operands.
      name: the name of an input; the scope of a tree reduction.
      const: the number that a `"const"` is.
      level: how many there are.
      stage: number of reductions that precede it.
      boolean: whether it is a truth value.
    """

    op: str
    args: tuple[int, ...] = ()
    name: str = ""
    const: float = 0.0
    level: Level = Level.ROW
    stage: int = 0
    boolean: bool = False

    @property
    def uniform(self) -> bool:
        """Whether it is the same for all elements of a leaf."""
        return self.level < Level.ELEMENT

    @property
    def spans_tree(self) -> bool:
        """Whether it is a reduction over all leaves of a scope."""
        return self.op.startswith("tree_")

    @property
    def reduction(self) -> str:
        """The row of `REDUCTIONS` that this value is, or `""`."""
        scope, _, kind = self.op.partition("_")
        return kind if scope in ("leaf", "tree") and kind in REDUCTIONS else ""

    def __str__(self) -> str:
        if self.op == "const":
            return repr(self.const)
        if self.op in INPUTS:
            return f"{self.op} {self.name}".rstrip()
        scope = f", over {self.name}" if self.spans_tree else ""
        return f"{self.op}({', '.join(f'%{a}' for a in self.args)}{scope})"


@dataclass(frozen=True)
class Output:
    """An output of a program: `value` goes to the array, or to the number per leaf, called `name`."""

    name: str
    value: int
    level: Level = Level.ELEMENT


@dataclass(frozen=True)
class Program:
    """Values in order of computation, and which of them are written where.

    Args:
      values: the values; the operands of each precede it.
      outputs: the values that are written, in order.
    """

    values: tuple[Value, ...]
    outputs: tuple[Output, ...]
    _hash: int = field(init=False, repr=False, compare=False, default=0)

    def __post_init__(self) -> None:
        for i, value in enumerate(self.values):
            known = value.op in OPS or value.op in INPUTS or value.reduction
            if not known or any(a >= i for a in value.args):
                raise AssertionError(f"%{i} = {value} is malformed.")
        object.__setattr__(self, "_hash", hash((self.values, self.outputs)))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        lines = []
        for i, value in enumerate(self.values):
            notes = [] if value.level is Level.ELEMENT or value.op in INPUTS else [value.level.name.lower()]
            notes += ["rounded"] if i in self.rounded else []
            notes += [] if i not in self.wide else ["also wide"] if i in self.narrow else ["wide"]
            notes += [f"stage {value.stage}"] if value.stage else []
            lines.append(f"%{i} = {value}{'  # ' + ', '.join(notes) if notes else ''}")
        return "\n".join(lines + [f"{o.name} <- %{o.value}" for o in self.outputs])

    @cached_property
    def arrays(self) -> tuple[str, ...]:
        """Names of the per-element inputs."""
        return tuple(v.name for v in self.values if v.op == "array")

    @cached_property
    def leaves(self) -> tuple[str, ...]:
        """Names of the inputs that hold one number per leaf."""
        return tuple(v.name for v in self.values if v.op == "leaf")

    @cached_property
    def scalars(self) -> tuple[str, ...]:
        """Names of the numbers of a row of the scalar table."""
        return tuple(v.name for v in self.values if v.op == "scalar")

    @cached_property
    def reductions(self) -> tuple[int, ...]:
        """Indices of the reductions."""
        return tuple(i for i, v in enumerate(self.values) if v.reduction)

    @cached_property
    def narrow(self) -> frozenset[int]:
        """Computed elements that outputs need, in the dtype of the leaf."""
        return self._elements(o.value for o in self.outputs)

    @cached_property
    def wide(self) -> frozenset[int]:
        """Computed elements that are reduced, and elements that only they need, in double precision."""
        return self._elements((self.values[i].args[0] for i in self.reductions), self.narrow)

    @cached_property
    def rounded(self) -> frozenset[int]:
        """Narrow elements that are computed in double precision, from a number that follows from a reduction."""
        return frozenset(
            i
            for i in self.narrow
            if not self.values[i].boolean
            and any(self.values[a].uniform and self.values[a].stage for a in self.values[i].args)
        )

    def _elements(self, roots: Iterable[int], known: frozenset[int] = frozenset()) -> frozenset[int]:
        """Computed elements among some values, with the unknown operands that they need."""
        found: set[int] = set()
        stack = list(roots)
        while stack:
            i = stack.pop()
            if i not in found and not self.values[i].uniform and self.values[i].op != "array":
                found.add(i)
                stack.extend(a for a in self.values[i].args if a not in known)
        return frozenset(found)

    @cached_property
    def spans_tree(self) -> bool:
        """Whether something is reduced over all leaves, of which other programs may have some."""
        return any(v.spans_tree for v in self.values)

    @cached_property
    def stages(self) -> int:
        """Number of passes over memory."""
        ends = [self.values[o.value].stage for o in self.outputs]
        return 1 + max(ends + [v.stage - 1 for v in self.values if v.spans_tree], default=0)
