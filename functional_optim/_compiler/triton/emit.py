"""Emit one pass of a program as Triton: each program instance updates one chunk of one leaf.

All that varies is in tables on the device: addresses, sizes, chunks, and a row of scalars per group of
hyper-parameters. Uniform values are computed in double precision at the start of each instance; a reduction ends
there too, by adding the partial results of the pass before, in order, so no further launch is needed.
"""

import torch

from ..ops import OPS, REDUCTIONS
from ..passes import Pass, Signature, plan, plan_prologues
from ..program import Level


TYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.int64: "tl.int64",  # counters
}

# fp32 division and square root are approximate in Triton unless asked for by these names
HEADER = """\
import triton
import triton.language as tl


@triton.jit
def _div(x, y):
    z = x / y
    if z.dtype == tl.float32:
        z = tl.div_rn(x, y)
    return z


@triton.jit
def _sqrt(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    return tl.sqrt(x)


@triton.jit
def _pow(x, y):
    # in double precision: exp2(y * log2 |x|), with the sign of an odd integer power of a negative number
    a = x.to(tl.float64)
    b = y.to(tl.float64)
    z = tl.exp2(b * tl.log2(tl.abs(a)))
    whole = tl.floor(b) == b
    odd = tl.floor(b * 0.5) * 2.0 != b
    z = tl.where(a < 0, tl.where(whole, tl.where(odd, -z, z), float("nan")), z)
    z = tl.where(b == 0, 1.0, tl.where(a == 1, 1.0, z))
    return z.to((x + y).dtype)


@triton.jit
def _copysign(x, y):
    # by the bit, which -0.0 and NaN have too
    if x.dtype == tl.float32:
        size = x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
        z = (size | (y.to(tl.uint32, bitcast=True) & 0x80000000)).to(tl.float32, bitcast=True)
    else:
        size = (x.to(tl.uint64, bitcast=True) << 1) >> 1
        z = (size | ((y.to(tl.uint64, bitcast=True) >> 63) << 63)).to(tl.float64, bitcast=True)
    return z


@triton.jit
def _round(x):
    # half to even
    a = tl.abs(x)
    down = tl.floor(a)
    rest = a - down
    even = tl.where(tl.floor(down * 0.5) * 2.0 == down, down, down + 1.0)
    return _copysign(tl.where(rest < 0.5, down, tl.where(rest > 0.5, down + 1.0, even)), x)


@triton.jit
def _fmod(x, y):
    # The remainder of |x| by |y| times powers of 2**24, down to |y| itself, each to the nearest. All of it is exact: a
    # quotient of 24 bits times either half of the divisor, and the rest, which is a multiple of the divisor's last bit.
    a = tl.abs(x.to(tl.float64))
    b = tl.abs(y.to(tl.float64))
    good = tl.where(a < float("inf"), b, float("nan")) > 0
    some = tl.where(good, a, float("nan")) >= b
    rest = tl.where(some, a, 0.0)
    divisor = tl.where(some, b, 1.0)
    steps = tl.where(some, tl.floor((tl.log2(a) - tl.log2(b)) / 24.0), 0.0).to(tl.int32)
    if steps.type.is_block():
        steps = tl.max(steps)
    for k in range(0, steps + 1):
        quarter = tl.exp2(((steps - k) * 6).to(tl.float64))
        multiple = divisor * quarter * quarter * quarter * quarter
        multiple = tl.where(multiple < float("inf"), multiple, 0.0)
        high = ((multiple.to(tl.uint64, bitcast=True) >> 27) << 27).to(tl.float64, bitcast=True)
        quotient = tl.where(multiple > 0, tl.floor(rest / tl.where(multiple > 0, multiple, 1.0) + 0.5), 0.0)
        half = quotient * 0.5 * high  # the whole may be infinite
        rest = ((rest - half) - half) - quotient * (multiple - high)
    rest = tl.where(some, tl.where(rest < 0, rest + divisor, rest), a)
    return _copysign(tl.where(good, rest, float("nan")).to(x.dtype), x)


@triton.jit
def _atan2(y, x):
    # in double precision: the angle below pi / 4, halved twice, has a tangent of at most 0.2 for the series
    a = tl.abs(y.to(tl.float64))
    b = tl.abs(x.to(tl.float64))
    least = tl.where(a < b, a, b)
    most = tl.where(a < b, b, a)
    t = tl.where(least == most, tl.where(most == 0, 0.0, 1.0), least / most)
    h = t / (1.0 + tl.sqrt(1.0 + t * t))
    h = h / (1.0 + tl.sqrt(1.0 + h * h))
    z = h * h
    series = 0.0 * z
    for k in tl.static_range(11, -1, -1):
        series = 1.0 / (2 * k + 1) - z * series
    angle = tl.where(t < 1e-8, t, 4.0 * h * series)
    angle = tl.where(a > b, 1.5707963267948966 - angle, angle)
    angle = tl.where(_copysign(tl.full((), 1.0, tl.float64), x.to(tl.float64)) < 0, 3.141592653589793 - angle, angle)
    return _copysign(angle.to(y.dtype), y)


@triton.jit
def _hypot(x, y):
    a = tl.abs(x.to(tl.float64))
    b = tl.abs(y.to(tl.float64))
    most = tl.where(a < b, b, a)
    t = tl.where(a < b, a, b) / tl.where(most == 0, 1.0, most)
    z = most * tl.sqrt(1.0 + t * t)
    z = tl.where(a == float("inf"), a, tl.where(b == float("inf"), b, z))
    return z.to((x + y).dtype)


@triton.jit
def _cosh(x):
    e = tl.exp(tl.abs(x.to(tl.float64)) * 0.5)  # squared at the end, where exp(|x|) would overflow
    return (0.5 * e * e + 0.5 / e / e).to(x.dtype)


@triton.jit
def _sinh(x):
    # in double precision; a series where the difference would cancel
    a = tl.abs(x.to(tl.float64))
    e = tl.exp(a * 0.5)
    z = a * a
    series = 0.0 * z
    for k in tl.static_range(9, -1, -1):
        series = 1.0 + z * series / ((2 * k + 2) * (2 * k + 3))
    return _copysign(tl.where(a < 1, a * series, 0.5 * e * e - 0.5 / e / e).to(x.dtype), x)


@triton.jit
def _bf16(x):
    # round to nearest even by hand, because a conversion may truncate
    u = x.to(tl.float32).to(tl.uint32, bitcast=True)
    r = (u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, r.to(tl.float32, bitcast=True), float("nan"))


@triton.jit
def _total_sum(start, n, BLOCK: tl.constexpr):
    y = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, n, BLOCK):
        k = i + tl.arange(0, BLOCK)
        y += tl.load(start + k, k < n, 0.0)
    return tl.sum(y)


@triton.jit
def _amax(x):
    bad = tl.sum((x != x).to(tl.int32))
    y = tl.max(tl.where(x != x, float("-inf"), x))
    return tl.where(bad > 0, float("nan"), y)


@triton.jit
def _total_amax(start, n, BLOCK: tl.constexpr):
    y = tl.full((BLOCK,), float("-inf"), tl.float64)
    for i in range(0, n, BLOCK):
        k = i + tl.arange(0, BLOCK)
        x = tl.load(start + k, k < n, float("-inf"))
        y = tl.where((x > y) | (x != x), x, y)
    return _amax(y)
"""


