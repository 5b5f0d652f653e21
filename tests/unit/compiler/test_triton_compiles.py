"""The Triton that is emitted compiles for a GPU, down to machine code, although there is none here to run it."""

import os
import subprocess
import sys

import pytest


PROGRAM = """
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import functional_optim as fo
from functional_optim._compiler.triton.build import load_triton
from functional_optim._compiler.triton.emit import emit_triton


@fo.elementwise(state={"n": fo.slot(1.0, per="leaf")}, extra=("value",))
def every_operation(u, p, n, *, step, value, b=0.9):
    x = fo.cbrt(u) + torch.expm1(u) + torch.log1p(torch.abs(u)) + torch.tanh(u) + torch.sin(u) ** b + torch.exp(u)
    x = x + torch.exp2(u) + torch.log2(u) + torch.log(u) + torch.cos(u) + torch.floor(u) + torch.rsqrt(u)
    x = x + torch.ceil(u) + torch.trunc(u) + torch.round(u) + torch.erf(u) + torch.tan(u) + torch.atan2(u, p) + u % p
    x = x + torch.sinh(u) * torch.cosh(u) + torch.hypot(u, p) + torch.log10(u) + torch.atan(u) + torch.copysign(u, p)
    x = x + step % 7 * torch.atan2(step, value) + torch.round(step / 3) + torch.sinh(value) + torch.hypot(step, b)
    y = torch.lerp(u, p, b) + torch.addcmul(u, p, u, value=b) + torch.addcdiv(u, p, u, value=b) + torch.sqrt(u) / p
    y = y + u.bfloat16() + u.half() + u.float() + torch.minimum(u, p) - torch.sign(u)
    good = torch.isfinite(u) & ~(u > 1) | (p < 0) | (u >= p) | (u <= p) | (u == p)
    return torch.where(good, x, y) * fo.tree_amax(u) * value * fo.leaf_amax(p) * fo.leaf_mean(u), n * b**step


recipe = fo.chain(
    fo.clip_by_global_norm(1.0),
    fo.lamb(fo.warmup_cosine_decay_schedule(0.0, 1e-3, 10, 100)),
    every_operation(),
    fo.params_ema(0.99),
)
dtype = getattr(torch, sys.argv[1])
(kernel,) = fo.explain(recipe, {"w": torch.zeros(8, 8, dtype=dtype), "b": torch.zeros(8, dtype=dtype)}).kernels
module = load_triton(emit_triton(kernel.signature))
for k in range(kernel.passes):
    function = getattr(module, f"pass_{k}")
    types = {"scalars": "*fp64", "n_leaves": "i32", "n_partials": "i32", "first_partial": "i32", "BLOCK": "constexpr"}
    types = {name: types.get(name, "*i64") for name in function.arg_names}
    source = ASTSource(function, signature=types, constexprs={"BLOCK": 1024})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
print(kernel.passes, "passes")
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_emitted_triton_compiles_for_a_gpu(dtype: str, tmp_path: object) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": f"{tmp_path}/triton", "FUNCTIONAL_OPTIM_CACHE": f"{tmp_path}/kernels"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, dtype], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "4 passes"
