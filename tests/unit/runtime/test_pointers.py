"""The check of tensors against their specs, in C and in Python: each difference is found, and each pointer is right."""

import itertools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import (
    HealthCheck,
    given,
    settings,
    strategies as st,
)

from functional_optim._runtime import pointers
from functional_optim._runtime.library import HEAD, operations
from functional_optim._runtime.pointers import Difference, PointerReader, Pointers
from functional_optim._runtime.spec import TensorSpec, specs_of


@pytest.fixture(params=["C", "Python"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The operation in C, or the same comparison in Python."""
    if request.param == "Python":
        monkeypatch.setattr(pointers, "operations", lambda: None)
    elif operations() is None:
        pytest.skip("there is no C compiler")
    return str(request.param)


class Answer(NamedTuple):
    """The outcome of reading tensors: a difference, or the pointers."""

    difference: Difference | None
    pointers: list[int]


def read(bound: list[Any], tensors: list[Any]) -> Answer:
    """Binds a reader to some tensors, and reads others."""
    specs = specs_of(bound)
    reader, memory = PointerReader(bound, specs), Pointers(len(bound))  # type: ignore[arg-type]
    found = reader.read(tensors, memory)
    return Answer(found, [] if found else memory.memory[: len(bound)])


class Own(torch.Tensor):
    """A class that no kernel is handed."""


def meta(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def freed(x: torch.Tensor) -> torch.Tensor:
    x.untyped_storage().resize_(0)
    return x


def cut(x: torch.Tensor) -> torch.Tensor:
    x.untyped_storage().resize_(x.untyped_storage().nbytes() - 1)
    return x


def cut_to_half(x: torch.Tensor) -> torch.Tensor:
    x.untyped_storage().resize_(x.untyped_storage().nbytes() // 2)
    return x


# A way in which a tensor differs from one of shape (3, 3), and whether what differs is its memory only.
DIFFERENCES: dict[str, tuple[Callable[[torch.Tensor], Any], bool]] = {
    "dtype": (torch.Tensor.double, False),
    "dtype of the same size": (lambda x: x.view(torch.int32), False),
    "sizes": (lambda x: torch.zeros(3, 4), False),
    "sizes with the same strides": (lambda x: torch.zeros(4, 3), False),
    "number of dimensions": (lambda x: x[None], False),
    "fewer dimensions": (lambda x: x.flatten(), False),
    "many dimensions": (lambda x: x.view((1,) * 40 + (3, 3)), False),
    "no dimensions": (lambda x: torch.zeros(()), False),
    "no elements": (lambda x: x[:0], False),
    "strides": (lambda x: x.t(), False),
    "strides with holes": (lambda x: torch.zeros(3, 6)[:, ::2], False),
    "strides of zero": (lambda x: x[:1].expand(3, 3), False),
    "device": (meta, False),
    "layout": (torch.Tensor.to_sparse, False),
    "layout in rows": (
        lambda x: torch.sparse_csr_tensor(torch.tensor([0, 0, 0, 1]), torch.tensor([0]), torch.ones(1), (3, 3)),
        False,
    ),
    "class": (lambda x: x.as_subclass(Own), False),
    "no tensor": (lambda x: None, False),
    "a list": (lambda x: x.tolist(), False),
    "zero without memory": (lambda x: torch._efficientzerotensor((3, 3)), False),
    "freed storage": (freed, True),
    "cut storage": (cut, True),
}


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("position", [0, 2])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_each_difference_is_found(form: str, name: str, position: int) -> None:
    make, outside = DIFFERENCES[name]
    tensors: list[Any] = [torch.zeros(3, 3) for _ in range(4)]
    assert read(list(tensors), tensors).difference is None
    tensors[position] = make(torch.zeros(3, 3))

    found = read([torch.zeros(3, 3) for _ in range(4)], tensors).difference

    assert found is not None
    assert found.outside is outside
    # torch chooses the implementation for all tensors of a call, so the operation cannot say which lacks memory
    if form == "Python" or name not in ("device", "zero without memory"):
        assert found.position == position


def lazy_pairs() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Tensors with equal sizes and strides, of which the second is negated or conjugated when it is read."""
    z = torch.randn(4, dtype=torch.complex64)
    return {"negated": (z.imag, z.conj().imag), "conjugated": (z, z.conj())}


@pytest.mark.parametrize("name", lazy_pairs())
def test_lazily_computed_elements_are_a_difference(form: str, name: str) -> None:
    plain, lazy = lazy_pairs()[name]
    assert plain.stride() == lazy.stride()
    found = read([torch.zeros(2), plain], [torch.zeros(2), lazy]).difference
    assert found is not None
    assert not found.outside


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, device="meta"),
        torch.zeros(2).as_subclass(Own),
        torch.randn(2, dtype=torch.complex64).conj().imag,
        torch._efficientzerotensor((2,)),
    ],
    ids=["meta", "class", "negated", "zero"],
)
def test_tensors_without_plain_memory_can_be_bound(form: str, x: torch.Tensor) -> None:
    """They are compared; there is no memory to look at."""
    assert read([torch.zeros(3), x], [torch.ones(3), x]).difference is None
    assert read([x, torch.zeros(3)], [x, torch.zeros(4)]).difference == Difference(1, False)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(3, 0, 2),
        torch.zeros((2,) * 12),
        torch.zeros((1,) * 60),
        torch.zeros(5)[2:],
        torch.zeros(1).expand(4),
        torch.zeros(2, 6)[:, ::2],
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, dtype=torch.bool),
        torch.zeros(2, dtype=torch.float8_e5m2),
        torch.zeros(2, requires_grad=True),
        torch.zeros(2, requires_grad=True) * 2,
        torch.nn.Parameter(torch.zeros(2)),
    ],
    ids=lambda x: f"{type(x).__name__} {x.dtype} {x.ndim}d {x.stride()[:3]} {x.requires_grad}",
)
def test_pointers_of_tensors_like_those_that_were_bound(form: str, x: torch.Tensor) -> None:
    other = torch.zeros(7)
    assert read([other, x], [other, x]) == Answer(None, [other.data_ptr(), x.data_ptr()])


