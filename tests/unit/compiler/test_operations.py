"""Every operation that a rule may use, on every backend, against torch itself.

A case is a function that a rule could contain. It is called twice: with symbols, which makes a program that a backend
runs, and with tensors, which is what torch computes.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy
import pytest
import torch

import functional_optim as fo
from _lib.floats import fma
from _lib.marks import INTERPRETER, OPTIMIZED
from _lib.operations import (
    ARITHMETIC,
    CASES,
    DTYPES,
    F32,
    F64,
    LEAF_REDUCTIONS,
    LIBRARY,
    ON_EVERY_BACKEND,
    TREE_REDUCTIONS,
    TRUTH,
    ULPS,
    Case,
    assert_within,
    run,
    specials,
)
from functional_optim._compiler import symbols
from functional_optim._compiler.ops import OPS
from functional_optim._compiler.rewrites import REWRITES
from functional_optim._compiler.trace import Tracer
from functional_optim._runtime.backend import enable_backends


# -- cases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPS)
def test_operations_have_as_many_operands_as_they_say(name: str) -> None:
    """Each is used in one text at least, and none beyond them."""
    op = OPS[name]
    used = {int(k) for text in (op.c, op.triton) for k in re.findall(r"\{(\d)\}", text)}
    assert used == {*range(op.arity)}


def test_cases_cover_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case named after an operation does record that name, so nothing in the table goes untested."""
    tested: set[str] = set()
    record = symbols._record

    def spy(name: str, *args: Any, **kwargs: Any) -> Any:
        recorded.append(name.strip("_"))
        return record(name, *args, **kwargs)

    monkeypatch.setattr(symbols, "_record", spy)
    for label, case in (CASES | LEAF_REDUCTIONS | TREE_REDUCTIONS).items():
        recorded: list[str] = []
        tracer = Tracer()
        case.of(*(tracer.input("array", x) for x in "xyzw"[: case.arity]))
        ops = {v.op for v in tracer.values}
        tested |= {label.partition("/")[0]} & ({*recorded} | ops)

    # results of reductions over uniform values, and a part of Adam that is tested in its place
    assert {*OPS, *REWRITES} - tested == {"broadcast", "fused_weight"}


# torch's fused kernels on CUDA
ON_CUDA: dict[str, Callable[..., Any]] = {
    "fused_mean": lambda m, u, b, c: fma(b, m, fma(-b, u, u)),
    "fused_mean_square": lambda v, u, b, c: fma(b, v, fma(-b, u * u, u * u)),
    "fused_shrink": lambda p, r, c: fma(-r, p, p),
}