def emit_triton(signature: Signature) -> str:
    """The Triton source of all passes of a program: kernels `pass_0`, `pass_1`, ..."""
    description = "\n".join(f"# {line}" for line in str(signature.program).splitlines())
    functions = []
    for k, p in enumerate(plan(signature)):
        if k and plan_prologues(signature)[k - 1].carried:
            functions.append(_before(signature, k))
        functions.append(_pass(signature, p, k))
    return f"{description}\n{HEADER}\n\n" + "\n\n".join(functions)


def _literal(x: float, dtype: str) -> str:
    return f'tl.full((), float("{x!r}"), {dtype})'


TABLES = "columns, scalars, partials, leaf_size, leaf_chunk, n_leaves, n_partials, first_partial"


def _address(column: int, dtype: torch.dtype) -> str:
    return f"tl.load(columns + {column} * n_leaves + leaf).to(tl.pointer_type({TYPES[dtype]}))"


def _uniform(signature: Signature, i: int) -> str:
    """The statement that computes a uniform value, in double precision."""
    program = signature.program
    value = program.values[i]
    match value.op:
        case "const":
            code = _literal(value.const, "tl.float64")
        case "scalar":
            code = f"tl.load(scalars + row * {len(program.scalars)} + {program.scalars.index(value.name)})"
        case "size":
            code = "tl.load(leaf_size + leaf).to(tl.float64)"
        case "leaf":
            column = len(program.arrays) + program.leaves.index(value.name)
            code = f"tl.load({_address(column, signature.dtypes[value.name])}).to(tl.float64)"
        case _ if value.reduction:
            base = f"tl.load(partials + {program.reductions.index(i)}).to(tl.pointer_type(tl.float64))"
            first = "tl.load(leaf_chunk + leaf)"
            parts = (
                f"{base}, n_partials"
                if value.op.startswith("tree_")
                else f"{base} + first_partial + {first}, tl.load(leaf_chunk + leaf + 1) - {first}"
            )
            code = f"_total_{value.reduction}({parts}, BLOCK)"
        case _:
            code = OPS[value.op].triton.format(*[f"u{a}" for a in value.args], T="tl.float64")
    return f"u{i} = {code}"