def test_tensors_of_inference_mode(form: str) -> None:
    with torch.inference_mode():
        x = torch.zeros(2)
        assert read([torch.zeros(2)], [x]) == Answer(None, [x.data_ptr()])
    assert read([torch.zeros(2)], [x]) == Answer(None, [x.data_ptr()])


def test_no_tensors(form: str) -> None:
    assert read([], []) == Answer(None, [])


def test_freed_storage_of_a_tensor_without_elements_is_no_difference(form: str) -> None:
    assert read([torch.zeros(0, 3)], [freed(torch.zeros(2, 3))[:0]]).difference is None


@pytest.mark.parametrize("x", [torch.zeros(3, 0)[2:], torch.zeros(2, 3, 0)[1]], ids=["rows", "matrix"])
def test_view_without_elements_behind_the_end_of_its_storage_is_no_difference(form: str, x: torch.Tensor) -> None:
    assert x.storage_offset() * x.element_size() > x.untyped_storage().nbytes()
    assert read([x], [x]).difference is None


def test_parameter_and_tensor_in_each_others_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are plain memory; C and Python agree on it."""
    if operations() is None:
        pytest.skip("there is no C compiler")
    bound: list[Any] = [torch.zeros(2), torch.nn.Parameter(torch.zeros(2))]
    in_c = read(bound, bound[::-1])
    monkeypatch.setattr(pointers, "operations", lambda: None)
    assert in_c == read(bound, bound[::-1])


def test_a_storage_that_ends_with_the_last_element(form: str) -> None:
    """One byte less is a difference; `cut` above shows it at the beginning of a storage, this in the middle."""
    bound, x = [torch.zeros(2, 6)[:, 1::2]], torch.zeros(14)
    view = x[2:].view(2, 6)[:, 1::2]
    assert read(bound, [view]).difference is None
    x.untyped_storage().resize_(14 * 4 - 1)
    assert read(bound, [view]).difference == Difference(0, True)


def test_a_reader_answers_again_after_a_difference(form: str) -> None:
    x, memory = torch.zeros(2), Pointers(2)
    reader = PointerReader([x, x], [s for s in specs_of([x, x]) if s])
    for tensors, found in [([x, x], None), ([x, torch.zeros(3)], Difference(1, False))] * 3:
        assert reader.read(tensors, memory) == found


@pytest.mark.parametrize("name", ["nothing", "sizes", "cut storage", "zero without memory"])
def test_tensors_are_freed_after_they_were_read(form: str, name: str) -> None:
    """An operation owns the list that it is given, those tensors among it that come after a difference."""
    tensors = [torch.zeros(3, 3) for _ in range(4)]
    bound, last = [torch.zeros(3, 3) for _ in range(4)], weakref.ref(tensors[3])
    if name != "nothing":
        tensors[1] = DIFFERENCES[name][0](tensors[1])
    assert (read(bound, tensors).difference is None) is (name == "nothing")  # type: ignore[arg-type]
    tensors.clear()
    assert last() is None


@pytest.mark.parametrize("n", [0, 1, 3, 4])
def test_another_number_of_tensors_reads_and_writes_nothing(n: int) -> None:
    """The operation does not trust its caller, who may be anybody: it is among `torch.ops`."""
    own = operations()
    if own is None:
        pytest.skip("there is no C compiler")
    x = torch.ones(2)
    reader = PointerReader([x, x], [TensorSpec.of(x)] * 2)
    memory = torch.zeros(3, dtype=torch.int64)
    own.read_pointers.default([x] * n, reader.spec_index, reader.table, memory)
    assert memory.tolist() == [0, 0, 0]
    own.read_pointers.default([x, x], reader.spec_index, reader.table, memory[:2])
    assert memory.tolist() == [0, 0, 0]
    own.read_pointers.default([x, x], reader.spec_index, reader.table, memory)
    assert memory.tolist() == [x.data_ptr(), x.data_ptr(), -1]


def with_dimensions(table: torch.Tensor) -> torch.Tensor:
    """A table whose rows say that tensors have 2**62 dimensions, twice which is no number."""
    table = table.clone()
    table[:, 4] = 2**62
    return table


def cut_short(x: torch.Tensor) -> torch.Tensor:
    """A copy whose storage ends before its last element."""
    x = x.clone()
    x.untyped_storage().resize_(x.untyped_storage().nbytes() - 8)
    return x


class Tables(NamedTuple):
    """The arguments of `read_pointers` behind the tensors."""

    index: torch.Tensor
    table: torch.Tensor
    memory: torch.Tensor


# arguments that are not as they are made here, and whether the first tensor differs then
STRANGE: dict[str, tuple[Callable[[Tables], Tables], bool]] = {
    "a row that is not there": (lambda t: t._replace(index=t.index + 1000), True),
    "a row before the first": (lambda t: t._replace(index=t.index - 1000), True),
    "rows without sizes": (lambda t: t._replace(table=t.table[:, :HEAD].contiguous()), True),
    "rows that are short": (lambda t: t._replace(table=t.table[:, :3].contiguous()), True),
    "an index of short integers": (lambda t: t._replace(index=t.index.int()), False),
    "a table of short integers": (lambda t: t._replace(table=t.table.int()), False),
    "columns for rows": (lambda t: t._replace(table=t.table.T.contiguous().T), False),
    "memory with gaps": (lambda t: t._replace(memory=t.memory.repeat(2)[::2]), False),
    "rows of more dimensions than any": (lambda t: t._replace(table=with_dimensions(t.table)), True),
    "an index in storage that was cut": (lambda t: t._replace(index=cut_short(t.index)), False),
    "a table in storage that was cut": (lambda t: t._replace(table=cut_short(t.table)), False),
}


@pytest.mark.parametrize("name", STRANGE)
def test_tables_of_another_form_are_not_trusted(name: str) -> None:
    own = operations()
    if own is None:
        pytest.skip("there is no C compiler")
    x, y = torch.ones(2, 3), torch.ones(4)
    reader = PointerReader([x, y], [TensorSpec.of(x), TensorSpec.of(y)])
    change, differs = STRANGE[name]
    tables = change(Tables(reader.spec_index, reader.table, torch.zeros(3, dtype=torch.int64)))
    own.read_pointers.default([x, y], *tables)
    assert tables.memory.tolist() == [0, 0, 0]  # 0 at the end: the first tensor differs, or nothing was read
    if differs:
        tables.memory[2] = 5
        own.read_pointers.default([x, y], *tables)
        assert tables.memory.tolist() == [0, 0, 0]


def test_wrappers_of_a_transformation_are_not_asked_for_memory(form: str) -> None:
    """A tensor that has left `torch.func.vmap` has torch's own class, and no memory of its own."""
    kept: list[torch.Tensor] = []
    torch.vmap(lambda x: (kept.append(x), x)[1])(torch.zeros(2, 3))
    reader = PointerReader(kept, [s for s in specs_of(kept) if s])
    assert reader.operation is None


