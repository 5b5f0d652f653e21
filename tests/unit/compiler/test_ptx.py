"""The machine code of the emitted Triton, compiled here for GPUs that are not here to run it.

A process of its own compiles, because Triton is an interpreter in this one.
"""

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import functional_optim as fo
from functional_optim import adapters
from functional_optim._compiler.passes import Pass, Signature, plan
from functional_optim._compiler.program import Level
from functional_optim._compiler.triton.cubin import Wanted, compile_kernel
from functional_optim._compiler.triton.kernels import TritonKernel, triton_kernels
from functional_optim._compiler.triton.tuning import TUNED, kind_of


@fo.elementwise(state={"n": fo.slot(1.0, per="leaf")}, extra=("value",))
def every_operation(u: Any, p: Any, n: Any, *, step: Any, value: Any, b: Any = 0.9) -> Any:
    """A rule that uses every row of the operation table, on elements and on uniform values."""
    x = fo.cbrt(u) + torch.expm1(u) + torch.log1p(torch.abs(u)) + torch.tanh(u) + torch.sin(u) ** b + torch.exp(u)
    x = x + torch.exp2(u) + torch.log2(u) + torch.log(u) + torch.cos(u) + torch.floor(u) + torch.rsqrt(u)
    x = x + torch.ceil(u) + torch.trunc(u) + torch.round(u) + torch.erf(u) + torch.tan(u) + torch.atan2(u, p) + u % p
    x = x + torch.sinh(u) * torch.cosh(u) + torch.hypot(u, p) + torch.log10(u) + torch.atan(u) + torch.copysign(u, p)
    x = x + step % 7 * torch.atan2(step, value) + torch.round(step / 3) + torch.sinh(value) + torch.hypot(step, b)
    y = torch.lerp(u, p, b) + torch.addcmul(u, p, u, value=b) + torch.addcdiv(u, p, u, value=b) + torch.sqrt(u) / p
    y = y + u.bfloat16() + u.half() + u.float() + torch.minimum(u, p) - torch.sign(u)
    good = torch.isfinite(u) & ~(u > 1) | (p < 0) | (u >= p) | (u <= p) | (u == p)
    norm = fo.tree_norm(u) * value
    z = (u + norm) / norm - norm / u + torch.maximum(u - norm, norm - u) + torch.lerp(u, norm, b)
    return torch.where(good, x, y) * fo.tree_amax(u) * value * fo.leaf_amax(p) * fo.leaf_mean(u) + z, n * b**step


class Case(NamedTuple):
    """A program, by the optimizer that it is of, and what it is compiled for.

    Args:
      tx: the transformation, or the class of an optimizer.
      dtype: the dtype of the parameters.
      architecture: the compute capability.
      aligned: the variants of passes, by whether every address is a multiple of 16.
    """

    tx: Any
    dtype: torch.dtype = torch.float32
    architecture: int = 90
    aligned: tuple[bool, ...] = (True,)


CLIPPED = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-3), fo.params_ema(0.99))
MIXED = fo.adamw(1e-3, mu_dtype=torch.float32)
EVERY = fo.chain(fo.clip_by_global_norm(1.0), every_operation(), fo.sgd(fo.cosine_decay_schedule(0.1, 100)))
CASES = {
    "adamw": Case(fo.adamw(1e-3), aligned=(True, False)),
    "adamw, sm_80": Case(fo.adamw(1e-3), architecture=80),
    "adamw, sm_100": Case(fo.adamw(1e-3), architecture=100),
    "adamw, bfloat16": Case(fo.adamw(1e-3), torch.bfloat16),
    "adamw, bfloat16 and float32": Case(MIXED, torch.bfloat16, aligned=(True, False)),
    "adamw, bfloat16 and float32, sm_80": Case(MIXED, torch.bfloat16, architecture=80),
    "adamw, bfloat16 and float32, sm_100": Case(MIXED, torch.bfloat16, architecture=100),
    "adamw, float32 and float64": Case(MIXED, torch.float64),
    "clipped adamw with average": Case(CLIPPED),
    "clipped adamw with average, sm_80": Case(CLIPPED, architecture=80),
    "clipped adamw with average, sm_100": Case(CLIPPED, architecture=100),
    "clipped adamw with average, bfloat16": Case(CLIPPED, torch.bfloat16),
    "clipped adamw with average, float64": Case(CLIPPED, torch.float64),
    "lamb": Case(fo.lamb(1e-3)),
    "lamb, bfloat16": Case(fo.lamb(1e-3), torch.bfloat16),
    "lamb, float16, sm_80": Case(fo.lamb(1e-3), torch.float16, architecture=80),
    "lamb, float64": Case(fo.lamb(1e-3), torch.float64),
    "adan, bfloat16": Case(fo.adan(1e-3), torch.bfloat16),
    "adan, float64": Case(fo.adan(1e-3), torch.float64),
    "torch's adamw": Case(adapters.AdamW),
    "every operation": Case(EVERY),
    "every operation, float64": Case(EVERY, torch.float64),
}


