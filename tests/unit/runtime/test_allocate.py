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


STACKS = {
    "matrices": torch.randn(5, 3, 2),
    "numbers": torch.randn(4),
    "half": torch.randn(3, 2).bfloat16(),
    "integers": torch.arange(6).view(3, 2),
    "complex": torch.randn(3, 2, dtype=torch.complex64),
    "conjugated": torch.randn(3, 2, dtype=torch.complex64).conj(),
    "one row": torch.randn(1, 3),
    "no rows": torch.randn(0, 3),
    "rows without elements": torch.randn(3, 0),
    "transposed": torch.randn(2, 3).t(),
    "a part": torch.randn(6, 3)[1:4],
    "long rows": torch.randn(2, allocate.SMALL),
    "meta": torch.empty(3, 2, device="meta"),
    "odd strides of size 1": torch.randn(12).as_strided((3, 1, 4), (4, 99, 1)),
    "odd strides of size 1, transposed": torch.randn(12).as_strided((3, 4, 1), (4, 1, 99)),
    "followed by autograd": torch.randn(3, 2, requires_grad=True) * 2,
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("way", ["C", "Python"])
def test_rows_of_a_stack(way: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of `torch.unbind_copy`, and one outlives the others."""
    if way == "Python":
        monkeypatch.setattr(allocate, "operations", lambda: None)
    x = STACKS[name]
    rows, expected = allocate.unbind_copies(x), torch.unbind_copy(x, 0)
    assert len(rows) == len(expected)  # type: ignore[arg-type]
    for row, like in zip(rows, expected, strict=True):  # type: ignore[call-overload]
        assert (row.dtype, row.shape, row.stride(), row.device) == (like.dtype, like.shape, like.stride(), like.device)
        assert x.is_meta or torch.equal(row, like)
        assert row.requires_grad is like.requires_grad
        assert x.is_meta or row.untyped_storage().nbytes() == row.numel() * row.element_size()
