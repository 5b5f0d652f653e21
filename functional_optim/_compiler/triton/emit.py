"""Emit the kernels of a program as Triton: uniform kernels, and passes that load, compute, reduce and store elements.

A stage of a program is a uniform kernel and a pass, launched in this order:

    uniform_k   for each leaf: ends the reductions of the stage before, computes the uniform values that are new, in
                double precision, and writes those that elements or later stages need for the leaf; the last one writes
                the numbers per leaf, which only uniform kernels read and write
    pass_k      for each chunk of a leaf: loads these, then elements, and stores elements and partial results; in the
                last one a program each moves on the counters that it is given, which uniform kernels have read by then

All that varies is in tables on the device: addresses, sizes, chunks, and a row of scalars per group of
hyper-parameters. A pass does nothing but stream: no double precision but for values that are reduced, and a handful of
loads from tables. A whole block is loaded and stored without a mask, so that accesses are 16 bytes wide where
addresses are known to be aligned; the last block of a leaf has a mask.
"""

from collections.abc import Iterable, Sequence

import torch

from ..ops import OPS, REDUCTIONS
from ..passes import Signature, plan, plan_prologues
from ..program import Level
from .header import HEADER
from .tuning import LEAVES, TUNED, kind_of
from .uniforms import (
    Entry,
    carried,
    entries_of,
    has_elements,
    has_uniform,
    kinds_of,
    numbers,
    uniform_words,
    uniforms_of,
)


TYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.int64: "tl.int64",  # counters
}

PARAMETERS = {  # of kernels, and their types as Triton writes them
    **dict.fromkeys(("leaf_size", "leaf_row", "leaf_whole", "leaf_chunk", "addresses", "partials", "counters"), "*i64"),
    **dict.fromkeys(("scalars", "uniforms"), "*fp64"),
    "chunks": "*i32",
    **dict.fromkeys(("n_leaves", "n_partials", "first_partial", "blocks", "n_counters"), "i32"),
}
UNIFORM = (
    *("leaf_row", "leaf_whole", "leaf_chunk", "addresses", "scalars", "uniforms", "partials"),
    *("n_leaves", "n_partials", "first_partial"),
)
PASS = (
    *("chunks", "leaf_size", "addresses", "uniforms", "partials", "counters"),
    *("n_leaves", "blocks", "first_partial", "n_counters"),
)


def emit_triton(signature: Signature) -> str:
    """The Triton source of a program: kernels `uniform_0`, `pass_0`, `uniform_1`, ..., but for those with no work."""
    description = "\n".join(f"# {line}" for line in str(signature.program).splitlines())
    parts = [f"{description}\n{HEADER}"]
    for k in range(len(plan(signature))):
        if has_uniform(signature, k):
            parts.append(_Uniform(signature, k).text())
        if has_elements(signature, k):
            parts.append(_Elements(signature, k).text())
    return "\n\n".join(parts)


def leaves_per_program(signature: Signature, number: int) -> int:
    """The number of leaves that a program of a uniform kernel computes; one where reductions over leaves end."""
    values = signature.program.values
    ends = any(values[i].op.startswith("leaf_") for i in plan_prologues(signature)[number].new)
    return 1 if ends else LEAVES


def launches(signature: Signature) -> int:
    """The number of kernels that a step launches."""
    stages = range(len(plan(signature)))
    return sum(has_uniform(signature, k) + has_elements(signature, k) for k in stages)


def _literal(x: float, dtype: str) -> str:
    return f'tl.full((), float("{x!r}"), {dtype})'


def _stored(x: str, dtype: torch.dtype) -> str:
    """The expression of a value in the dtype of an output; torch rounds a double to a half type twice, too."""
    x = f"{x}.to(tl.float32)" if dtype.itemsize == 2 else x
    x = f"_bf16({x})" if dtype is torch.bfloat16 else x
    return f"{x}.to({TYPES[dtype]})"


def _kernel(name: str, arguments: Sequence[str], constants: Sequence[str], lines: Iterable[str]) -> str:
    """The text of a kernel that is compiled once, whatever the alignment and size of its arguments."""
    listed = [*arguments, *[f"{x}: tl.constexpr" for x in constants]]
    body = "\n".join(f"    {x}" for x in lines)
    return f"@triton.jit(do_not_specialize={list(arguments)!r})\ndef {name}({', '.join(listed)}):\n{body}\n"


