"""Marks, tensors and streams of the tests that need a CUDA device."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from functional_optim._compiler.triton.build import interprets


NEEDS_A_DEVICE = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(interprets(), reason="Triton interprets kernels; set TRITON_INTERPRET=0"),
    # torch warns of its own questions: once in a process, and of a graph in which a refused step has left nothing
    pytest.mark.filterwarnings("ignore:Synchronization debug mode", "ignore:The CUDA Graph is empty"),
]
SHAPES = ((33, 17), (5,), (), (0, 3), (100, 129), (4, 3, 2, 7))
Tree = dict[str, torch.Tensor]


def draw(seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tree:
    """Normal values in leaves of several shapes and layouts, the same ones on each device."""
    generator = torch.Generator().manual_seed(seed)
    tree = {str(k): torch.randn(shape, generator=generator) for k, shape in enumerate(SHAPES)}
    tree["channels last"] = torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last)
    tree["transposed"] = torch.randn(6, 8, generator=generator).t()
    return {k: x.to(device, dtype) for k, x in tree.items()}


def leaves(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """The same as parameters on the device."""
    return [nn.Parameter(x) for x in draw(seed, dtype, "cuda").values()]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    """Writes new gradients to the tensors that are there, or makes them."""
    drawn = draw(100 + step, params[0].dtype, "cuda").values()
    for p, g in zip(params, drawn if len(params) == len(drawn) else [g for g in drawn if g.numel()], strict=True):
        if p.grad is None:
            p.grad = g
        else:
            p.grad.copy_(g)


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    """Another stream, ordered with the current one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
