"""Emit one pass of a program as C: a function over every chunk of every leaf.

The text is meant to be read; the cache keeps it beside the compiled kernel. A pass is a function `pass_k`. It begins
with the uniform values in double precision, computed once per row of the scalar table and once per leaf, and keeps
those that later passes need. Then it runs `work_k` on every thread, which takes runs of chunks until none is left. It
ends by storing the numbers that a leaf keeps.

Reductions give the same bits for any number of threads: a chunk sums blocks of its elements into eight lanes of
double precision, and the next pass adds the chunks in order.
"""

import functools
import math
from collections.abc import Sequence
from importlib.resources import files

import torch

from ..ops import OPS, REDUCTIONS
from ..passes import Signature, plan, plan_prologues
from ..program import Level, Program


BLOCK = 512  # elements per block of a reducing pass; one block of each reduced value stays in the first-level cache
# elements after which more of the next chunk is asked for; a whole number of vectors and of cache lines
PREFETCH_STRIDE = 64

HEADER = files(__package__).joinpath("kernel.h").read_text("utf-8")

# C type, load, store; `{0}` is the place, `{1}` the value
STORAGE = {
    torch.float32: ("float", "(real){0}", "{0} = (float)({1})"),
    torch.float64: ("double", "(real){0}", "{0} = (double)({1})"),
    torch.bfloat16: ("uint16_t", "(real)from_bf16({0})", "{0} = to_bf16((float)({1}))"),
    torch.float16: ("uint16_t", "(real)from_f16({0})", "{0} = to_f16((float)({1}))"),
    torch.int64: ("int64_t", "(real){0}", "{0} = (int64_t)({1})"),  # counters
}


def emit_c(signature: Signature) -> str:
    """The C source of all passes of a program: functions `pass_0`, `pass_1`, ..."""
    compute = {torch.float32: "float", torch.float64: "double"}[signature.compute]
    description = "\n".join(f" * {line}" for line in str(signature.program).splitlines())
    passes = [_Emitter(signature, k).text() for k in range(len(plan(signature)))]
    return f"/*\n{description}\n */\n" + prelude(compute) + "\n" + "\n".join(passes)


def prelude(compute: str) -> str:
    """Text that emitted C starts with, for values of a C type."""
    return f"#define REAL {compute}\n{HEADER}"


def literal(x: float) -> str:
    """A double constant in C."""
    if math.isnan(x):
        return "NAN"
    return repr(x) if math.isfinite(x) else ("INFINITY" if x > 0 else "-INFINITY")


