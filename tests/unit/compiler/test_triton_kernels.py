"""The kernels of Triton, in its interpreter: which there are, and what they compute that C computes in another way."""

import math
from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.backends import only
from _lib.marks import INTERPRETER
from _lib.programs import device_of, run_program
from functional_optim._compiler.trace import Tracer
from functional_optim._compiler.triton import emit
from functional_optim._compiler.triton.kernels import triton_kernels
from functional_optim._compiler.triton.tuning import CHUNK, MAX_PARTIALS, TUNED, chunk_size


pytestmark = [INTERPRETER, pytest.mark.triton]


@fo.elementwise(state={"norm": fo.slot(0.0, per="leaf")})
def watched(u: Any, norm: Any) -> Any:
    """A rule that keeps a norm, which nothing else needs."""
    return u, fo.leaf_norm(u)


def kernels(tx: fo.GradientTransformation) -> list[str]:
    """The kernels of the one program of a transformation, in order."""
    [kernel] = fo.explain(tx, torch.zeros(8)).kernels
    names = []
    for stage in triton_kernels(kernel.signature).stages:
        names += [x.name for x in (stage.uniform, stage.elements) if x is not None]
    assert len(names) == emit.launches(kernel.signature)
    return names


def test_a_program_has_the_kernels_that_it_needs() -> None:
    clipped = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-3))
    assert kernels(fo.zero_nans()) == ["pass_0", "uniform_1"]
    assert kernels(fo.adamw(1e-3)) == ["uniform_0", "pass_0"]
    assert kernels(clipped) == ["pass_0", "uniform_1", "pass_1"]
    assert kernels(fo.lamb(1e-3)) == ["uniform_0", "pass_0", "uniform_1", "pass_1"]
    assert kernels(watched()) == ["pass_0", "uniform_1"]


def test_a_stage_without_elements() -> None:
    tx, g = watched(), torch.linspace(-1, 1, 5000, device=device_of("triton"))
    with only("triton"):
        updates, state = tx.update(g, tx.init(g))
    torch.testing.assert_close(updates, g, rtol=0, atol=0)
    torch.testing.assert_close(state.norm.double(), torch.linalg.vector_norm(g.double()), rtol=2**-24, atol=0)


NUMBERS = (0.0, 1e-45, 1e-39, 1e-20, 1 / 3, 1.0, 2.5, 1e20, 3e38)
LARGE = (0.0, 1e-70, 1e-60, 1e-39, 1 / 3, -0.7, 1e30, 1e60, -1e70, math.inf, math.nan)  # within 2**-240 and 2**240
FORMS: dict[str, Any] = {
    "x * n": lambda x, n: x * n,
    "x / n": lambda x, n: x / n,
    "n / x": lambda x, n: n / x,
    "x + n": lambda x, n: x + n,
    "n + x": lambda x, n: n + x,
    "x - n": lambda x, n: x - n,
    "n - x": lambda x, n: n - x,
    "larger": lambda x, n: torch.maximum(x, n),
    "chosen": lambda x, n: torch.where(n > 1, n, x),
    "repeated": lambda x, n: torch.where(x == x, n, x),
    "lerp": lambda x, n: torch.lerp(x, n, 0.25),
}


def test_an_element_and_a_number_that_follows_from_a_reduction() -> None:
    """As in double precision, within one unit of float32: the numbers are out of its range, or have more digits."""
    tracer = Tracer()
    x, number = tracer.input("array", "x"), tracer.input("scalar", "number")
    n = fo.leaf_amax(torch.ones_like(x) + 0 * x) * number
    program = tracer.finish({name: of(x, n) for name, of in FORMS.items()})
    elements = torch.tensor([s * x for x in NUMBERS for s in (1, -1)])
    near = [-1 / 3 + k * 2**-30 for k in range(-5, 5)]  # for sums that cancel
    numbers = torch.tensor([*LARGE, *near], dtype=torch.float64)
    leaves = [elements] * len(numbers)
    columns: Any = {"updates": leaves, "x": leaves, **{name: list(map(torch.empty_like, leaves)) for name in FORMS}}
    results = run_program("triton", program, columns, {"number": numbers.tolist()})

    for name, of in FORMS.items():
        for n, actual in zip(numbers, results[name], strict=True):
            expected = of(elements.double(), n).float()
            torch.testing.assert_close(actual, expected, rtol=2**-23, atol=2**-149, equal_nan=True, msg=f"{name} {n}")


def test_chunks_of_reductions() -> None:
    for n in (0, 1, CHUNK * MAX_PARTIALS, CHUNK * MAX_PARTIALS + 1, 2**33 + 5):
        chunk = chunk_size(n)
        assert -(-n // chunk) <= MAX_PARTIALS
        assert all(chunk % tuning.block == 0 for tuning in TUNED.values())
    assert chunk_size(CHUNK * MAX_PARTIALS) == CHUNK
