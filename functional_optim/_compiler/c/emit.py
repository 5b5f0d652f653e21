"""Emit one pass of a program as C: a function over every chunk of every leaf.

The text is meant to be read; the cache keeps it beside the compiled kernel. A pass has three parts. `prologue`
computes the uniform values in double precision, once per row of the scalar table and once per leaf. `work` runs on
every thread: it takes runs of chunks until none is left. `epilogue` stores the numbers that a leaf keeps.

Reductions give the same bits for any number of threads: a chunk sums blocks of its elements into eight lanes of
double precision, and the next pass adds the chunks in order.
"""

import functools
import math
from collections.abc import Sequence
from importlib.resources import files

import torch

from ..ops import OPS, REDUCTIONS
from ..passes import Pass, Signature, plan
from ..program import Level, Program


BLOCK = 512  # elements per block of a reducing pass; one block of each reduced value stays in the first-level cache
STRIP = 64  # elements after which more of the next chunk is asked for; a whole number of vectors and of cache lines

HEADER = files(__package__).joinpath("kernel.h").read_text("utf-8")

# C type, load, store; `{0}` is the place, `{1}` the value
STORAGE = {
    torch.float32: ("float", "(real){0}", "{0} = (float)({1})"),
    torch.float64: ("double", "(real){0}", "{0} = (double)({1})"),
    torch.bfloat16: ("uint16_t", "(real)from_bf16({0})", "{0} = to_bf16((float)({1}))"),
    torch.float16: ("uint16_t", "(real)from_f16({0})", "{0} = to_f16((float)({1}))"),
}


