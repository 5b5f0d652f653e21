"""What is asked of thousands of tensors at once, in C."""

import ctypes
import struct
import sys
import warnings
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import pytest
import torch

import functional_optim as fo
from functional_optim.kernels import Column, native, scan
from functional_optim.kernels.guard import Guard
from functional_optim.kernels.interior import find_interior
from functional_optim.kernels.launch import compile_c
from functional_optim.kernels.scan import Found, Kinds, find


def tensors() -> list[torch.Tensor]:
    x = torch.arange(24.0)
    return [
        x,
        x[5:],
        x.view(4, 6).t(),
        x.view(2, 3, 4)[:, 1],
        torch.nn.Parameter(x[3:4]),
        torch.empty(0),
        torch.tensor(1.0, dtype=torch.float64),
        torch.ones(2, 1, 3, 1, 2, 1, 2, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.float16),
    ]


def kinds_of(column: list[torch.Tensor]) -> Kinds:
    found = Kinds.of(column, range(len(column)))
    assert found is not None
    return found


def find_in(kinds: Kinds, column: list[Any]) -> Found | None:
    found = find([kinds], [column])
    return None if found is None else found[0]


def numbers(packed: bytes) -> tuple[int, ...]:
    return struct.unpack(f"{len(packed) // 8}q", packed)


def test_tensors_are_where_torch_says(in_c: None) -> None:
    column = tensors() * 3

    found = find_in(kinds_of(column), column)

    assert found is not None
    assert numbers(found.addresses) == tuple(x.data_ptr() for x in column)
    x, part, view, *_ = numbers(found.versions)
    assert x == part == view != 0
    assert scan.addresses(column) == found.addresses


def test_like_tensors_are_somewhere_else(in_c: None) -> None:
    column, other = tensors(), tensors()

    found = find_in(kinds_of(column), other)

    assert found is not None
    assert numbers(found.addresses) == tuple(x.data_ptr() for x in other)


def test_nothing_is_found_of_nothing(in_c: None) -> None:
    assert find_in(kinds_of([]), []) == Found(b"", b"")


def test_what_does_not_count_may_be_anything(in_c: None) -> None:
    column: list[Any] = [None, torch.ones(2), 1.5]
    kinds = Kinds.of(column, [1])
    assert kinds is not None

    found = find_in(kinds, ["x", torch.ones(2), object()])  # type: ignore[list-item]

    assert found is not None
    assert numbers(found.addresses)[::2] == (0, 0)
    assert find_in(kinds, [None, None, None]) is None  # type: ignore[list-item]


class Own(torch.Tensor):
    pass


def inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(2, 3)


