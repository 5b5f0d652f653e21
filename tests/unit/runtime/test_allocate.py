"""New tensors of a step, made by the operation of `pointers.c` and by torch."""

import functools
from unittest import mock

import pytest
import torch

from functional_optim._runtime import allocate
from functional_optim._runtime.allocate import Allocator, Make
from functional_optim._runtime.library import operations
from functional_optim._runtime.pointers import Pointers
from functional_optim._runtime.spec import TensorSpec


LIKE = [
    torch.zeros(3, 4),
    torch.zeros(4, 3).t(),
    torch.zeros(()),
    torch.zeros(0, 3),
    torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
    torch.zeros(6, 8)[:, ::2],
    torch.zeros(3, 1).expand(3, 4),
    torch.nn.Parameter(torch.zeros(5)),
]


def make(dtype: torch.dtype) -> Make:
    return functools.partial(torch.empty_like, dtype=dtype)


MAKERS: list[Make] = [
    make(torch.float32),
    make(torch.bfloat16),
    functools.partial(torch.Tensor.new_empty, size=(), dtype=torch.int32),
]


@pytest.fixture(params=["operation", "torch", "no memory"])
def way(request: pytest.FixtureRequest) -> str:
    """The operation, torch's functions where it cannot be built, and torch's functions after it has found no memory."""
    if request.param != "torch" and operations() is None:
        pytest.skip("there is no C compiler")
    return str(request.param)


def allocator(way: str, columns: list[list[torch.Tensor]], makers: list[Make]) -> Allocator:
    likes = [[(TensorSpec.of(x), x) for x in column] for column in columns]
    if way == "operation":
        return Allocator(likes, makers)
    with mock.patch.object(allocate, "operations", return_value=None):
        found = Allocator(likes, makers)
    if way == "no memory":
        found.operation = lambda *_: []
        found.index = found.table = torch.zeros(1)
    return found


def test_they_are_those_that_torch_makes(way: str) -> None:
    columns, pointers = [LIKE] * len(MAKERS), Pointers(2, len(LIKE) * len(MAKERS))
    found = allocator(way, columns, MAKERS)(columns, pointers)
    addresses = iter(pointers.memory[3:])
    for column, make, like in zip(found, MAKERS, columns, strict=True):
        for x, y in zip(column, map(make, like), strict=True):
            assert (type(x), TensorSpec.of(x)) == (torch.Tensor, TensorSpec.of(y))
            assert (x.requires_grad, x.is_leaf) == (False, True)
            assert next(addresses) == x.data_ptr()
    storages = {x.untyped_storage().data_ptr() for column in found for x in column if x.numel()}
    assert len(storages) == sum(x.numel() > 0 for column in found for x in column), "each has memory of its own"


def test_nothing_is_made_of_nothing(way: str) -> None:
    assert allocator(way, [[], []], MAKERS[:2])([[], []], Pointers(0)) == [[], []]


def test_they_belong_to_the_mode_they_are_made_in(way: str) -> None:
    columns, pointers = [LIKE[:1]], Pointers(0, 1)
    own = allocator(way, columns, MAKERS[:1])
    with torch.inference_mode():
        ((inside,),) = own(columns, pointers)
    ((outside,),) = own(columns, pointers)
    assert (inside.is_inference(), outside.is_inference()) == (True, False)
