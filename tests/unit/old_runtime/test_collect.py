"""Reading and comparing thousands of Python objects at once, in C."""

import itertools
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from functional_optim.kernels import collect
from functional_optim.kernels.collect import Contents


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("cuts", [(), (0,), (2,), (6,), (1, 1, 4)])
@pytest.mark.parametrize("position", [0, 3, 5])
def test_lists_that_are_parts_of_another(position: int, cuts: tuple[int, ...]) -> None:
    whole: list[Any] = [object() for _ in range(6)]
    parts = [whole[a:b] for a, b in itertools.pairwise((0, *cuts, 6))]
    assert collect.are_parts(parts, whole)
    assert not collect.are_parts(parts, whole[:-1])
    assert not collect.are_parts(parts[1:], whole) or not parts[0]

    whole[position] = object()

    assert not collect.are_parts(parts, whole)


def test_only_lists_are_looked_into_in_c(in_c: None) -> None:
    assert not collect.are_parts([(1, 2)], [1, 2])  # type: ignore[list-item]


class Heard(dict[str, Any]):
    def __getitem__(self, key: str) -> Any:
        return "mine"


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("n", [0, 1, 50])
def test_items(n: int) -> None:
    dicts: list[Any] = [{"a": object(), "b": object(), "c": 0} for _ in range(n)]
    before = [sys.getrefcount(d["b"]) for d in dicts]

    found = collect.items(dicts, ["b", "a"])

    assert found == [[d["b"] for d in dicts], [d["a"] for d in dicts]]
    del found
    assert [sys.getrefcount(d["b"]) for d in dicts] == before


@pytest.mark.usefixtures("either")
def test_items_of_other_dicts() -> None:
    dicts: list[Any] = [{"a": 1, "b": 2}, {"b": 3}]

    assert collect.items(dicts, ["a", "b"]) == [None, [2, 3]]
    assert collect.items([*dicts, Heard()], ["b", "a"]) == [[2, 3, "mine"], None]
    assert dicts == [{"a": 1, "b": 2}, {"b": 3}]
    with pytest.raises(TypeError, match="subscriptable"):
        collect.items([*dicts, *[object()] * 30], ["b"])


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("kind", [dict, OrderedDict, lambda x: defaultdict(dict, x)])
def test_a_dict_contains_the_same(kind: Callable[[Any], dict[Any, Any]]) -> None:
    """An optimizer's state is a dict of a class of its own, and keys are tensors, which are not equal to themselves."""
    keys, values = [torch.ones(2) for _ in range(5)], [{"a": k} for k in range(5)]
    mapping = kind(zip(keys, values, strict=True))
    known = Contents.of([mapping])

    assert known.are_in([mapping])
    assert known.are_in([kind(zip(keys, values, strict=True))])
    assert not known.are_in([kind(zip(keys[:-1], values[:-1], strict=True))])
    assert not known.are_in([kind(zip(keys[::-1], values, strict=True))])
    assert not known.are_in([kind(zip(keys, [*values[:-1], {"a": 4}], strict=True))])
    assert not known.are_in([mapping, {}])
    del mapping[keys[2]]
    assert not known.are_in([mapping])


@pytest.mark.usefixtures("either")
def test_dicts_contain_the_same() -> None:
    a, b, c = object(), object(), object()
    known = Contents.of([{"x": a, "y": b}, {}, {"z": c}])

    assert known.are_in([{"x": a, "y": b}, {}, {"z": c}])
    assert known.are_in(({"x": a, "y": b}, {}, {"z": c}))
    assert not known.are_in([{"x": a}, {"y": b}, {"z": c}])
    assert not known.are_in([{"x": a, "y": b}, {"z": c}, {}])
    assert Contents.of([]).are_in([])
    assert not Contents.of([]).are_in([{}])
