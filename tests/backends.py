"""Running one backend and no other, and comparing what backends compute."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import optree
import torch

import functional_optim as fo
from functional_optim._runtime import step
from functional_optim._runtime.backend import BACKENDS


F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
STEPS = 3
OTHERS = [name for name in BACKENDS if name != "reference"]


@contextlib.contextmanager
def only(backend: str) -> Iterator[None]:
    """Uses a backend and refuses to fall back to another."""

    def chosen(self: Any, choose: Any = step.BoundStep._choose_backends) -> Any:
        parts = choose(self)
        assert {name for name, _ in parts} <= {backend}, f"{backend} did not run"
        return parts

    with fo.use_backend(backend), mock.patch.object(step.BoundStep, "_choose_backends", chosen):
        yield


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors of a tree."""
    return [x for x in optree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


# Backends compute the same formula in the same order, so they differ where libraries do: a square root or a power by
# an ulp, a sum over many elements by its order, in double precision, which float32 rarely shows. A formula of this
# file hands on at most some ten of these, to which its own roundings add, over three steps. What is stored in a half
# type is rounded from float32: where both sides of a rounding boundary are met, values are one ulp apart, and the next
# step may round it once more.
TOLERANCE = {F32: 32 * 2**-24, F64: 32 * 2**-53, BF16: 2 * 2**-8, F16: 2 * 2**-11}


def assert_alike(actual: Any, expected: Any) -> None:
    """Compares trees of tensors, each dtype by its own tolerance, relative to the largest number in the trees.

    What is small may have been left by large numbers that cancel.
    """
    assert optree.tree_structure(actual) == optree.tree_structure(expected)
    numbers = torch.cat([torch.ones(1, dtype=F64), *(x.double().flatten() for x in tensors(expected))])
    scale = numbers.nan_to_num(0, 0, 0).abs().amax().item()
    for x, y in zip(tensors(actual), tensors(expected), strict=True):
        bound = TOLERANCE.get(y.dtype, 0)
        torch.testing.assert_close(x, y, rtol=bound, atol=bound * scale, equal_nan=True)


@fo.elementwise
def nested(u: Any, p: Any) -> Any:
    """A reduction of what depends on a reduction that depends on a reduction."""
    u = u / (1 + fo.tree_norm(u))
    u = u * fo.leaf_norm(u + p)
    return u / fo.tree_amax(torch.abs(u))
