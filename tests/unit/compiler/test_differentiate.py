"""Derivatives of programs: of each operation, against autograd through its eager column, and of whole programs."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from _lib.programs import run_program
from functional_optim._compiler.differentiate import RULES, NoDerivative, differentiate, differentiate_all
from functional_optim._compiler.ops import OPS
from functional_optim._compiler.program import Program
from functional_optim._compiler.trace import Tracer


F64 = torch.float64
GENERIC = [0.3, -0.7, 1.9, -2.6, 0.05, 3.2]
POSITIVE = [0.3, 0.7, 1.9, 2.6, 0.05, 3.2]
# zeros, and equal operands, where torch has a derivative of its own choice
EDGES = {
    "abs": [[0.0, -1.0]],
    "sqrt": [[0.0, 4.0]],
    "sign": [[0.0, -1.0]],
    "maximum": [[1.0, 0.0], [1.0, -1.0]],
    "minimum": [[1.0, 0.0], [1.0, -1.0]],
    "copysign": [[0.0, 2.0], [-1.0, -1.0]],
    "pow": [[0.0, 0.0, 2.0], [2.0, 0.0, 0.0]],
}
FROM_ZERO = {"sqrt", "rsqrt", "log", "log2", "log1p", "log10", "pow"}  # of positive numbers
DIFFERENTIABLE = [name for name, op in OPS.items() if not op.boolean and name not in ("real", "broadcast")]


def arity(name: str) -> int:
    return OPS[name].arity


def operands(name: str) -> list[list[float]]:
    points = POSITIVE if name in FROM_ZERO else GENERIC
    drawn = [points[k:] + points[:k] for k in range(arity(name))]
    if name == "where":
        drawn[0] = [float(x > 0) for x in drawn[0]]
    return [own + more for own, more in zip(drawn, EDGES.get(name, [[]] * len(drawn)), strict=True)]


def program_of(fn: Callable[..., Any], names: Sequence[str]) -> Program:
    t = Tracer()
    t.input("array", "updates")
    return t.finish({"y": fn(t, *[t.input("array", name) for name in names])})


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives_of_operations_are_those_of_autograd(name: str) -> None:
    values = [torch.tensor(x, dtype=F64) for x in operands(name)]
    names = [f"x{k}" for k in range(len(values))]
    derivative = differentiate(program_of(lambda t, *xs: t.op(name, *xs), names), {"y"}, set(names))
    d = torch.linspace(-1.0, 2.0, len(values[0]), dtype=F64)
    # an output has the dtype of the tensor in its place
    columns = {"updates": [d], "d y": [d], **{n: [x] for n, x in zip(names, values, strict=True)}}
    found = run_program("reference", derivative, {**columns, **{f"d {n}": [d] for n in names}}, {})

    own = [x.clone().requires_grad_() for x in values]
    y = OPS[name].eager(*[x != 0 if name == "where" and k == 0 else x for k, x in enumerate(own)])
    expected = torch.autograd.grad(y, own, d, allow_unused=True)
    for n, x, e in zip(names, values, expected, strict=True):
        torch.testing.assert_close(
            found[f"d {n}"][0], torch.zeros_like(x) if e is None else e, rtol=1e-13, atol=1e-15, equal_nan=True
        )


def test_every_operation_has_a_derivative() -> None:
    assert RULES.keys() == {name for name, op in OPS.items() if not op.boolean}


def test_a_number_gathers_its_cotangent_from_all_elements() -> None:
    t = Tracer()
    u, rate = t.input("array", "updates"), t.input("scalar", "rate")
    derivative = differentiate(t.finish({"y": torch.exp(rate * u)}), {"y"}, {"rate"})
    u = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
    columns = {"updates": [u], "d y": [torch.ones_like(u)], "d rate": [torch.zeros((), dtype=F64)]}
    found = run_program("reference", derivative, columns, {"rate": [0.3]})
    torch.testing.assert_close(found["d rate"][0], (u * torch.exp(0.3 * u)).sum(), rtol=1e-14, atol=0)


def test_a_program_with_a_maximum_over_elements_has_no_derivative() -> None:
    t = Tracer()
    u = t.input("array", "updates")
    program = t.finish({"y": u / t.reduce("leaf_amax", torch.abs(u))})
    with pytest.raises(NoDerivative, match="leaf_amax"):
        differentiate(program, {"y"}, {"updates"})


def test_reductions_over_the_tree_end_in_one_pass_for_all_programs() -> None:
    """One program has more reductions before the one that both have a part in."""
    programs = []
    for inner in (0, 1):
        t = Tracer({"norm": 1 + 1})
        t.scope = "norm"
        u = t.input("array", "updates")
        x = u / t.reduce("leaf_sum", u * u) if inner else u
        programs.append(t.finish({"y": x * t.reduce("tree_sum", x * x)}))
    one = frozenset({"y"}), frozenset({"updates"})
    derivatives = differentiate_all(tuple(programs), (one[0],) * 2, (one[1],) * 2)
    ends = [{v.name: v.stage for v in p.values if v.op == "tree_sum"} for p in derivatives]
    assert ends[0] == ends[1]
    assert len(ends[0]) == 2


def test_cotangents_that_nobody_wants_are_not_computed() -> None:
    t = Tracer()
    u, p = t.input("array", "updates"), t.input("array", "params")
    program = t.finish({"y": torch.sin(u) * p, "z": torch.exp(p)})
    text = str(differentiate(program, {"y"}, {"params"}))
    assert "exp" not in text
    assert "cos" not in text
    assert text.count("array") == 2  # the updates, and the cotangent of `y`