# -- drawn tensors ----------------------------------------------------------------------------------------------------


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int32)
VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1) if x.ndim else x,
    "sliced": lambda x: x[..., ::2] if x.ndim else x,
    "later": lambda x: x[1:] if x.ndim and x.shape[0] > 1 else x,
    "expanded": lambda x: x[:1].expand(x.shape) if x.ndim and x.shape[0] else x,
    "freed": freed,
    "cut": lambda x: cut(x) if x.untyped_storage().nbytes() else x,
    "parameter": lambda x: torch.nn.Parameter(x, False),
    "meta": meta,
    "sparse": lambda x: x.to_sparse() if x.ndim else x,
    "class": lambda x: x.as_subclass(Own),
}


@st.composite
def tensors(draw: st.DrawFn, ways: tuple[str, ...] = tuple(VIEWS)) -> torch.Tensor:
    """A tensor of few sizes, so that two drawn ones are often alike."""
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    return VIEWS[draw(st.sampled_from(ways))](torch.zeros(shape, dtype=draw(st.sampled_from(DTYPES))))


def expected(bound: list[torch.Tensor], now: list[Any]) -> Difference | None:
    """The first difference, by the public attributes of each pair of tensors, and each element's place in memory."""
    classes = {type(x) for x in bound}
    for k, x in enumerate(now):
        if type(x) not in classes:
            return Difference(k, False)
    for k, (b, x) in enumerate(zip(bound, now, strict=True)):
        names = ("layout", "dtype", "shape", "device")
        if any(getattr(b, name) != getattr(x, name) for name in names) or b.stride() != x.stride():
            return Difference(k, False)
        places = itertools.product(*map(range, x.shape))
        last = max((sum(i * s for i, s in zip(place, x.stride(), strict=True)) for place in places), default=None)
        if last is not None and (x.storage_offset() + last + 1) * x.element_size() > x.untyped_storage().nbytes():
            return Difference(k, True)
    return None


