"""Leaves of more than 2**31 elements, without their memory.

A kernel finds element i of a leaf at its address + i * itemsize. A chunk that starts at i beyond 2**31 of a leaf whose
address lies as far before some small array touches only the small array, if the arithmetic is right. If it were done
in 32 bits, the kernel would touch other memory, which ends the process; so all of it runs in a process of its own.
"""

import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from functional_optim.kernels import BACKENDS, Call, Column, LeafTable, launch
from functional_optim.kernels.launch import CHUNK, TRITON_BLOCK, Chunks, cut

import functional_optim as fo


N = 1500  # elements that there are
STARTS = (0, 2**31 - 1024, 2**31, 2**32 - 1024, 2**32, 2**40)  # where chunks start: at multiples of a block
CASES = {
    f"{backend} {name} {start}": (backend, dtype, start)
    for backend in ("c", "triton")
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    for start in STARTS
}


class Place:
    """A tensor as far as an address goes: `start` elements before a real one."""

    def __init__(self, x: torch.Tensor, start: int) -> None:
        self.x, self.start = x, start

    def data_ptr(self) -> int:
        return self.x.data_ptr() - self.start * self.x.element_size()


def column(x: torch.Tensor, start: int) -> Column:
    """The column of one leaf, of which `x` is the end."""
    made = Column([Place(x, start)])  # type: ignore[list-item]
    made.seen, made.addresses = True, struct.pack("q", Place(x, start).data_ptr())
    return made


def end(sizes: tuple[int, ...], chunk: int) -> Chunks:
    """Two chunks at the end of a leaf, and none before."""
    [size] = sizes
    return Chunks((0, 0), (size - N, size - N + TRITON_BLOCK), (size - N + TRITON_BLOCK, size), (0, 2))


def far(backend: str, dtype: torch.dtype, start: int) -> None:
    """Compares one step of elements far from the start of their leaf to the reference, near the start.

    Momentum and a clip: a pass that reduces, and one that loads and stores.
    """
    tx = fo.named_chain(("clip", fo.clip_by_global_norm(1.0)), ("mu", fo.trace(0.9)), ("lr", fo.scale(-0.5)))
    generator = torch.Generator().manual_seed(0)
    params, grads, mu = torch.randn(3, N, generator=generator).to(dtype).clone().unbind()
    state = tx.init(params) | {"mu": tx.init(params)["mu"]._replace(trace=mu)}
    with fo.use_backend("reference"):
        expected, after = fo.apply_gradients(tx, params, grads, state)

    [kernel] = fo.explain(tx, params).kernels
    program = kernel.signature.program
    arrays = {"updates": grads, "params": params.clone(), "trace.trace": mu.clone()}
    numbers = {"clip_by_global_norm.max_norm": 1.0, "trace.decay": 0.9, "scale.step_size": -0.5}
    call = Call(
        kernel.signature,
        Column([params]),
        [column(arrays[name], start) for name in program.arrays],
        [column(arrays[output.name], start) for output in program.outputs],
        [[numbers[name] for name in program.scalars]],
        LeafTable((start + N,), (start + N,), (0,)),
        None,
    )
    with mock.patch.object(launch, "cut", end):
        BACKENDS[backend]([call])

    # the norm adds up in another order, in double precision: an ulp of float32 at most, which a number that is
    # rounded to bfloat16 may show as one of its own
    ulp = {torch.float32: 2**-23, torch.bfloat16: 2**-7}[dtype]
    actual = (arrays["params"], arrays["trace.trace"])
    torch.testing.assert_close(actual, (expected, after["mu"].trace), rtol=ulp, atol=ulp)


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
    environment = {**os.environ, "PYTHONPATH": str(root), "TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_elements_far_from_the_start(child: subprocess.CompletedProcess[str], name: str) -> None:
    assert f"right {name}\n" in child.stdout, f"exit status {child.returncode}\n{child.stdout}\n{child.stderr[-2000:]}"


def test_chunks_of_a_leaf_beyond_32_bits() -> None:
    size = 2**31 + 10
    chunks = cut((3, size), CHUNK)
    assert len(chunks.leaf) == 1 + 2**31 // CHUNK + 1
    assert (chunks.start[-1], chunks.stop[-1]) == (2**31, size)
    assert chunks.first == (0, 1, len(chunks.leaf))


if __name__ == "__main__":
    main()