class _Emitter:
    """Writes a kernel of one stage."""

    def __init__(self, signature: Signature, number: int) -> None:
        self.signature, self.number = signature, number
        self.p, self.prologue = plan(signature)[number], plan_prologues(signature)[number]
        self.program, self.values = signature.program, signature.program.values
        self.compute = TYPES[signature.compute]
        self.names = (*self.program.arrays, *self.program.leaves)
        self.doubles, self.singles = uniforms_of(signature)

    def address(self, name: str) -> str:
        """The place of a leaf's address of an input."""
        return f"addresses + {self.names.index(name)} * n_leaves + leaf"

    def output_address(self, k: int) -> str:
        """The place of a leaf's address of an output."""
        return f"addresses + {len(self.names) + k} * n_leaves + leaf"

    def own(self) -> list[str]:
        """The statements that find the uniform values of a leaf."""
        lines = [f"own = uniforms + leaf * {uniform_words(self.signature)}"] if self.doubles or self.singles else []
        if self.singles:
            lines.append(f"singles = (own + {len(self.doubles)}).to(tl.pointer_type({self.compute}))")
        return lines

    def place(self, entry: Entry) -> str:
        """The place of an entry."""
        if entry.kind == "double":
            return f"own + {self.doubles.index(entry)}"
        return f"singles + {self.singles.index(entry)}"


class _Uniform(_Emitter):
    """Writes a uniform kernel: statements on a block of leaves, or on one leaf where reductions over leaves end."""

    def text(self) -> str:
        n = leaves_per_program(self.signature, self.number)
        program = "tl.program_id(0)"
        lines = [f"leaf = {program} * {n} + tl.arange(0, {n})" if n > 1 else f"leaf = {program}"]
        lines += ["inside = leaf < n_leaves", *self.own()]
        new, before = self.prologue.new, carried(self.signature, self.number)
        if any(self.values[i].op == "scalar" for i in new):
            lines.append(f"scalar = scalars + tl.load(leaf_row + leaf, inside, 0) * {len(self.program.scalars)}")
        for i in before:
            condition = " != 0" if self.values[i].boolean else ""
            lines.append(f"u{i} = tl.load({self.place(Entry('double', i))}, inside, 0.0){condition}")
        needed = {a for i in new if not self.values[i].reduction for a in self.values[i].args}
        needed |= {self.program.outputs[k].value for k in numbers(self.signature, self.number)}
        constants = [i for i in sorted(needed) if self.values[i].op == "const"]
        lines += [f"u{i} = {_literal(self.values[i].const, 'tl.float64')}" for i in constants]
        lines += [f"u{i} = {self.uniform(i)}" for i in new]
        for entry in (*self.doubles, *self.singles):
            if entry.value in new:
                lines.append(f"tl.store({self.place(entry)}, {self.entry(entry)}, inside)")
        for k in numbers(self.signature, self.number):
            output, dtype = self.program.outputs[k], TYPES[self.signature.outputs[k]]
            place = f"tl.load({self.output_address(k)}, inside, 0).to(tl.pointer_type({dtype}))"
            x = _stored(f"u{output.value}", self.signature.outputs[k])
            lines.append(f"tl.store({place}, {x}, inside)  # {output.name}")
        return _kernel(f"uniform_{self.number}", UNIFORM, (), lines)

    def uniform(self, i: int) -> str:
        """The expression of a uniform value, in double precision."""
        value = self.values[i]
        match value.op:
            case "scalar":
                return f"tl.load(scalar + {self.program.scalars.index(value.name)}, inside, 0.0)"
            case "size":
                return "tl.load(leaf_whole + leaf, inside, 0).to(tl.float64)"
            case "leaf":
                dtype = TYPES[self.signature.dtypes[value.name]]
                place = f"tl.load({self.address(value.name)}, inside, 0).to(tl.pointer_type({dtype}))"
                return f"tl.load({place}, inside, 0).to(tl.float64)  # {value.name}"
            case _ if value.reduction:
                base = f"tl.load(partials + {self.program.reductions.index(i)}).to(tl.pointer_type(tl.float64))"
                if value.spans_tree:
                    return f"_total_{value.reduction}({base}, n_partials)"
                first, end = "tl.load(leaf_chunk + leaf)", "tl.load(leaf_chunk + leaf + 1)"
                return f"_total_{value.reduction}({base} + first_partial + {first}, {end} - {first})"
        return OPS[value.op].triton.format(*[f"u{a}" for a in value.args], T="tl.float64", E=self.compute)

    def entry(self, entry: Entry) -> str:
        """The expression of an entry."""
        i, boolean = entry.value, self.values[entry.value].boolean
        match entry.kind:
            case "double":
                return f"u{i}.to(tl.float64)" if boolean else f"u{i}"
            case "single":
                return f"u{i}.to({self.compute})"
        return f"_{entry.kind}(u{i})"