# each differs from torch.ones(2, 3) in one thing
OTHERS: dict[str, Callable[[], Any]] = {
    "a dimension more": lambda: torch.ones(2, 3, 1),
    "a dimension less": lambda: torch.ones(6),
    "no dimension": lambda: torch.ones(()),
    "another size": lambda: torch.ones(2, 4)[:, :3].contiguous()[:, :2],
    "sizes exchanged": lambda: torch.ones(3, 2),
    "other strides": lambda: torch.ones(3, 2).t(),
    "another dtype": lambda: torch.ones(2, 3, dtype=torch.bfloat16),
    "another dtype of that size": lambda: torch.ones(2, 3, dtype=torch.int32),
    "a parameter": lambda: torch.nn.Parameter(torch.ones(2, 3)),
    "another class": lambda: torch.ones(2, 3).as_subclass(Own),
    "on meta": lambda: torch.ones(2, 3, device="meta"),
    "sparse": lambda: torch.ones(2, 3).to_sparse(),
    "compressed": lambda: torch.ones(2, 3).to_sparse_csr(),
    "negated": lambda: torch._neg_view(torch.ones(2, 3)),
    "zero without memory": lambda: torch._efficientzerotensor((2, 3)),
    "functional": lambda: torch._to_functional_tensor(torch.ones(2, 3)),
    "an inference tensor": inference,
    "None": lambda: None,
    "a number": lambda: 1.0,
    "a string": lambda: "",
    "an object": object,
    "a list": lambda: [torch.ones(2, 3)],
    "torch itself": lambda: torch,
    "a class of tensors": lambda: torch.Tensor,
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("position", [0, 20, 39])
def test_another_kind_is_seen(in_c: None, position: int, name: str) -> None:
    column: list[Any] = [torch.ones(2, 3) for _ in range(40)]
    kinds = kinds_of(column)
    assert find_in(kinds, column) is not None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, that some layouts are new
        column[position] = OTHERS[name]()

    assert find_in(kinds, column) is None
    if name not in ("an inference tensor", "functional"):  # which only C tells apart
        assert not Guard(Column([torch.ones(2, 3)])).holds(Column([column[position]]))


def test_wrappers_of_torch_func_are_seen(in_c: None) -> None:
    kinds, left = kinds_of([torch.ones(2, 3)]), []

    def inside(x: torch.Tensor) -> torch.Tensor:
        assert find_in(kinds, [x]) is None
        left.append(x)
        return x.sum()

    torch.func.grad(inside)(torch.ones(2, 3))
    torch.func.vmap(inside)(torch.ones(4, 2, 3))
    assert all(find_in(kinds, [x]) is None for x in left)


@pytest.mark.parametrize("length", [0, 1, 3])
def test_another_length_is_seen(in_c: None, length: int) -> None:
    assert find_in(kinds_of([torch.ones(2)] * 2), [torch.ones(2)] * length) is None


CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "another view": lambda x: setattr(x, "data", x.data[:1]),
    "transposed": lambda x: x.t_(),
    "a dimension more": lambda x: x.unsqueeze_(0),
    "another dtype": lambda x: setattr(x, "data", x.data.double()),
    "resized": lambda x: x.resize_(1, 3),
    "swapped": lambda x: torch.utils.swap_tensors(x, torch.ones(3, 3)),
    "swapped for another class": lambda x: torch.utils.swap_tensors(x, torch.ones(2, 3).as_subclass(Own)),
    "swapped for a sparse one": lambda x: torch.utils.swap_tensors(x, torch.ones(2, 3).to_sparse()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_becomes_of_a_tensor_is_seen(in_c: None, name: str) -> None:
    column = [torch.ones(2, 3), torch.ones(2, 3)]
    kinds = kinds_of(column)

    CHANGES[name](column[1])

    assert find_in(kinds, column) is None


def test_other_memory_is_found(in_c: None) -> None:
    x = torch.ones(2, 3)
    kinds, other = kinds_of([x]), torch.zeros(2, 3)

    x.data = other

    found = find_in(kinds, [x])
    assert found is not None
    assert numbers(found.addresses) == (other.data_ptr(),)


def test_parts_of_one_tensor_share_their_version(in_c: None) -> None:
    x = torch.ones(4)
    column = [x, x[1:], x.detach(), x.data, torch.ones(4)]

    found = find_in(kinds_of(column), column)

    assert found is not None
    own, part, detached, data, other = numbers(found.versions)
    assert own == part == detached
    assert len({own, data, other}) == 3


@pytest.mark.parametrize("offset", [0, 8])
@pytest.mark.parametrize("size", [0, 4, 36])
def test_a_storage_that_is_freed_or_cut_is_seen(in_c: None, offset: int, size: int) -> None:
    x = torch.ones(16)
    column = [torch.ones(8), x[offset : offset + 8]]
    kinds = kinds_of(column)
    assert find_in(kinds, column) is not None

    x.untyped_storage().resize_(size)

    assert (find_in(kinds, column) is None) == (size < 4 * (offset + 8))


@pytest.mark.parametrize("n_threads", [1, 2, 4])
@pytest.mark.parametrize("sizes", [(0,), (1, 127, 128, 129), (700, 0, 1300), (3000,)])
def test_threads_share_the_lists(
    in_c: None, sizes: tuple[int, ...], n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "SHARE", 1)
    monkeypatch.setattr(scan, "SERIAL", -1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    columns = [[torch.ones(k % 3) for k in range(n)] for n in sizes]
    kinds = [kinds_of(column) for column in columns]

    found = find(kinds, columns)

    assert found is not None
    assert [numbers(x.addresses) for x in found] == [tuple(x.data_ptr() for x in column) for column in columns]
    for column in columns:
        for k in {0, len(column) // 2, len(column) - 1} if column else ():
            kept, column[k] = column[k], torch.ones(k % 3, dtype=torch.float64)
            assert find(kinds, columns) is None
            column[k] = kept
    assert find(kinds, columns) == found


@pytest.mark.usefixtures("either")
def test_versions_of_tensors_of_any_class() -> None:
    base = torch.ones(4)
    tensors = [base, base[1:], torch.nn.Parameter(torch.ones(2)), torch.ones(2).as_subclass(Listening)]

    for column in (tensors, tensors[::-1]):
        before = [x._version for x in tensors]
        scan.count_up_all(column)
        assert [x._version - k for x, k in zip(tensors, before, strict=True)] == [2, 2, 1, 1]
    scan.count_up_all([])


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "a default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("mode", MODES)
def test_it_does_not_depend_on_modes(in_c: None, mode: str) -> None:
    with MODES[mode]():
        assert find_interior() == find_interior() is not None


class Shouting(torch.Tensor):
    """Answers for itself when it is asked for its gradient."""

    @property
    def grad(self) -> Any:
        return "mine"


class Listening(torch.Tensor):
    """Hears of it when it is asked for its gradient."""

    heard = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.heard += func == torch.Tensor.grad.__get__
        return super().__torch_function__(func, types, args, kwargs or {})


class Mode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return "of a mode" if func == torch.Tensor.grad.__get__ else func(*args, **(kwargs or {}))


def parameters(n: int, cls: type = torch.nn.Parameter) -> list[Any]:
    made = [torch.ones(2).as_subclass(cls) if cls is not torch.nn.Parameter else cls(torch.ones(2)) for _ in range(n)]
    for k, x in enumerate(made):
        x.requires_grad_()
        if k % 3:
            x.sum().backward()
    return made


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("cls", [torch.nn.Parameter, torch.Tensor, Listening])
@pytest.mark.parametrize("n", [0, 1, 5, 100])
def test_gradients(n: int, cls: type) -> None:
    params = parameters(n, cls)
    expected = [x.grad for x in params]
    before = [sys.getrefcount(g) for g in expected if g is not None]

    found = scan.gradients(params)

    assert all(x is y for x, y in zip(found, expected, strict=True))
    del found
    assert [sys.getrefcount(g) for g in expected if g is not None] == before


def test_gradients_that_python_has_not_seen(in_c: None) -> None:
    params = parameters(40)

    found = scan.gradients(params)

    assert [g is None for g in found] == [k % 3 == 0 for k in range(40)]
    assert all(
        g is x.grad and torch.equal(g, torch.ones(2)) for g, x in zip(found, params, strict=True) if x.grad is not None
    )


def test_gradients_are_taken_in_c(in_c: None) -> None:
    """If this fails, torch has renamed the functions: all works, but takes longer."""
    params, out = parameters(2), [None, None]
    functions = native.loaded[0]

    assert functions.gradients(functions.torch, params, 2, id(torch.nn.Parameter), "grad", out) == 2
    assert (
        functions.gradients(functions.torch, [*params, torch.ones(1)], 3, id(torch.nn.Parameter), "grad", [0] * 3) == 2
    )


@pytest.mark.usefixtures("either")
def test_classes_and_modes_that_have_a_say() -> None:
    Listening.heard = 0
    assert scan.gradients([torch.ones(2).as_subclass(Shouting)] * 3) == ["mine"] * 3
    scan.gradients(parameters(4, Listening))
    assert Listening.heard == 4
    with Mode():
        assert scan.gradients(parameters(2)) == ["of a mode"] * 2


@pytest.mark.usefixtures("either")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_gradients_of_all_sorts() -> None:
    own, (leaf,) = Own(), parameters(1)
    params = [leaf, leaf * 2, own]

    assert scan.gradients(params) == [None, None, own.grad]
    with pytest.raises(AttributeError, match="grad"):
        scan.gradients([leaf, object()])


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("grad", [False, True])
def test_a_guard_sees_what_requires_a_gradient(grad: bool) -> None:
    guard = Guard(Column([torch.ones(2), torch.ones(2)]))
    other = Column([torch.ones(2), torch.ones(2, requires_grad=True)])

    with torch.set_grad_enabled(grad):
        assert [guard.holds(other) for _ in range(3)] == [not grad] * 3  # from the second time on in C


def test_torch_that_is_made_otherwise(in_python: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not known is asked from Python, and kernels run."""

    def fail() -> None:
        raise AttributeError("module 'torch._C' has no attribute '_neg_view'")

    monkeypatch.setattr(native, "find_interior", fail)
    native._interior.cache_clear()
    compile_c.cache_clear()
    own = 0.5009765625  # of no other test, whose plans would be looked at in C
    params, tx = [torch.ones(2), torch.ones(3)], fo.sgd(0.5, momentum=own)
    try:
        state = tx.init(params)
        for _ in range(3):
            fo.apply_gradients(tx, params, [torch.ones(2), torch.ones(3)], state, donate=True)
        backends = fo.explain(tx, params).backends
    finally:
        native._interior.cache_clear()

    assert native.loaded == []
    assert backends == ("c",)
    expected = 1 - (1 + (1 + own) + (1 + own + own**2)) / 2
    # five roundings of float32 to numbers below 2
    torch.testing.assert_close(params, [torch.full((n,), expected) for n in (2, 3)], rtol=0, atol=5 * 2**-24)


def test_parts_of_a_column_are_those_that_are_asked_for() -> None:
    """A getter that is gone may have the place in memory of the next one."""
    column = Column([torch.full((), float(k)) for k in range(6)])

    for k in [*range(5)] * 20:
        part = column.part(itemgetter(k, k + 1))
        assert [float(x) for x in part] == [k, k + 1]


def test_a_library_without_the_functions_is_refused(in_python: None) -> None:
    with pytest.raises(AttributeError):
        native.use(ctypes.CDLL(None))

    assert native.loaded == []
