"""Reading and comparing thousands of Python objects at once, in C."""

import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from functional_optim.kernels import collect
from functional_optim.kernels.collect import Contents


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("position", [0, 3, 5])
def test_the_same_objects(position: int) -> None:
    column: list[Any] = [object() for _ in range(6)]
    other = list(column)
    assert collect.same(column, other)
    assert not collect.same(column, other[:-1])

    other[position] = object()

    assert not collect.same(column, other)


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


class Slotted:
    __slots__ = ("other", "value")

    def __init__(self, value: Any) -> None:
        self.value = value


class Heir(Slotted):
    pass


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("kinds", [[Slotted], [Plain], [Slotted, Plain], [Plain, Slotted], [Heir], [Slotted, Heir]])
@pytest.mark.parametrize("n", [0, 1, 50])
def test_attributes(n: int, kinds: list[Any]) -> None:
    values = [object() for _ in range(n)]
    objects = [kinds[k % len(kinds)](value) for k, value in enumerate(values)]
    before = [sys.getrefcount(x) for x in values]

    found = collect.attributes(objects, "value", list)

    assert all(x is y for x, y in zip(found, values, strict=True))
    assert [sys.getrefcount(x) for x in values] == [x + 1 for x in before]
    del found
    assert [sys.getrefcount(x) for x in values] == before


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("position", [0, 7, 49])
def test_attributes_that_are_missing(position: int) -> None:
    values = [object() for _ in range(50)]
    objects: list[Any] = list(map(Slotted, values))
    before = [sys.getrefcount(x) for x in values]
    collect.attributes([Slotted(0)], "value", list)
    for missing in (None, Slotted(0)):
        if missing is not None:
            del missing.value
        objects[position] = missing

        with pytest.raises(AttributeError, match="value"):
            collect.attributes(objects, "value", list)

    after = [sys.getrefcount(x) for x in values]
    assert after[:position] + after[position + 1 :] == before[:position] + before[position + 1 :]