# torch's vector code has NaN for the remainder where the quotient overflows; its scalar code, NumPy and C have it.
def _fmod(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(numpy.fmod(x.numpy(), y.numpy()))


def _remainder(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    rest = _fmod(x, y)
    return torch.where((rest != 0) & ((rest < 0) != (y < 0)), rest + y, rest)


EXACT: dict[str, Callable[..., Any]] = {
    "fmod": _fmod,
    "remainder": _remainder,
    "mod": _remainder,
    "floordiv": lambda x, y: torch.from_numpy(numpy.floor_divide(x.numpy(), y.numpy())),
    "floor_divide": lambda x, y: torch.from_numpy(numpy.floor_divide(x.numpy(), y.numpy())),
    "div/floor": lambda x, y: torch.from_numpy(numpy.floor_divide(x.numpy(), y.numpy())),
    "mod/number": lambda x: _remainder(torch.full_like(x, 2.5), x),
}


# -- operands -----------------------------------------------------------------------------------------------------


def pick(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Four rows of `n` special numbers."""
    chosen = torch.randint(len(specials(dtype)), (4, n), generator=torch.Generator().manual_seed(seed))
    return specials(dtype)[chosen]


@functools.cache
def elements(dtype: torch.dtype) -> torch.Tensor:
    """One leaf: all pairs of special numbers in the first two operands, then random ones of any size."""
    special = specials(dtype)
    pairs = torch.cartesian_prod(special, special).t()
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(4, 1000, generator=generator, dtype=dtype)
    normal[:, 500:] *= 10 ** (60 * torch.rand(4, 500, generator=generator, dtype=dtype) - 30)
    return torch.cat([torch.cat([pairs, pick(pairs.shape[1], dtype, 2)[2:]]), normal], 1)[:, None]


@functools.cache
def leaves_of_one(dtype: torch.dtype) -> torch.Tensor:
    """Many leaves of one element."""
    rows = pick(80, dtype, 3)
    rows[0, : len(specials(dtype))] = specials(dtype)
    return rows[:, :, None]


@functools.cache
def few_leaves(dtype: torch.dtype) -> torch.Tensor:
    """Some leaves of all special numbers in the first operand, with the same other ones for all elements."""
    special = specials(dtype)
    rows = pick(12, dtype, 4)[:, :, None].repeat(1, 1, len(special))
    rows[0] = special
    return rows


@functools.cache
def few_leaves_left(dtype: torch.dtype) -> torch.Tensor:
    """The same, with the first two operands exchanged."""
    return few_leaves(dtype)[[1, 0, 2, 3]]


class Pattern(NamedTuple):
    """The operands that are one number for a whole leaf, and so computed with in the prologue.

    Args:
      uniform: those of x, y, z and w.
      operands: makes them, of shape (4, leaves, elements).
      cases: what is computed.
    """

    uniform: str
    operands: Callable[[torch.dtype], torch.Tensor]
    cases: Mapping[str, Case]


SIDES = ("right", "left")  # of an operator, on which a uniform value stands
OPERATORS = {name: case for name, case in (ARITHMETIC | TRUTH | LIBRARY).items() if case.arity > 1}
PATTERNS = {
    "elements": Pattern("", elements, CASES),
    "uniform": Pattern("xyzw", leaves_of_one, CASES),
    "right": Pattern("yzw", few_leaves, OPERATORS),
    "left": Pattern("x", few_leaves_left, {k: c for k, c in OPERATORS.items() if c.arity < 4}),
}


# -- running a program --------------------------------------------------------------------------------------------


@functools.cache
def run_cases(backend: str, dtype: torch.dtype, pattern: str, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Evaluates some cases of a pattern as one program; without results if that is not possible."""
    uniform, _, cases = PATTERNS[pattern]
    xs = dict(zip("xyzw", operands(backend, dtype, pattern), strict=True))
    try:
        results = run(
            backend,
            {name: (cases[name].arity, cases[name].of) for name in names},
            xs["x"].unbind(),
            {name: x.unbind() for name, x in xs.items() if name not in uniform},
            {name: x[:, 0].tolist() for name, x in xs.items() if name in uniform},
            dtype,
            F32 if pattern == "uniform" else dtype,
            per_leaf=pattern == "uniform",
        )
    except Exception:
        if len(names) == 1:
            raise
        enable_backends()
        return {}
    return {name: torch.stack(list(column)) for name, column in results.items()}


def actual(backend: str, dtype: torch.dtype, pattern: str, name: str) -> torch.Tensor:
    """Results of a backend. All cases are one program, which is much faster, unless one of them breaks it."""
    results = run_cases(backend, dtype, pattern, tuple(PATTERNS[pattern].cases))
    return results[name] if results else run_cases(backend, dtype, pattern, (name,))[name]


def operands(backend: str, dtype: torch.dtype, pattern: str) -> torch.Tensor:
    """The operands of a pattern."""
    xs = PATTERNS[pattern].operands(dtype)
    # for Triton, uniform values are the same text as elements, which is what Triton's interpreter is so slow to read
    return xs[:, ::8] if backend == "triton" and pattern == "uniform" else xs


def expected(backend: str, dtype: torch.dtype, pattern: str, name: str) -> torch.Tensor:
    """Results of torch."""
    case = PATTERNS[pattern].cases[name]
    of = (ON_CUDA.get(name) if backend == "triton" else None) or case.torch or case.of
    if name == "fused_number" and backend == "triton" and pattern == "uniform":
        of = torch.Tensor.float  # the dtype that elements are computed in
    if name in EXACT and (backend in ("c", "triton") or pattern == "uniform"):
        of = EXACT[name]
    result: torch.Tensor = of(*operands(backend, dtype, pattern)[: case.arity])
    return result.to(dtype)


def allowed(backend: str, kind: str, dtype: torch.dtype) -> int:
    """The tolerance of a kind of operation."""
    return ULPS[kind][backend if backend in ("c", "triton") else "torch"][dtype is F64]


pytestmark = [INTERPRETER, OPTIMIZED]


@ON_EVERY_BACKEND
@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_operations_on_elements(backend: str, dtype: torch.dtype, name: str) -> None:
    assert_within(
        actual(backend, dtype, "elements", name),
        expected(backend, dtype, "elements", name),
        allowed(backend, CASES[name].kind, dtype),
        CASES[name].any_zero,
    )


@ON_EVERY_BACKEND
@pytest.mark.parametrize("name", CASES)
def test_uniform_values_are_computed_in_double_precision(backend: str, name: str) -> None:
    """Also where elements are computed in float32."""
    assert_within(
        actual(backend, F64, "uniform", name),
        expected(backend, F64, "uniform", name),
        allowed(backend, CASES[name].kind, F64),
        CASES[name].any_zero,
    )


@ON_EVERY_BACKEND
@DTYPES
@pytest.mark.parametrize(("pattern", "name"), [(side, name) for side in SIDES for name in PATTERNS[side].cases])
def test_operations_on_an_element_and_a_uniform_value(
    backend: str, dtype: torch.dtype, pattern: str, name: str
) -> None:
    assert_within(
        actual(backend, dtype, pattern, name),
        expected(backend, dtype, pattern, name),
        allowed(backend, CASES[name].kind, dtype),
        CASES[name].any_zero,
    )


DIFFERENTIABLE = {
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "round": torch.round,
    "frac": torch.frac,
    "fmod": torch.fmod,
    "remainder": torch.remainder,
    "copysign": torch.copysign,
    "relu": torch.relu,
    "erf": torch.erf,
    "log10": torch.log10,
    "tan": torch.tan,
    "atan": torch.atan,
    "atan2": torch.atan2,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "hypot": torch.hypot,
    "logaddexp": torch.logaddexp,
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives_of_operations_are_those_of_torch(name: str) -> None:
    of, arity = DIFFERENTIABLE[name], CASES[name].arity
    xs = torch.tensor([[-2.5, -1.25, -0.5, 0.0, 0.75, 1.5, 3.25], [2.0, -0.5, 0.75, -2.0, 1.5, 1.5, -2.0]], dtype=F64)
    grads, params = (x.clone().requires_grad_() for x in xs)
    rule = fo.elementwise(lambda u, p: of(*(u, p)[:arity]) + 0 * p)()
    u, p = (x.clone().requires_grad_() for x in xs)
    (of(*(u, p)[:arity]) + 0 * p).sum().backward()

    updates, _ = rule.update(grads, rule.init(params), params)
    updates.sum().backward()

    # two formulas for one derivative round a few times each
    torch.testing.assert_close((grads.grad, params.grad), (u.grad, p.grad), rtol=2**-48, atol=2**-52, equal_nan=True)
