"""What is asked of thousands of tensors at once, in C and in Python."""

import ctypes
import struct
from typing import Any

import pytest
import torch

from functional_optim.kernels import addresses
from functional_optim.kernels.build import BuildError, load_c


@pytest.fixture(params=["C", "Python"], autouse=True)
def functions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_functions", [])
    if request.param == "C":
        try:
            addresses.use(load_c(addresses.SOURCE))
        except BuildError:
            pytest.skip("no C compiler")


def tensors() -> list[torch.Tensor]:
    x = torch.arange(24.0)
    return [x, x[5:], x.view(4, 6).t(), torch.nn.Parameter(x[3:4]), torch.empty(0), torch.tensor(1, dtype=torch.int8)]


def test_addresses_are_those_that_torch_says() -> None:
    column = tensors() * 3

    found = addresses.guarded_addresses(column)

    assert struct.unpack(f"{len(column)}q", found) == tuple(x.data_ptr() for x in column)
    assert addresses.addresses(column) == found


def test_no_addresses_of_nothing() -> None:
    assert addresses.guarded_addresses([]) == b""


@pytest.mark.parametrize("position", [0, 3, 5])
def test_the_same_objects(position: int) -> None:
    column = tensors()
    other = list(column)
    assert addresses.same(column, other)
    assert not addresses.same(column, other[:-1])

    other[position] = other[position].detach()

    assert not addresses.same(column, other)


def test_swapped_tensors_have_other_bodies() -> None:
    a, b, c = torch.ones(2), torch.zeros(3), torch.nn.Parameter(torch.ones(1))
    before = addresses.bodies([a, b, c])
    assert addresses.bodies([a, b, c]) == before

    torch.utils.swap_tensors(a, b)

    assert addresses.bodies([a, b, c]) != before


class Own(torch.Tensor):
    pass


def test_anything_may_be_fetched() -> None:
    """Leaves are looked at before it is known what they are."""
    things: list[Any] = [
        None,
        0,
        1.5,
        "",
        object(),
        [],
        Own(),
        torch.ones(2).to_sparse(),
        torch.empty(2, device="meta"),
    ]

    addresses.fetch(tensors() + things)
    addresses.fetch(things)
    addresses.fetch([])


def test_identities() -> None:
    things = [None, 0, tensors()[0], None]

    assert struct.unpack("4q", addresses.identities(things)) == tuple(map(id, things))


def test_a_library_without_the_functions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_functions", [])

    with pytest.raises(AttributeError):
        addresses.use(ctypes.CDLL(None))

    assert addresses._functions == []