class _Emitter:
    """Writes one pass."""

    def __init__(self, signature: Signature, number: int) -> None:
        passes, prologues = plan(signature), plan_prologues(signature)
        self.signature, self.p, self.number = signature, passes[number], number
        self.program: Program = signature.program
        values = self.program.values
        self.new = prologues[number].new
        kept = {i for prologue in prologues for i in (*prologue.used, *prologue.carried)}
        kept |= {
            a
            for prologue in prologues
            for i in prologue.new
            if values[i].level is Level.LEAF
            for a in values[i].args
            if values[a].level is Level.ROW and values[a].op != "const"
        }
        self.row_kept = [i for i in sorted(kept) if values[i].level is Level.ROW]
        self.leaf_kept = [i for i in sorted(kept) if values[i].level is Level.LEAF]
        self.per_leaf = [i for i in self.new if values[i].level is Level.LEAF]
        inputs = (*self.program.arrays, *self.program.leaves)
        self.inputs = {name: k for k, name in enumerate(inputs)}
        self.first_output = len(inputs)

    def text(self) -> str:
        n = self.number
        parts = [f"/* ---- pass {n + 1} of {len(plan(self.signature))} ---- */"]
        work = "\n".join("  " + x for x in self.work())
        parts.append(f"static void work_{n}(int64_t begin, int64_t end, void *data) {{\n{work}\n}}\n")
        parts.append(f"void pass_{n}(launch_t *l) {{\n" + "\n".join("  " + x for x in self.entry()) + "\n}\n")
        return "\n".join(parts)

    # -- uniform values -------------------------------------------------------------------------------------------

    def uniform(self, i: int) -> str:
        """The C expression of one uniform value, in double precision."""
        value = self.program.values[i]
        match value.op:
            case "scalar":
                return f"l->scalars[r * {len(self.program.scalars)} + {self.program.scalars.index(value.name)}]"
            case "size":
                return "(double)l->leaf_size[leaf]"
            case "leaf":
                dtype = self.signature.dtypes[value.name]
                ctype, load, _ = STORAGE[dtype]
                return load.format(f"*(const {ctype} *)l->addresses[{self.inputs[value.name]}][leaf]").replace(
                    "(real)", "(double)"
                )
            case _ if value.reduction:
                partials = f"l->partials[{self.program.reductions.index(i)}]"
                if value.spans_tree:
                    return f"total_{value.reduction}({partials}, l->n_partials)"
                first, last = "l->leaf_chunk[leaf]", "l->leaf_chunk[leaf + 1]"
                return f"total_{value.reduction}({partials} + l->first_partial + {first}, {last} - {first})"
        args = [self.double_operand(a) for a in value.args]
        return OPS[value.op].c.format(*args, f="", T="double")

    def double_operand(self, i: int) -> str:
        value = self.program.values[i]
        return f"({literal(value.const)})" if value.op == "const" else f"u{i}"

    def entry(self) -> list[str]:
        values = self.program.values
        nr, nl = len(self.row_kept), len(self.leaf_kept)
        once = [i for i in self.new if values[i].spans_tree]
        rows = [i for i in self.new if values[i].level is Level.ROW and i not in once]
        lines = []
        if (nr or nl) and not self.number:
            lines.append(f"l->of_leaf = l->of_row + l->n_rows * {nr};")
        lines += [f"const double u{i} = {self.uniform(i)};" for i in once]
        if rows or once:
            lines.append("for (int64_t r = 0; r < l->n_rows; ++r) {")
            lines += [f"  const double u{i} = {self.of_row(i)};" for i in self.needed(rows, Level.ROW)]
            lines += [f"  const double u{i} = {self.uniform(i)};" for i in rows]
            lines += [f"  {self.of_row(i)} = u{i};" for i in self.row_kept if i in self.new]
            lines.append("}")
        if self.per_leaf:
            lines += self.before_leaves()
            lines.append("for (int64_t leaf = 0; leaf < l->n_leaves; ++leaf) {")
            lines += ["  " + x for x in self.leaf_lines()]
            lines += [f"  {self.of_leaf(i)} = u{i};" for i in self.leaf_kept if i in self.new]
            lines.append("}")
        lines.append("l->next_run = 0;")
        work = f"work_{self.number}"
        lines.append(f"if (l->n_threads < 2 || l->parallel_for(0, l->n_threads, 1, {work}, l)) {work}(0, 1, l);")
        own = [k for k in self.p.stores if self.program.outputs[k].level is Level.LEAF]
        if own:
            lines.append("for (int64_t leaf = 0; leaf < l->n_leaves; ++leaf) {")
            for k in own:
                ctype, _, store = STORAGE[self.signature.outputs[k]]
                i = self.program.outputs[k].value
                place = f"*({ctype} *)l->addresses[{self.first_output + k}][leaf]"
                lines.append("  " + store.format(place, self.kept(i)) + ";")
            lines.append("}")
        return lines

    def needed(self, chosen: Sequence[int], level: Level) -> list[int]:
        """Kept values of a level that some are computed from, and that are not computed among them."""
        values = self.program.values
        operands = {a for i in chosen if not values[i].reduction for a in values[i].args}
        kept = self.row_kept if level is Level.ROW else self.leaf_kept
        here = {i for i in self.new if values[i].level is values[chosen[0]].level} if chosen else set()
        return [i for i in kept if i in operands and i not in here]

    def of_row(self, i: int, row: str = "r") -> str:
        """Place of a value that is kept for a row."""
        return f"l->of_row[{row} * {len(self.row_kept)} + {self.row_kept.index(i)}]"

    def of_leaf(self, i: int) -> str:
        """Place of a value that is kept for a leaf."""
        return f"l->of_leaf[leaf * {len(self.leaf_kept)} + {self.leaf_kept.index(i)}]"

    @functools.cached_property
    def repeated(self) -> list[int]:
        """Values of a leaf that are those of the leaf before it, if both have the same row and stored numbers."""
        values, found = self.program.values, set[int]()
        for i in self.per_leaf:
            own = [a for a in values[i].args if values[a].level is Level.LEAF]
            if values[i].op == "leaf" or (values[i].op in OPS and all(a in found for a in own)):
                found.add(i)
        computed = any(values[i].op in OPS for i in found)
        return [i for i in self.per_leaf if i in found] if computed else []

    def before_leaves(self) -> list[str]:
        if not self.repeated:
            return []
        return ["int64_t last = -1;", f"double {', '.join(f'u{i} = 0' for i in self.repeated)};"]

    def leaf_lines(self) -> list[str]:
        values = self.program.values
        of_row = self.needed(self.per_leaf, Level.ROW)
        lines = ["const int64_t r = l->leaf_row[leaf];"] if of_row or self.repeated else []
        lines += [f"const double u{i} = {self.of_row(i)};" for i in of_row]
        lines += [f"const double u{i} = {self.of_leaf(i)};" for i in self.needed(self.per_leaf, Level.LEAF)]
        stored = [i for i in self.repeated if values[i].op == "leaf"]
        lines += [f"const double new{i} = {self.uniform(i)};" for i in stored]
        if self.repeated:
            lines.append(f"if (!({' && '.join(['r == last', *(f'new{i} == u{i}' for i in stored)])})) {{")
            lines += [f"  u{i} = {f'new{i}' if i in stored else self.uniform(i)};" for i in self.repeated]
            lines += ["  last = r;", "}"]
        return lines + [f"const double u{i} = {self.uniform(i)};" for i in self.per_leaf if i not in self.repeated]

    def kept(self, i: int) -> str:
        """The place where the prologue left a uniform value."""
        value = self.program.values[i]
        if value.op == "const":
            return literal(value.const)
        if value.level is Level.ROW:
            return self.of_row(i, "l->leaf_row[leaf]")
        return self.of_leaf(i)

    # -- elements -------------------------------------------------------------------------------------------------

    def operand(self, i: int, double: bool = False, wide: bool = False) -> str:
        """The C expression of an operand, in the type of the elements or in double precision."""
        value = self.program.values[i]
        if value.op == "const":
            number = f"({'double' if double else 'real'}){literal(value.const)}"
            return number if value.const >= 0 else f"({number})"
        if value.uniform:
            return f"d{i}" if double else f"s{i}"
        if wide and i in self.signature.wide:
            return f"w{i}"
        return f"(double)v{i}" if double and not value.boolean else f"v{i}"

    def factors(self, i: int) -> tuple[int, int] | None:
        """Operands of a product that is rounded: the element, and the uniform value; None if it is no such product."""
        value = self.program.values[i]
        if i not in self.signature.rounded or value.op != "mul":
            return None
        element, factor = sorted(value.args, key=lambda a: self.program.values[a].uniform)
        return (element, factor) if not self.program.values[element].uniform else None

    def statement(self, i: int, wide: bool) -> str:
        """The C statement that computes a value of an element."""
        value = self.program.values[i]
        factors = None if wide else self.factors(i)
        if factors:
            element, factor = factors
            return f"const real v{i} = {self.operand(element)} * near{factor} * far{factor};"
        double = wide or i in self.signature.rounded
        suffix = "" if double or self.signature.compute is torch.float64 else "f"
        operands = [self.operand(a, double, wide) for a in value.args]
        expression = OPS[value.op].c.format(*operands, f=suffix, T="double" if double else "real")
        if value.boolean:
            return f"const int {'w' if wide else 'v'}{i} = {expression};"
        if wide:
            return f"const double w{i} = {expression};"
        return f"const real v{i} = {f'(real)({expression})' if double else expression};"

    def work(self) -> list[str]:
        program, values, p = self.program, self.program.values, self.p
        lines = ["launch_t *l = data;", "for (;;) {"]
        lines += [
            "  const int64_t run = __atomic_fetch_add(&l->next_run, 1, __ATOMIC_RELAXED);",
            "  if (run >= l->n_runs) return;",
            "  const int64_t until = l->runs[run + 1];",
            "  for (int64_t chunk = l->runs[run]; chunk < until; ++chunk) {",
        ]
        inner = [
            "const int64_t leaf = l->chunk_leaf[chunk], start = l->chunk_start[chunk], stop = l->chunk_stop[chunk];",
            "const int64_t later = chunk + 1 < until ? chunk + 1 : chunk, next = l->chunk_leaf[later];",
            "const int64_t ahead = l->chunk_start[later] - start;",
            f"const int64_t strip = later > chunk ? {PREFETCH_STRIDE} : stop - start;",
        ]
        products = {i: self.factors(i) for i in p.body}
        in_double = {a for i in p.wide for a in values[i].args}
        in_double |= {a for i in self.signature.rounded.intersection(p.body) if not products[i] for a in values[i].args}
        halves = {factors[1] for factors in products.values() if factors}
        plain = {a for i in set(p.body) - self.signature.rounded for a in values[i].args}
        plain |= {program.outputs[k].value for k in p.stores if program.outputs[k].level is Level.ELEMENT}
        for i in (*self.row_kept, *self.leaf_kept):
            inner += [f"const real s{i} = (real){self.kept(i)};"] if i in plain else []
            inner += [f"const double d{i} = {self.kept(i)};"] if i in in_double else []
            if i in halves:
                inner.append(f"const real near{i} = near_factor({self.kept(i)}), far{i} = far_factor({self.kept(i)});")
        body = []
        loads = [
            (i, self.inputs[values[i].name], values[i].name, self.signature.dtypes[values[i].name]) for i in p.inputs
        ]
        loads += [(i, self.first_output + k, program.outputs[k].name, self.signature.outputs[k]) for i, k in p.reloads]
        for i, array, name, dtype in loads:
            ctype, load, _ = STORAGE[dtype]
            inner.append(f"const {ctype} *a{i} = l->addresses[{array}][leaf];  /* {name} */")
            inner.append(f"const {ctype} *n{i} = (const {ctype} *)l->addresses[{array}][next] + ahead;")
            body.append(f"const real v{i} = {load.format(f'a{i}[i]')};")
        body += [self.statement(i, False) for i in p.body] + [self.statement(i, True) for i in p.wide]
        for k in p.stores:
            if program.outputs[k].level is Level.ELEMENT:
                ctype, _, store = STORAGE[self.signature.outputs[k]]
                inner.append(
                    f"{ctype} *o{k} = l->addresses[{self.first_output + k}][leaf];  /* {program.outputs[k].name} */"
                )
                body.append(store.format(f"o{k}[i]", self.operand(program.outputs[k].value)) + ";")
        for r in p.reductions:
            body.append(f"b{r}[i - first] = {self.operand(values[r].args[0], True, True)};")
        if not p.reductions:
            inner += self.strips("start", "stop", [i for i, *_ in loads], body)
        else:
            for r in p.reductions:
                identity = literal(REDUCTIONS[values[r].reduction].identity)
                inner.append(f"double t{r}[8] = {{{', '.join([identity] * 8)}}};")
                inner.append(f"double b{r}[{BLOCK}];")
            inner.append(f"for (int64_t first = start; first < stop; first += {BLOCK}) {{")
            inner.append(f"  const int64_t last = stop < first + {BLOCK} ? stop : first + {BLOCK};")
            inner += ["  " + x for x in self.strips("first", "last", [i for i, *_ in loads], body)]
            inner += [f"  fold_{values[r].reduction}(t{r}, b{r}, (int)(last - first));" for r in p.reductions]
            inner.append("}")
            for r in p.reductions:
                place = f"l->partials[{program.reductions.index(r)}][l->first_partial + chunk]"
                inner.append(f"{place} = done_{values[r].reduction}(t{r});")
        return [*lines, *("    " + x for x in inner), "  }", "}"]

    @staticmethod
    def strips(first: str, last: str, loads: Sequence[int], body: Sequence[str]) -> list[str]:
        """A loop over elements. On the way it asks for the next chunk, which the hardware does not see coming."""
        lines = [
            f"for (int64_t at = {first}; at < {last}; at += strip) {{",
            f"  const int64_t end = {last} - at < strip ? {last} : at + strip;",
        ]
        asks = [f"    prefetch(n{i} + at, n{i} + end);" for i in loads]
        if loads:
            lines += ["  if (later > chunk) {", *asks, "  }"]
        lines += ["  #pragma omp simd", "  for (int64_t i = at; i < end; ++i) {", *("    " + x for x in body), "  }"]
        return [*lines, "}"]
