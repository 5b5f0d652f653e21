"""Loads and stores of narrower types, on every backend, against torch itself."""

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from _lib.marks import INTERPRETER, OPTIMIZED
from _lib.operations import (
    BF16,
    DTYPES,
    F16,
    F32,
    INF,
    ON_EVERY_BACKEND,
    assert_within,
    ordered,
    run,
    specials,
)
from functional_optim._compiler.c.build import find_compiler
from functional_optim._compiler.c.emit import prelude


pytestmark = [INTERPRETER, OPTIMIZED]


HALVES = pytest.mark.parametrize("half", [BF16, F16], ids=["bfloat16", "float16"])


def every(half: torch.dtype) -> torch.Tensor:
    """All 65536 numbers of a half type."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(half)


def around_ties(stored: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """Numbers half way between two neighbours of a narrower type, and those a little before and after."""
    if stored is F32:
        x = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-44, 36).repeat(250)
    else:
        x = every(stored)
    after = torch.nextafter(x.float(), torch.tensor(INF)) if stored is F32 else (ordered(x) + 1).clamp(max=2**15 - 1)
    after = after if stored is F32 else torch.where(after < 0, after ^ (2**15 - 1), after).short().view(stored)
    ties = (x.double() + after.double()) / 2
    ties = ties.to(dtype)[ties.isfinite()]
    nearby = [torch.nextafter(ties, torch.tensor(s * INF, dtype=dtype)) for s in (1, -1)]
    # within a rounding to float32 of a tie, which double rounding would mistake for one
    return torch.cat([ties, *nearby, ties * (1 + 2.0**-40), ties * (1 - 2.0**-40)])


def fewer(backend: str, x: torch.Tensor) -> torch.Tensor:
    """Cases for a second of Triton's interpreter. It mangles subnormal bfloat16, which have zeros in their place."""
    if backend != "triton":
        return x
    normal = x.double().abs() >= torch.finfo(BF16).smallest_normal
    return torch.where(normal | ~x.isfinite() | (x.dtype is F16), x, 0)[::17].contiguous()


@ON_EVERY_BACKEND
@HALVES
def test_every_half_is_loaded_exactly(backend: str, half: torch.dtype) -> None:
    x = fewer(backend, every(half))
    [y] = run(backend, {"y": (1, lambda x: x)}, [x], {"x": [x]}, {}, F32, F32)["y"]
    assert_within(y, x.float(), 0)


@ON_EVERY_BACKEND
@pytest.mark.parametrize("stored", [BF16, F16, F32], ids=["bfloat16", "float16", "float32"])
@DTYPES
def test_stores_round_as_torch_does(backend: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    """To the nearest, ties to even; torch takes float64 to a half type by way of float32."""
    x = fewer(backend, torch.cat([around_ties(stored, dtype), specials(dtype)]))
    [y] = run(backend, {"y": (1, lambda x: x)}, [x], {"x": [x]}, {}, stored, dtype)["y"]
    assert_within(y, x.to(stored), 0)


CONVERT = """
void halves_to_floats(const uint16_t *x, float *y, int64_t n) { for (int64_t i = 0; i < n; ++i) y[i] = from_f16(x[i]); }
void floats_to_halves(const float *x, uint16_t *y, int64_t n) { for (int64_t i = 0; i < n; ++i) y[i] = to_f16(x[i]); }
"""


@pytest.fixture(scope="module", params=["-DSOFT_F16", "-DHARD_F16"], ids=["software", "compiler"])
def conversions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The conversions that emitted C starts with: written out, and the compiler's own where it has them."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder: Path = tmp_path_factory.mktemp("conversions")
    (folder / "convert.c").write_text(prelude("float") + CONVERT)
    command = [*compiler, "-O2", "-shared", "-fPIC", request.param, "convert.c", "-o", "convert.so", "-lm"]
    subprocess.run(command, cwd=folder, check=True, timeout=100)
    return ctypes.CDLL(str(folder / "convert.so"))


def convert(function: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    function(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(x.numel()))
    return y


def test_c_widens_every_half(conversions: ctypes.CDLL) -> None:
    x = every(F16)
    assert_within(convert(conversions.halves_to_floats, x, torch.empty(x.shape)), x.float(), 0)


def test_c_rounds_floats_to_halves(conversions: ctypes.CDLL) -> None:
    """Ties, what surrounds them, and one float in 4099."""
    spread = torch.arange(-(2**31), 2**31, 4099).int().view(F32)
    x = torch.cat([around_ties(F16, F32), spread])
    assert_within(convert(conversions.floats_to_halves, x, torch.empty(x.shape, dtype=F16)), x.half(), 0)