@pytest.mark.slow
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_drawn_tensors(form: str, data: st.DataObject) -> None:
    """Each is like the one that was bound, or another."""
    ways = ("whole", "transposed", "sliced", "later", "expanded")
    bound = data.draw(st.lists(tensors(ways), max_size=4))
    now = []
    for x in bound:
        kind = data.draw(st.sampled_from(["same", "same", "alike", "freed", "other"]))
        alike = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        match kind:
            case "same":
                now.append(x)
            case "alike":
                now.append(alike)
            case "freed":
                now.append(freed(alike))
            case _:
                now.append(data.draw(tensors()))
    answer, difference = read(bound, now), expected(bound, now)
    # with a tensor on meta torch may choose an implementation that looks at none of them
    unseen = form == "C" and any(isinstance(x, torch.Tensor) and x.is_meta for x in now)
    assert answer.difference == difference or (unseen and answer.difference == Difference(0, False))
    if difference is None:
        assert answer.pointers == [x.data_ptr() for x in now]


# -- tensors that stay where they are ---------------------------------------------------------------------------------


def with_data(x: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    x.data = data
    return x


def imaginary() -> torch.Tensor:
    return torch.zeros(3, 3, dtype=torch.complex64).imag


# changes that leave a tensor one that fits
SAME = ("nothing", "other memory", "view of the same memory", "no elements, other memory")


def negated_in_one_piece(x: torch.Tensor) -> torch.Tensor:
    """The first elements of the memory of a tensor, negated when they are read."""
    assert x._base is not None
    z = torch.view_as_complex(x._base.view(-1, 2))
    return z.conj().imag.as_strided(x.shape, x.stride(), 0)


# A tensor, and a way in which it changes. Most leave it at its address.
CHANGES: dict[str, tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], Any]]] = {
    "transposed": (lambda: torch.zeros(3, 4), lambda x: x.t_()),
    "transposed square": (lambda: torch.zeros(3, 3), lambda x: x.t_()),
    "fewer rows": (lambda: torch.zeros(3, 3), lambda x: x.resize_(2, 3)),
    "one dimension more": (lambda: torch.zeros(3, 3), lambda x: x.unsqueeze_(0)),
    "one dimension": (lambda: torch.zeros(3, 3), lambda x: with_data(x, x.flatten())),
    "no dimensions": (lambda: torch.zeros(3, 3), lambda x: with_data(x, x[0, 0])),
    "dimensions": (lambda: torch.zeros(()), lambda x: with_data(x, x[None])),
    "other strides": (lambda: torch.zeros(4, 3), lambda x: with_data(x, x.as_strided((4, 3), (3, 0)))),
    "dtype of the same size": (lambda: torch.zeros(3, 3), lambda x: with_data(x, x.view(torch.int32))),
    "dtype of no elements": (lambda: torch.zeros(0), lambda x: with_data(x, torch.zeros(0, dtype=torch.int32))),
    "conjugated": (lambda: torch.zeros(3, dtype=torch.complex64), lambda x: with_data(x, x.conj())),
    "negated": (imaginary, lambda x: with_data(x, x._base.conj().imag)),  # type: ignore[union-attr]
    "negated row": (lambda: imaginary()[1], lambda x: with_data(x, x._base.conj().imag[1])),  # type: ignore[union-attr]
    "negated number": (
        lambda: imaginary()[1, 1],
        lambda x: with_data(x, x._base.conj().imag[1, 1]),  # type: ignore[union-attr]
    ),
    "negated in one piece": (lambda: torch.zeros(8)[:4], lambda x: with_data(x, negated_in_one_piece(x))),
    "zero without memory": (lambda: torch.zeros(3), lambda x: torch._efficientzerotensor((3,))),
    "device": (lambda: torch.zeros(3), meta),
    "device, without elements": (lambda: torch.zeros(0), meta),
    "freed": (lambda: torch.zeros(3), freed),
    "cut": (lambda: torch.zeros(3), cut),
    "cut in the middle": (lambda: torch.zeros(9)[4:6], cut_to_half),
    "class": (lambda: torch.zeros(3), lambda x: x.as_subclass(Own)),
    "sparse": (lambda: torch.zeros(3, 3), torch.Tensor.to_sparse),
    "nothing": (lambda: torch.zeros(3, 3), lambda x: x),
    "parameter": (lambda: torch.zeros(3, 3), torch.nn.Parameter),
    "other memory": (lambda: torch.zeros(3, 3), lambda x: with_data(x, torch.ones(3, 3))),
    "view of the same memory": (lambda: torch.zeros(3, 3), lambda x: x.detach()),
    "no elements, other memory": (lambda: torch.zeros(0, 3), lambda x: torch.zeros(0, 3)),
}


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_a_tensor_that_has_been_read_is_found(form: str, name: str, position: int) -> None:
    """A reader that has read the tensors before answers as one that sees them for the first time."""
    make, change = CHANGES[name]
    tensors: list[Any] = [torch.zeros(2), torch.zeros(2), torch.zeros(2)]
    tensors[position] = make()
    specs = [TensorSpec.of(x) for x in tensors]
    bound = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in tensors]
    reader, fresh = PointerReader(bound, specs), PointerReader(bound, specs)
    memory, other = Pointers(3), Pointers(3)
    for _ in range(2):
        assert reader.read(tensors, memory) is None
    tensors[position] = change(tensors[position])

    for _ in range(2):
        found = reader.read(tensors, memory)
        assert found == fresh.read(tensors, other)
        assert reader.fits(tensors) is (found is None)
        if found is None:
            assert memory.content() == other.content()
        else:
            assert name not in SAME


# -- the operations ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["read_pointers", "describe", "new_tensors"])
def test_torch_checks_of_custom_operations(name: str) -> None:
    """Schema, autograd, fake tensors and tracing, as `torch.library.opcheck` tests them."""
    if operations() is None:
        pytest.skip("there is no C compiler")
    x = [torch.zeros(2), torch.zeros(3, 2)]
    reader, memory = PointerReader(x, [s for s in specs_of(x) if s]), torch.zeros(3, dtype=torch.int64)
    arguments = {
        "read_pointers": (x, reader.spec_index, reader.table, memory),
        "describe": (x, reader.table.clone()),
        "new_tensors": (reader.spec_index, reader.table, memory[:2]),
    }
    # shapes that stand in a table cannot be known of fake tensors, which no step is taken with
    tests = ("test_schema", "test_autograd_registration") if name == "new_tensors" else None
    operation = getattr(operations(), name).default
    found = torch.library.opcheck(operation, arguments[name], **({} if tests is None else {"test_utils": tests}))
    assert set(found.values()) == {"SUCCESS"}