# fewer programs run at once than the constants were tuned for, and have enough bytes on their way all the same
MANY_STREAMS = {"clipped adamw with average, float64", "adan, bfloat16", "adan, float64"}


def signature_of(case: Case) -> Signature:
    """The one program of a case."""
    params = [torch.zeros(8, 8, dtype=case.dtype), torch.zeros(8, dtype=case.dtype)]
    if case.tx is adapters.AdamW:
        [kernel] = fo.explain(adapters.AdamW([torch.nn.Parameter(p) for p in params])).kernels
    else:
        [kernel] = fo.explain(case.tx, params).kernels
    return kernel.signature


def compiled(kernel: TritonKernel, architecture: int, aligned: bool | None = None) -> dict[str, Any]:
    """Counts in the PTX and the machine code of a kernel."""
    import triton

    made = compile_kernel(Wanted(kernel, aligned, architecture, triton.__version__))
    ptx = made.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    return {
        "accesses": collections.Counter(re.findall(r"(?:ld|st)\.global\S*", ptx)),
        "conversions": collections.Counter(re.findall(r"cvt\.\S*bf16\S*", ptx)),
        "shared": made.metadata.shared,
        "operations": collections.Counter(re.findall(r"^\s*(?:@\S+ )?([a-z]\w*\.\S*(?:f32|f64))\s", ptx, re.MULTILINE)),
        "registers": int(registers),
        "stack": int(stack),
        "start": operations_on_start(ptx),
    }


def operations_on_start(ptx: str) -> list[str]:
    """The operations on the start of a chunk in the code of a pass: the 32-bit number 4 bytes behind its leaf's."""
    behind = set(re.findall(r"add\.s64\s+(%rd\d+), %rd\d+, 4;", ptx))
    loads = re.findall(r"ld\.global\.b32 \{ (%r\d+) \}, \[ (%rd\d+) \+ 0 \]", ptx)
    starts = [register for register, address in loads if address in behind][:1]  # the table of chunks is read first
    return [
        operation
        for start in starts
        for operation in re.findall(rf"^\s*(\S+)\s+%\w+, (?:[^;]*[ ,])?{start}\b", ptx, re.MULTILINE)
    ]