def _prologue(signature: Signature, number: int) -> list[str]:
    """Statements that compute the uniform values of a pass, from values that earlier passes compute as well."""
    values, p = signature.program.values, plan(signature)[number]
    new = plan_prologues(signature)[number].new
    needed = {a for i in (*new, *p.body, *p.wide) if not values[i].reduction for a in values[i].args}
    needed |= {signature.program.outputs[k].value for k in p.stores}
    constants = [i for i in sorted(needed) if values[i].op == "const"]
    before = plan_prologues(signature)[number - 1].carried if number else ()
    lines = [f"{', '.join(f'u{i}' for i in before)} = _before_{number}(leaf, row, {TABLES}, BLOCK)"] if before else []
    return lines + [_uniform(signature, i) for i in (*constants, *new)]


def _before(signature: Signature, number: int) -> str:
    """A function of the uniform values that passes before one compute and that it or a later one needs."""
    carried = plan_prologues(signature)[number - 1].carried
    lines = [*_prologue(signature, number - 1), f"return {', '.join(f'u{i}' for i in carried)}"]
    body = "\n".join(f"    {x}" for x in lines)
    return f"@triton.jit\ndef _before_{number}(leaf, row, {TABLES}, BLOCK: tl.constexpr):\n{body}\n"


def _pass(signature: Signature, p: Pass, number: int) -> str:
    program = signature.program
    values = program.values
    compute = TYPES[signature.compute]
    names = (*program.arrays, *program.leaves)
    lines = ["chunk = tl.program_id(0).to(tl.int64)", "leaf = tl.load(chunk_leaf + chunk)"]
    lines += [
        "start = tl.load(chunk_start + chunk)",
        "stop = tl.load(chunk_stop + chunk)",
        "row = tl.load(leaf_row + leaf)",
        *_prologue(signature, number),
    ]
    elementwise = {a for i in set(p.body) - signature.rounded for a in values[i].args}
    elementwise |= {program.outputs[k].value for k in p.stores}
    for i in p.uniforms:
        if i in elementwise:
            lines.append(f"s{i} = u{i}" if values[i].boolean else f"s{i} = u{i}.to({compute})")

    def operand(i: int, double: bool = False, wide: bool = False) -> str:
        if values[i].uniform:
            return f"u{i}" if double else f"s{i}"
        if wide and i in signature.wide:
            return f"w{i}"
        return f"v{i}.to(tl.float64)" if double and not values[i].boolean else f"v{i}"

    def expression(i: int, double: bool, wide: bool = False) -> str:
        operands = [operand(a, double, wide) for a in values[i].args]
        return OPS[values[i].op].triton.format(*operands, T="tl.float64" if double else compute)

    body = ["i = start + base + tl.arange(0, BLOCK)", "inside = i < stop"]
    for i in p.inputs:
        name = values[i].name
        lines.append(f"a{i} = {_address(names.index(name), signature.dtypes[name])}  # {name}")
        body.append(f"v{i} = tl.load(a{i} + i, inside, 0.0).to({compute})")
    for i, k in p.reloads:
        lines.append(f"a{i} = {_address(len(names) + k, signature.outputs[k])}  # {program.outputs[k].name}")
        body.append(f"v{i} = tl.load(a{i} + i, inside, 0.0).to({compute})")
    for i in p.body:
        exact = i in signature.rounded
        body.append(f"v{i} = ({expression(i, True)}).to({compute})" if exact else f"v{i} = {expression(i, False)}")
    body += [f"w{i} = {expression(i, True, True)}" for i in p.wide]
    tail = []
    for k in p.stores:
        output, dtype = program.outputs[k], signature.outputs[k]
        lines.append(f"o{k} = {_address(len(names) + k, dtype)}  # {output.name}")
        if output.level is Level.ELEMENT:
            x = operand(output.value)
            x = f"_bf16({x})" if dtype is torch.bfloat16 else x
            x = f"({x}).to(tl.float32)" if dtype is torch.float16 else x  # torch rounds a double twice, too
            body.append(
                f"tl.store(o{k} + i, ({x} + tl.zeros((BLOCK,), {compute})).to({TYPES[dtype]}), inside)"
                if values[output.value].uniform
                else f"tl.store(o{k} + i, ({x}).to({TYPES[dtype]}), inside)"
            )
        else:
            tail.append(f"tl.store(o{k}, u{output.value}.to({TYPES[dtype]}), start == 0)")
    for r in p.reductions:
        kind = values[r].reduction
        identity = f'float("{REDUCTIONS[kind].identity!r}")'
        lines.append(f"t{r} = tl.full((BLOCK,), {identity}, tl.float64)")
        x = f"tl.where(inside, {operand(values[r].args[0], True, True)}, {identity})"
        body.append(f"x{r} = {x}")
        body.append(
            f"t{r} += x{r}" if kind == "sum" else f"t{r} = tl.where((x{r} > t{r}) | (x{r} != x{r}), x{r}, t{r})"
        )
        place = (
            f"tl.load(partials + {program.reductions.index(r)}).to(tl.pointer_type(tl.float64)) + first_partial + chunk"
        )
        tail.append(f"tl.store({place}, {'tl.sum' if kind == 'sum' else '_amax'}(t{r}))")
    arguments = (
        "chunk_leaf, chunk_start, chunk_stop, leaf_chunk, leaf_size, leaf_row, columns, scalars, partials, "
        "n_leaves, n_partials, first_partial, BLOCK: tl.constexpr"
    )
    # one kernel for any number of leaves: 1 and multiples of 16 get none of their own
    jit = '@triton.jit(do_not_specialize=["n_leaves", "n_partials", "first_partial"])'
    text = [f"{jit}\ndef pass_{number}({arguments}):"]
    text += [f"    {x}" for x in lines]
    text += ["    for base in range(0, stop - start, BLOCK):"] + [f"        {x}" for x in body]
    text += [f"    {x}" for x in tail]
    return "\n".join(text) + "\n"
