"""Leaves of more than 2**31 elements, without their memory.

A kernel finds element i of a leaf at its address + i * itemsize. A chunk that starts at i beyond 2**31 of a leaf whose
address lies as far before some small array touches only the small array, if the arithmetic is right. If it were done
in 32 bits, the kernel would touch other memory, which ends the process; so all of it runs in a process of its own.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import functional_optim as fo
from _lib.backends import only
from functional_optim._compiler.triton.kernels import triton_kernels
from functional_optim._compiler.triton.tuning import CHUNK
from functional_optim._runtime import cpu
from functional_optim._runtime.chunks import Chunks, cut
from functional_optim._runtime.pointers import PointerReader, Pointers


N = 1500  # elements that there are
# starts of chunks: at multiples of a chunk, and of a block
STARTS = (0, 2**31 - CHUNK, 2**31, 2**32 - CHUNK, 2**32, 2**40)
CASES = {
    f"{backend} {name} {start}": (backend, dtype, start)
    for backend in ("c", "triton")
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    for start in STARTS
}


def far(backend: str, dtype: torch.dtype, start: int) -> None:
    """Compares one step of elements far from the start of their leaf to the reference, near the start.

    Momentum and a clip: a pass that reduces, and one that loads and stores.
    """
    # an object of its own, because steps are bound to it
    tx = fo.named_chain(("clip", fo.clip_by_global_norm(1.0)), ("mu", fo.trace(0.9)), ("lr", fo.scale(-0.5)))
    generator = torch.Generator().manual_seed(0)
    params, grads, mu = torch.randn(3, N, generator=generator).to(dtype).unbind()
    state = tx.init(params) | {"mu": tx.init(params)["mu"]._replace(trace=mu)}
    with fo.use_backend("reference"):
        expected, after = fo.apply_gradients(tx, params, grads, state)
    if backend == "c":
        step_in_c(tx, params, grads, state, start)
    else:
        step_in_triton(tx, {"params": params, "updates": grads, "trace.trace": mu}, start)

    # the norm adds up in another order, in double precision: an ulp of float32 at most, which a number that is
    # rounded to bfloat16 may show as one of its own
    ulp = {torch.float32: 2**-23, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close((params, mu), (expected, after["mu"].trace), rtol=ulp, atol=ulp)


def step_in_c(tx: Any, params: torch.Tensor, grads: torch.Tensor, state: Any, start: int) -> None:
    """A step in place on leaves that have `start` elements more, before those that there are."""
    read = PointerReader.read

    def chunks(sizes: Sequence[int], chunk: int) -> Chunks:
        """Two chunks at the end of a leaf, and none before."""
        return Chunks((0, 0), (start, start + 1024), (start + 1024, start + N), (0, 2))

    def read_before(self: PointerReader, tensors: Sequence[torch.Tensor], pointers: Pointers) -> Any:
        """Pointers to the beginning of leaves."""
        found = read(self, tensors, pointers)
        for k, x in enumerate(tensors):
            pointers.memory[k] -= start * x.element_size()
        return found

    with (
        only("c"),
        mock.patch.object(cpu, "cut", chunks),
        mock.patch.object(PointerReader, "read", read_before),
    ):
        fo.apply_gradients(tx, params, grads, state, donate=True)


def step_in_triton(tx: Any, tensors: Mapping[str, torch.Tensor], start: int) -> None:
    """The same by the kernels themselves, with tables of one leaf and of the chunks that there are."""
    [kernel] = fo.explain(tx, tensors["params"]).kernels
    signature, kernels = kernel.signature, triton_kernels(kernel.signature)
    names = [*signature.program.arrays, *[output.name for output in signature.program.outputs]]
    addresses = torch.tensor([tensors[x].data_ptr() - start * tensors[x].element_size() for x in names])
    numbers = {"max_norm": 1.0, "decay": 0.9, "step_size": -0.5}
    scalars = torch.tensor([numbers[name.rpartition(".")[2]] for name in signature.program.scalars]).double()
    partials, uniforms = torch.zeros(1, dtype=torch.float64), torch.empty(kernels.uniform_words, dtype=torch.float64)
    row, size, first = torch.tensor([0]), torch.tensor([start + N]), torch.tensor([0, 1])
    table = torch.tensor([partials.data_ptr()])
    for stage in kernels.stages:
        if stage.uniform is not None:
            stage.uniform.function[(1,)](row, size, first, addresses, scalars, uniforms, table, 1, 1, 0)
        assert stage.elements is not None
        block = stage.elements.block
        size_of_chunk = CHUNK if stage.reduces else block
        ends = range(start // size_of_chunk, -(-(start + N) // size_of_chunk))
        chunks = torch.tensor([[0, k] for k in ends], dtype=torch.int32)
        arguments = (chunks, size, addresses, uniforms, table, table, 1, size_of_chunk // block, 0, 0)
        stage.elements.function[(len(ends),)](*arguments, ALIGNED=False)


def main() -> None:
    """Runs all cases, and prints the name of each that came out right."""
    warnings.simplefilter("ignore")  # Triton's interpreter counts loops in a way that NumPy wants to forbid
    for name, case in CASES.items():
        print("start", name, flush=True)
        far(*case)
        print("right", name, flush=True)


@pytest.fixture(scope="module")
def child() -> subprocess.CompletedProcess[str]:
    """A process that runs all cases, until one goes wrong."""
    root = Path(fo.__file__).parents[1]
    path = os.pathsep.join([str(root), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_elements_far_from_the_start(child: subprocess.CompletedProcess[str], name: str) -> None:
    assert f"right {name}\n" in child.stdout, f"exit status {child.returncode}\n{child.stdout}\n{child.stderr[-2000:]}"


def test_chunks_of_a_leaf_beyond_32_bits() -> None:
    size = 2**31 + 10
    chunks = cut((3, size), cpu.CHUNK)
    assert len(chunks.leaf) == 1 + 2**31 // cpu.CHUNK + 1
    assert (chunks.start[-1], chunks.stop[-1]) == (2**31, size)
    assert chunks.first == (0, 1, len(chunks.leaf))


if __name__ == "__main__":
    main()