def emit_c(signature: Signature) -> str:
    """The C source of all passes of a program: functions `pass_0`, `pass_1`, ..."""
    compute = {torch.float32: "float", torch.float64: "double"}[signature.compute]
    description = "\n".join(f" * {line}" for line in str(signature.program).splitlines())
    passes = [_Emitter(signature, p, k).text() for k, p in enumerate(plan(signature))]
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

    def __init__(self, signature: Signature, p: Pass, number: int) -> None:
        self.signature, self.p, self.number = signature, p, number
        self.program: Program = signature.program
        values = self.program.values
        used = {a for i in p.body for a in values[i].args} | {self.program.outputs[k].value for k in p.stores}
        used |= {values[r].args[0] for r in p.reductions}
        kept = [i for i in p.uniforms if i in used and values[i].op != "const"]
        per_leaf = [i for i in p.uniforms if values[i].level is Level.LEAF]
        of_leaf = {a for i in per_leaf for a in values[i].args}
        self.row_kept = [i for i in p.uniforms if values[i].level is Level.ROW and (i in kept or i in of_leaf)]
        self.row_kept = [i for i in self.row_kept if values[i].op != "const"]
        self.leaf_kept = [i for i in kept if values[i].level is Level.LEAF]
        self.per_leaf = per_leaf
        inputs = (*self.program.arrays, *self.program.leaves)
        self.columns = {name: k for k, name in enumerate(inputs)}
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
                return load.format(f"*(const {ctype} *)l->columns[{self.columns[value.name]}][leaf]").replace(
                    "(real)", "(double)"
                )
            case _ if value.reduction:
                partials = f"l->partials[{self.program.reductions.index(i)}]"
                if value.op.startswith("tree_"):
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
        once = [i for i in self.p.uniforms if values[i].op.startswith("tree_")]
        rows = [
            i for i in self.p.uniforms if values[i].level is Level.ROW and values[i].op != "const" and i not in once
        ]
        lines = []
        if nr or nl:
            lines.append(f"double *uniforms = malloc(sizeof(double) * (l->n_rows * {nr} + l->n_leaves * {nl} + 1));")
            lines.append(f"l->of_row = uniforms; l->of_leaf = uniforms + l->n_rows * {nr};")
        lines += [f"const double u{i} = {self.uniform(i)};" for i in once]
        if nr:
            lines.append("for (int64_t r = 0; r < l->n_rows; ++r) {")
            lines += [f"  const double u{i} = {self.uniform(i)};" for i in rows]
            lines += [f"  l->of_row[r * {nr} + {k}] = u{i};" for k, i in enumerate(self.row_kept)]
            lines.append("}")
        if nl:
            lines += self.before_leaves()
            lines.append("for (int64_t leaf = 0; leaf < l->n_leaves; ++leaf) {")
            lines += ["  " + x for x in self.leaf_lines()]
            lines += [f"  l->of_leaf[leaf * {nl} + {k}] = u{i};" for k, i in enumerate(self.leaf_kept)]
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
                place = f"*({ctype} *)l->columns[{self.first_output + k}][leaf]"
                lines.append("  " + store.format(place, self.kept(i)) + ";")
            lines.append("}")
        if nr or nl:
            lines.append("free(uniforms);")
        return lines

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
        values, nr = self.program.values, len(self.row_kept)
        lines = ["const int64_t r = l->leaf_row[leaf];"] if nr or self.repeated else []
        lines += [f"const double u{i} = l->of_row[r * {nr} + {k}];" for k, i in enumerate(self.row_kept)]
        stored = [i for i in self.repeated if values[i].op == "leaf"]
        lines += [f"const double new{i} = {self.uniform(i)};" for i in stored]
        if self.repeated:
            lines.append(f"if (!({' && '.join(['r == last', *(f'new{i} == u{i}' for i in stored)])})) {{")
            lines += [f"  u{i} = {f'new{i}' if i in stored else self.uniform(i)};" for i in self.repeated]
            lines += ["  last = r;", "}"]
        return lines + [f"const double u{i} = {self.uniform(i)};" for i in self.per_leaf if i not in self.repeated]

    def kept(self, i: int) -> str:
        """Where a uniform value was left by the prologue."""
        value = self.program.values[i]
        if value.op == "const":
            return literal(value.const)
        if value.level is Level.ROW:
            return f"l->of_row[l->leaf_row[leaf] * {len(self.row_kept)} + {self.row_kept.index(i)}]"
        return f"l->of_leaf[leaf * {len(self.leaf_kept)} + {self.leaf_kept.index(i)}]"

    # -- elements -------------------------------------------------------------------------------------------------

    def operand(self, i: int) -> str:
        value = self.program.values[i]
        if value.op == "const":
            return f"(real){literal(value.const)}" if value.const >= 0 else f"((real){literal(value.const)})"
        return f"s{i}" if value.uniform else f"v{i}"

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
            f"const int64_t ahead = l->chunk_start[later] - start, strip = later > chunk ? {STRIP} : stop - start;",
        ]
        inner += [f"const real s{i} = (real){self.kept(i)};" for i in (*self.row_kept, *self.leaf_kept)]
        body = []
        loads = [
            (i, self.columns[values[i].name], values[i].name, self.signature.dtypes[values[i].name]) for i in p.inputs
        ]
        loads += [(i, self.first_output + k, program.outputs[k].name, self.signature.outputs[k]) for i, k in p.reloads]
        for i, column, name, dtype in loads:
            ctype, load, _ = STORAGE[dtype]
            inner.append(f"const {ctype} *a{i} = l->columns[{column}][leaf];  /* {name} */")
            inner.append(f"const {ctype} *n{i} = (const {ctype} *)l->columns[{column}][next] + ahead;")
            body.append(f"const real v{i} = {load.format(f'a{i}[i]')};")
        for i in p.body:
            ctype = "int" if values[i].boolean else "real"
            expression = OPS[values[i].op].c.format(*map(self.operand, values[i].args), f=self.suffix, T="real")
            body.append(f"const {ctype} v{i} = {expression};")
        for k in p.stores:
            if program.outputs[k].level is Level.ELEMENT:
                ctype, _, store = STORAGE[self.signature.outputs[k]]
                inner.append(
                    f"{ctype} *o{k} = l->columns[{self.first_output + k}][leaf];  /* {program.outputs[k].name} */"
                )
                body.append(store.format(f"o{k}[i]", self.operand(program.outputs[k].value)) + ";")
        for r in p.reductions:
            body.append(f"b{r}[i - first] = {self.operand(values[r].args[0])};")
        if not p.reductions:
            inner += self.strips("start", "stop", [i for i, *_ in loads], body)
        else:
            for r in p.reductions:
                identity = literal(REDUCTIONS[values[r].reduction].identity)
                inner.append(f"double t{r}[8] = {{{', '.join([identity] * 8)}}};")
                inner.append(f"real b{r}[{BLOCK}];")
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
        asks = [f"    ask(n{i} + at, n{i} + end);" for i in loads]
        if loads:
            lines += ["  if (later > chunk) {", *asks, "  }"]
        lines += ["  #pragma omp simd", "  for (int64_t i = at; i < end; ++i) {", *("    " + x for x in body), "  }"]
        return [*lines, "}"]

    @property
    def suffix(self) -> str:
        return "f" if self.signature.compute is torch.float32 else ""
