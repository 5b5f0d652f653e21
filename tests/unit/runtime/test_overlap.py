"""Clashes of memory, against sets of bytes."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import (
    example,
    given,
    strategies as st,
)

from functional_optim._runtime.overlap import Clash, OverlapCheck
from functional_optim._runtime.spec import TensorSpec


def find(tensors: Sequence[torch.Tensor], written: Sequence[bool]) -> Clash | None:
    return OverlapCheck([TensorSpec.of(x) for x in tensors], written).find([x.data_ptr() for x in tensors])


def bytes_of(x: torch.Tensor) -> set[int]:
    """The address of each byte of each element."""
    found = set()
    for place in itertools.product(*map(range, x.shape)):
        first = x.data_ptr() + x.element_size() * sum(i * s for i, s in zip(place, x.stride(), strict=True))
        found |= set(range(first, first + x.element_size()))
    return found


def shares(x: torch.Tensor, y: torch.Tensor) -> bool:
    return not bytes_of(x).isdisjoint(bytes_of(y))


@st.composite
def views(draw: st.DrawFn) -> list[torch.Tensor]:
    """Strided views of one storage, of several dtypes."""
    memory = torch.zeros(512, dtype=torch.uint8)
    made = []
    for _ in range(draw(st.integers(1, 5))):
        dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        stride = draw(st.lists(st.integers(0, 8), min_size=len(shape), max_size=len(shape)))
        made.append(memory.view(dtype).as_strided(shape, stride, draw(st.integers(0, 12))))
    return made


@given(tensors=views(), data=st.data())
def test_no_clash_is_overlooked(tensors: list[torch.Tensor], data: st.DataObject) -> None:
    """A clash that is found has the extents of both tensors in common, and the second one is written."""
    n = len(tensors)
    written = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    pairs = itertools.combinations(range(n), 2)
    expected = any((written[i] or written[j]) and shares(tensors[i], tensors[j]) for i, j in pairs)

    found = find(tensors, written)

    if expected:
        assert found is not None
    if found is not None:
        first, second = (tensors[k] for k in found)
        assert written[found.second]
        assert found.first != found.second
        ends = [x.data_ptr() + TensorSpec.of(x).span for x in (first, second)]
        assert max(first.data_ptr(), second.data_ptr()) < min(ends)


@st.composite
def contiguous_views(draw: st.DrawFn) -> list[torch.Tensor]:
    """Views whose elements are contiguous in memory, in some order."""
    memory = torch.zeros(256, dtype=torch.uint8)
    made = []
    for _ in range(draw(st.integers(1, 6))):
        dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
        shape = draw(st.lists(st.integers(0, 3), max_size=2))
        x = memory.view(dtype)[draw(st.integers(0, 16)) :]
        x = x[: torch.Size(shape).numel()].view(shape)
        made.append(x.t() if x.ndim == 2 and draw(st.booleans()) else x)
    return made


@given(tensors=contiguous_views(), data=st.data())
def test_contiguous_tensors_clash_just_where_they_share_a_byte(
    tensors: list[torch.Tensor], data: st.DataObject
) -> None:
    n = len(tensors)
    written = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    clashes = {
        frozenset(pair)
        for pair in itertools.combinations(range(n), 2)
        if any(written[k] for k in pair) and shares(*(tensors[k] for k in pair))
    }
    found = find(tensors, written)
    assert (found is None) is (not clashes)
    assert found is None or frozenset(found) in clashes


@example(rows=3, columns=4, dtype=torch.float32)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_interleaved_views_do_not_clash(rows: int, columns: int, dtype: torch.dtype) -> None:
    """Columns, blocks of columns, and pairs of real numbers keep apart modulo their common period."""
    x = torch.zeros(rows, columns, dtype=dtype)
    assert find(list(x.unbind(1)), [True] * columns) is None
    assert find([x[:, : columns // 2], x[:, columns // 2 :]], [True, True]) is None
    pairs = torch.zeros(rows, columns, 2, dtype=dtype)
    assert find([pairs[..., 0], pairs[..., 1]], [True, True]) is None
    channels = torch.zeros(2, columns, rows, 3, dtype=dtype).permute(0, 3, 1, 2)
    assert find(list(channels.unbind(1)), [True] * 3) is None


def test_views_without_a_common_period_may_be_refused() -> None:
    """The documented limit: strides of 2 and 3 elements have a period of 1, in which nothing keeps apart."""
    x = torch.zeros(20)
    apart = [x.as_strided((2,), (3,), 0), x.as_strided((2,), (2,), 2)]  # elements 0, 3 and 2, 4
    assert not shares(*apart)
    assert find(apart, [True, True]) is not None


@pytest.mark.parametrize("n", [2, 300])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_one_clash_among_many_tensors(n: int, place: int) -> None:
    tensors = list(torch.zeros(n, 4).unbind())
    clashing = tensors[place].view(2, 2)[1]
    assert find(tensors, [True] * n) is None
    assert find([*tensors, clashing], [True] * n + [False]) == Clash(n, place % n)
    assert find([*tensors, clashing], [False] * n + [False]) is None


def test_a_long_tensor_that_is_read_reaches_over_others_that_are_written() -> None:
    """Not the neighbour in memory, but one that starts long before."""
    memory = torch.zeros(100)
    tensors = [memory[:90], memory[1:2], memory[3:4], memory[80:81]]
    assert find(tensors, [False, False, False, True]) == Clash(0, 3)
    assert find(tensors, [False] * 4) is None
