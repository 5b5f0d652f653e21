"""Chunks of leaves: each element is in one of them, in order; and partial results of leaves and of the tree."""

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import (
    given,
    strategies as st,
)

import functional_optim as fo
from _lib.programs import bind
from functional_optim._compiler.program import Program
from functional_optim._compiler.trace import Tracer
from functional_optim._runtime import cpu
from functional_optim._runtime.chunks import JoinedChunks, cut, partial_buffers
from functional_optim._runtime.cpu import _runs
from functional_optim._runtime.groups import Group
from functional_optim._runtime.join import Joins


SIZES = st.lists(st.integers(0, 40), max_size=8)


@given(sizes=SIZES, chunk=st.integers(1, 50))
def test_each_element_is_in_one_chunk(sizes: list[int], chunk: int) -> None:
    chunks = cut(sizes, chunk)
    elements = [
        (leaf, i)
        for leaf, start, stop in zip(chunks.leaf, chunks.start, chunks.stop, strict=True)
        for i in range(start, stop)
    ]
    assert elements == [(leaf, i) for leaf, n in enumerate(sizes) for i in range(n)]
    assert all(stop - start <= chunk for start, stop in zip(chunks.start, chunks.stop, strict=True))


@given(sizes=SIZES, chunk=st.integers(1, 50))
def test_first_chunks_of_leaves(sizes: list[int], chunk: int) -> None:
    """A leaf without elements has a chunk too, which leaves the identity of each reduction."""
    chunks = cut(sizes, chunk)
    assert chunks.first[-1] == len(chunks.leaf)
    assert len(chunks.first) == len(sizes) + 1
    for leaf in range(len(sizes)):
        assert set(chunks.leaf[chunks.first[leaf] : chunks.first[leaf + 1]]) == {leaf}


@given(sizes=SIZES, chunk=st.integers(1, 50), n_threads=st.integers(1, 8))
def test_runs_of_threads_cover_all_chunks(sizes: list[int], chunk: int, n_threads: int) -> None:
    """A run is one chunk, or has at most as many elements as a chunk may have."""
    chunks, total = cut(sizes, chunk), sum(sizes)
    with mock.patch.object(cpu, "CHUNK", chunk):
        runs = _runs(chunks, total, n_threads)
    taken = [list(range(*bounds)) for bounds in itertools.pairwise(runs)]
    assert list(itertools.chain(*taken)) == list(range(len(chunks.leaf)))
    assert all(taken)
    for own in taken:
        assert len(own) == 1 or sum(chunks.stop[k] - chunks.start[k] for k in own) <= chunk


# -- partial results --------------------------------------------------------------------------------------------------


class Doubling:
    """The join with other processes, where another one holds the same numbers."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str]] = []

    def combine(self, partials: torch.Tensor, kind: str) -> None:
        self.seen.append((len(partials), kind))
        if kind == "sum":
            partials *= 2


def reductions() -> Program:
    """A sum over each leaf and over the tree, and the largest element of each leaf."""
    t = Tracer()
    x = t.input("array", "x")
    t.scope = "all"
    values = {"sum": fo.leaf_sum(x), "amax": fo.leaf_amax(x), "total": fo.tree_sum(x)}
    return t.finish(values, frozenset(values))


def groups(shard: Doubling | None = None) -> list[Group]:
    """Leaves of two dtypes, which are two programs."""
    number = torch.zeros((), dtype=torch.float64)
    own = []
    for dtype in (torch.float32, torch.float64):
        x = [torch.zeros(5, dtype=dtype), torch.zeros(0, dtype=dtype), torch.zeros(2, dtype=dtype)]
        columns = {"updates": x, "x": x, **dict.fromkeys(("sum", "amax", "total"), [number] * 3)}
        own += bind(reductions(), columns).groups
    return [group._replace(shard=shard) for group in own]


def test_partial_buffers_hold_the_identity_of_their_reduction() -> None:
    """Programs share the buffer of a tree reduction of one scope, and have those of leaves to themselves."""
    two = groups()
    cuts = [cut(group.table.sizes, 2) for group in two]
    first, second = partial_buffers(two, cuts, torch.device("cpu"))
    kinds = [two[0].signature.program.values[i].op for i in two[0].signature.program.reductions]
    for kind, a, b in zip(kinds, first, second, strict=True):
        assert a.tolist() == b.tolist() == [-torch.inf if kind == "leaf_amax" else 0.0] * 10
        assert (a is b) is (kind == "tree_sum")


@pytest.mark.parametrize("absent", [0, 2])
def test_join_reduces_the_chunks_of_each_leaf(absent: int) -> None:
    """A number per leaf, one that has no gradient here too, and one for the tree, whatever the number of chunks."""
    shard: Any = Doubling()
    [group, _] = groups(shard)
    chunks = cut(group.table.sizes, 2)
    joins = Joins([reductions()] * (3 + absent), [shard] * (3 + absent))
    join = JoinedChunks([group], [chunks], joins, torch.device("cpu"))
    [buffers] = partial_buffers([group], [chunks], torch.device("cpu"), join.n_joined)
    kinds = [group.signature.program.values[i].op for i in group.signature.program.reductions]
    for buffer in buffers:
        buffer[:5] = torch.tensor([1.0, 2.0, 3.0, 0.0, 5.0])

    join(buffers=[buffers], stage=1)

    expected = {
        "leaf_sum": [12.0, 0.0, 0.0, 0.0, 10.0],
        "leaf_amax": [3.0, -torch.inf, -torch.inf, 0.0, 5.0],
        "tree_sum": [0.0, 0.0, 0.0, 0.0, 0.0, 22.0],
    }
    found = {kind: buffer.tolist() for kind, buffer in zip(kinds, buffers, strict=True)}
    assert found["tree_sum"] == expected["tree_sum"]
    assert {kind: numbers[:5] for kind, numbers in found.items() if kind != "tree_sum"} == {
        kind: numbers for kind, numbers in expected.items() if kind != "tree_sum"
    }
    assert shard.seen == [(3 + absent, "amax"), (4 + absent, "sum")]


@pytest.mark.parametrize("stage", [0, 2])
def test_join_leaves_reductions_of_other_stages_alone(stage: int) -> None:
    shard: Any = Doubling()
    [group, _] = groups(shard)
    chunks = cut(group.table.sizes, 2)
    join = JoinedChunks([group], [chunks], Joins([reductions()] * 3, [shard] * 3), torch.device("cpu"))
    join(partial_buffers([group], [chunks], torch.device("cpu"), join.n_joined), stage)
    assert shard.seen == []