class _Elements(_Emitter):
    """Writes a pass: a function of one block of elements, and the kernel that calls it for the blocks of a chunk."""

    def text(self) -> str:
        stored = [k for k in self.p.stores if self.program.outputs[k].level is Level.ELEMENT]
        entries = entries_of(self.signature, self.p)
        loads = [
            (i, self.address(self.values[i].name), self.signature.dtypes[self.values[i].name]) for i in self.p.inputs
        ]
        loads += [(i, self.output_address(k), self.signature.outputs[k]) for i, k in self.p.reloads]
        arrays = [(f"a{i}", place, dtype, self.name_of(i)) for i, place, dtype in loads]
        arrays += [
            (f"o{k}", self.output_address(k), self.signature.outputs[k], self.program.outputs[k].name) for k in stored
        ]
        variables = [self.variable(entry) for entry in entries]
        block, reductions = TUNED[kind_of(self.signature, self.p)].block, self.p.reductions
        lines = ["chunk = tl.program_id(0)"]
        if self.number == len(plan(self.signature)) - 1:
            lines += ["if chunk < n_counters:", "    _count(counters + chunk)"]
        lines.append("leaf = tl.load(chunks + 2 * chunk)")
        length = f"blocks * {block}" if reductions else f"{block}"
        lines.append(f"start = tl.load(chunks + 2 * chunk + 1).to(tl.int64) * {length}")
        lines += ["left = tl.load(leaf_size + leaf) - start", *(self.own() if entries else [])]
        lines += [f"{x} = _array({place}, {TYPES[d]}, ALIGNED) + start  # {name}" for x, place, d, name in arrays]
        for entry, x in zip(entries, variables, strict=True):
            condition = " != 0" if self.values[entry.value].boolean else ""
            lines.append(f"{x} = tl.load({self.place(entry)}){condition}")

        def call(ahead: str, left: str, whole: bool) -> str:
            pointers = [f"{x}{ahead}" for x, *_ in arrays]
            arguments = ", ".join([*pointers, *variables, left, f"{block}", f"{whole}"])
            results = ", ".join(f"x{r}" for r in reductions)
            return f"{results}{' = ' if reductions else ''}_elements_{self.number}({arguments})"

        if not reductions:
            lines += [f"if left >= {block}:", f"    {call('', f'{block}', True)}", "else:"]
            lines.append(f"    {call('', 'left.to(tl.int32)', False)}")
        else:
            for r in reductions:
                lines.append(f"t{r} = tl.full(({block},), {self.identity(r)}, tl.float64)")
            folds = [f"    t{r} = {self.folded(r)}" for r in reductions]
            lines.append(f"whole = tl.minimum(left // {block}, blocks).to(tl.int32)")
            lines += ["for k in range(0, whole):", f"    {call(f' + k * {block}', f'{block}', True)}", *folds]
            lines += [f"rest = left - whole * {block}", "if (whole < blocks) & (rest > 0):"]
            lines += [f"    {call(f' + whole * {block}', 'rest.to(tl.int32)', False)}", *folds]
            for r in reductions:
                base = f"tl.load(partials + {self.program.reductions.index(r)}).to(tl.pointer_type(tl.float64))"
                total = "tl.sum" if self.values[r].reduction == "sum" else "_amax"
                lines.append(f"tl.store({base} + first_partial + chunk, {total}(t{r}))")
        kernel = _kernel(f"pass_{self.number}", PASS, ["ALIGNED"], lines)
        names = [*[x for x, *_ in arrays], *variables, "left"]
        return f"{self.block(names, loads, stored)}\n\n{kernel}"

    def name_of(self, i: int) -> str:
        """The name of an array that a pass loads."""
        return self.values[i].name or next(self.program.outputs[k].name for j, k in self.p.reloads if j == i)

    def variable(self, entry: Entry) -> str:
        """The variable of an entry."""
        return {"single": f"s{entry.value}", "double": f"d{entry.value}"}.get(entry.kind, f"{entry.kind}{entry.value}")

    def block(self, names: Sequence[str], loads: Sequence[tuple[int, str, torch.dtype]], stored: Sequence[int]) -> str:
        """The function of one block of elements."""
        p, compute = self.p, self.compute
        lines = ["i = tl.arange(0, BLOCK)", "inside = tl.full((BLOCK,), True, tl.int1) if WHOLE else i < left"]
        lines += self.constants(stored)
        lines += [f"v{i} = tl.load(a{i} + i, inside, 0.0).to({compute})" for i, *_ in loads]
        lines += [f"v{i} = {self.element(i)}" for i in p.body]
        lines += [f"w{i} = {self.expression(i, True, True)}" for i in p.wide]
        for k in stored:
            i, dtype = self.program.outputs[k].value, self.signature.outputs[k]
            x = self.operand(i)
            x = f"({x} + tl.zeros((BLOCK,), {compute}))" if self.values[i].uniform else x
            lines.append(f"tl.store(o{k} + i, {_stored(x, dtype)}, inside)")
        if p.reductions:
            results = [
                f"tl.where(inside, {self.operand(self.values[r].args[0], True, True)}, {self.identity(r)})"
                for r in p.reductions
            ]
            lines.append(f"return {', '.join(results)}")
        arguments = ", ".join([*names, "BLOCK: tl.constexpr", "WHOLE: tl.constexpr"])
        body = "\n".join(f"    {x}" for x in lines)
        return f"@triton.jit\ndef _elements_{self.number}({arguments}):\n{body}\n"

    def constants(self, stored: Sequence[int]) -> list[str]:
        """The statements of constants, in the dtypes that they are needed in."""
        single = {a for i in self.p.body for a in self.values[i].args if "double" not in kinds_of(self.signature, i)}
        single |= {self.program.outputs[k].value for k in stored}
        double = {a for i in self.p.body for a in self.values[i].args if "double" in kinds_of(self.signature, i)}
        double |= {a for i in self.p.wide for a in self.values[i].args}
        kinds = ((single, "s", self.compute), (double, "d", "tl.float64"))
        return [
            f"{x}{i} = {_literal(self.values[i].const, dtype)}"
            for needed, x, dtype in kinds
            for i in sorted(needed)
            if self.values[i].op == "const"
        ]

    def identity(self, r: int) -> str:
        """The identity of a reduction."""
        return f'float("{REDUCTIONS[self.values[r].reduction].identity!r}")'

    def folded(self, r: int) -> str:
        """The expression of a reduction so far and one more block."""
        kind = self.values[r].reduction
        return f"t{r} + x{r}" if kind == "sum" else f"tl.where((x{r} > t{r}) | (x{r} != x{r}), x{r}, t{r})"

    def operand(self, i: int, double: bool = False, wide: bool = False) -> str:
        """The expression of an operand, in the dtype of the elements or in double precision."""
        value = self.values[i]
        if value.uniform:
            return f"d{i}" if double else f"s{i}"
        if wide and i in self.signature.wide:
            return f"w{i}"
        return f"v{i}.to(tl.float64)" if double and not value.boolean else f"v{i}"

    def expression(self, i: int, double: bool, wide: bool = False) -> str:
        """The expression of a value of an element."""
        operands = [self.operand(a, double, wide) for a in self.values[i].args]
        dtype = "tl.float64" if double else self.compute
        return OPS[self.values[i].op].triton.format(*operands, T=dtype, E=self.compute)

    def element(self, i: int) -> str:
        """The expression of a value of an element, in the dtype of the elements."""
        kinds = kinds_of(self.signature, i)
        if kinds == ("single",):
            return self.expression(i, False)
        if kinds == ("double",):
            return f"({self.expression(i, True)}).to({self.compute})"
        op, (x, y) = self.values[i].op, self.values[i].args
        first = self.values[x].uniform
        number, v = (x, self.operand(y)) if first else (y, self.operand(x))
        a, b = [f"{kind}{number}" for kind in kinds]
        forms = {
            ("mul", False): f"{v} * {a} * {b}",
            ("mul", True): f"{v} * {a} * {b}",
            ("div", False): f"_div(_div({v}, {a}), {b})",
            ("div", True): f"_div({a}, {v}) * {b}",
            ("add", False): f"({v} + {a}) + {b}",
            ("add", True): f"({v} + {a}) + {b}",
            ("sub", False): f"({v} - {a}) - {b}",
            ("sub", True): f"({a} - {v}) + {b}",
        }
        return forms[op, first]