def main() -> None:
    """Compiles all kernels, and prints what is counted in each."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, case in CASES.items():
        signature = signature_of(case)
        found[name] = []
        for stage, p in zip(triton_kernels(signature).stages, plan(signature), strict=True):
            if stage.uniform is not None:
                found[name].append({"kind": "uniform", **compiled(stage.uniform, case.architecture)})
            for aligned in case.aligned:
                assert stage.elements is not None
                read, written = sizes_of(signature, p)
                own = {"kind": kind_of(signature, p), "aligned": aligned, "sizes": read + written, "read": sum(read)}
                found[name].append(own | compiled(stage.elements, case.architecture, aligned))
    print(json.dumps(found))


def sizes_of(signature: Signature, p: Pass) -> tuple[list[int], list[int]]:
    """Bytes of an element of each array that a pass reads, and of each that it writes."""
    outputs = signature.program.outputs
    read = [signature.dtypes[signature.program.values[i].name] for i in p.inputs]
    written = [signature.outputs[k] for k in p.stores if outputs[k].level is Level.ELEMENT]
    read += [signature.outputs[k] for _, k in p.reloads]
    return [dtype.itemsize for dtype in read], [dtype.itemsize for dtype in written]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The counts of all kernels, by case."""
    folder = tmp_path_factory.mktemp("ptx")
    environment = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(Path(fo.__file__).parents[1]), str(Path(__file__).parents[2])])
    environment |= {"TRITON_CACHE_DIR": f"{folder}/triton", "FUNCTIONAL_OPTIM_CACHE": f"{folder}/kernels"}
    child = [sys.executable, __file__]
    done = subprocess.run(child, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    counts: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return counts


pytestmark = pytest.mark.slow
SIMPLE = [name for name in CASES if not name.startswith("every")]  # the others are bound by their arithmetic


def wide_accesses(kernel: Any) -> dict[int, int]:
    """The accesses of several elements in the code of a kernel: how many there are of each number of bytes."""
    found: collections.Counter[int] = collections.Counter()
    for access, n in kernel["accesses"].items():
        for elements, bits in re.findall(r"\.v(\d)\.b(\d+)$", access):
            found[int(elements) * int(bits) // 8] += n
    return dict(found)


@pytest.mark.parametrize("name", SIMPLE)
def test_ptx_of_whole_blocks_has_wide_accesses(found: Any, name: str) -> None:
    """Of 16 bytes, or of all elements of a thread where they are fewer; none where addresses are not aligned."""
    for kernel in found[name]:
        if kernel["kind"] != "uniform":
            tuning = TUNED[kernel["kind"]]
            elements = tuning.block // (32 * tuning.warps)
            expected: collections.Counter[int] = collections.Counter()
            for size in kernel["sizes"] if kernel["aligned"] else ():
                width = min(16, elements * size)
                expected[width] += elements * size // width
            assert wide_accesses(kernel) == expected
            assert not kernel["aligned"] or 16 in expected


@pytest.mark.parametrize("name", SIMPLE)
def test_streaming_passes_use_no_shared_memory(found: Any, name: str) -> None:
    """All arrays of a pass have one layout over threads, so that no element changes its thread to be stored."""
    for kernel in found[name]:
        assert kernel["shared"] == 0 or not kernel["kind"].startswith("stream")


def test_conversions_to_bfloat16_round_to_nearest(found: Any) -> None:
    names = [name for name in SIMPLE if "bfloat16" in name]
    assert {CASES[name].architecture for name in names} == {80, 90, 100}
    for name in names:
        down = {x for kernel in found[name] for x in kernel["conversions"] if re.search(r"bf16(x2)?\.f32", x)}
        assert down
        assert all(x.startswith("cvt.rn.") for x in down)


@pytest.mark.parametrize("name", [name for name in SIMPLE if CASES[name].dtype != torch.float64])
def test_ptx_of_streaming_passes_has_no_double_precision(found: Any, name: str) -> None:
    passes = [kernel for kernel in found[name] if kernel["kind"].startswith("stream")]
    assert passes
    for kernel in passes:
        assert not [x for x in kernel["operations"] if "f64" in x]


@pytest.mark.parametrize("name", CASES)
def test_ptx_of_passes_finds_elements_by_64_bits(found: Any, name: str) -> None:
    """A start is a 32-bit number of blocks, which becomes 64 bits wide before it is one of elements or of bytes."""
    for kernel in found[name]:
        if kernel["kind"] != "uniform":
            assert kernel["start"]
            assert set(kernel["start"]) <= {"mul.wide.s32", "mad.wide.s32", "cvt.s64.s32"}


@pytest.mark.parametrize("name", SIMPLE)
def test_no_register_is_spilled(found: Any, name: str) -> None:
    assert not any(kernel["stack"] for kernel in found[name])


@pytest.mark.parametrize("name", [name for name in SIMPLE if name not in MANY_STREAMS])
def test_registers_are_within_the_bound_of_the_table(found: Any, name: str) -> None:
    for kernel in found[name]:
        assert kernel["kind"] == "uniform" or kernel["registers"] <= TUNED[kernel["kind"]].registers


@pytest.mark.parametrize("name", [name for name in SIMPLE if CASES[name].architecture == 90])
def test_enough_bytes_are_on_their_way_to_an_sm(found: Any, name: str) -> None:
    """An H100 moves 3.35 TB/s to 132 SMs: 38 kB for each, should a load take 1.5 us. Registers bound how many are."""
    for kernel in found[name]:
        if kernel["kind"] != "uniform":
            block, warps = TUNED[kernel["kind"]][:2]
            of_warp = -(-32 * kernel["registers"] // 256) * 256  # they are given out by 256
            programs = min(65536 // (of_warp * warps), 64 // warps)
            # a norm of a half type reads two bytes for each register of its sum in double precision
            assert programs * block * kernel["read"] >= (32_000 if kernel["kind"] == "norm, 16 bits" else 38_000)


@pytest.mark.parametrize("name", CASES)
def test_ptx_of_arithmetic_says_how_it_rounds(found: Any, name: str) -> None:
    """So that no product and sum are contracted."""
    arithmetic = [x for kernel in found[name] for x in kernel["operations"] if re.match("add|sub|mul|fma", x)]
    assert arithmetic
    assert [x for x in arithmetic if not re.fullmatch(r"\w+\.r[nzmp]\.f(32|64)", x)] == []


@pytest.mark.parametrize("name", SIMPLE)
def test_ptx_of_passes_approximates_nothing_and_keeps_denormals(found: Any, name: str) -> None:
    """Uniform values may: libdevice's powers begin with estimates."""
    passes = [kernel for kernel in found[name] if kernel["kind"] != "uniform"]
    assert not [x for kernel in passes for x in kernel["operations"] if "approx" in x or "ftz" in x or ".full" in x]


def test_ptx_has_a_fused_multiply_add_only_where_torch_has_one(found: Any) -> None:
    """None in optax's AdamW; in torch's five for an element, with 4 elements of a thread, in two kinds of blocks."""
    fused = {
        name: kernel["operations"].get("fma.rn.f32", 0)
        for name in ("adamw", "torch's adamw")
        for kernel in found[name]
        if kernel["kind"] == "stream"
    }
    assert fused == {"adamw": 0, "torch's adamw": 5 * 4 * 2}


if __name__ == "__main__":
    main()
