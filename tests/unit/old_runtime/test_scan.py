"""What is asked of thousands of tensors at once, in C."""

import ctypes
import struct
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import functional_optim as fo
from functional_optim.kernels import Column, Part, native, scan
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


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "a default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("mode", MODES)
def test_it_does_not_depend_on_modes(in_c: None, mode: str) -> None:
    with MODES[mode]():
        assert find_interior() == find_interior() is not None


class Holder(torch.Tensor):
    """Stands for another tensor, as a distributed tensor does for the part of it that is here."""

    __slots__ = ("held",)
    held: torch.Tensor


def hold(x: torch.Tensor) -> Holder:
    holder = torch.zeros(1).as_subclass(Holder)
    holder.held = x
    return holder


HELD = scan.part_of(hold(torch.ones(1)), "held")


class Tree:
    """Parameters of which every third has no gradient, and their states, of which every fifth lacks a slot.

    Args:
      n: how many there are.
      held: whether all are held by others.
    """

    def __init__(self, n: int, held: bool) -> None:
        self.n, self.part = n, HELD if held else None
        self.params: list[Any] = [torch.ones(k % 4, requires_grad=True) for k in range(n)]
        for k, p in enumerate(self.params):
            if k % 3:
                p.sum().backward()  # Python has not seen these gradients
        self.states: list[Any] = [{"a": torch.ones(k % 4), "b": torch.zeros(())} for k in range(n)]
        if held:
            self.params = [hold(p) for p in self.params]
            for p in self.params:
                if p.held.grad is not None:
                    p.grad = hold(p.held.grad)
            self.states = [{"a": hold(s["a"]), "b": s["b"]} for s in self.states]
        for k, s in enumerate(self.states):
            if k % 5 == 0:
                del s["b"]
        self.takes = [
            scan.Take(self.params, scan.What.GRADIENT, self.part),
            scan.Take(self.params, scan.What.ITSELF, self.part),
            scan.Take(self.states, "a", self.part),
            scan.Take(self.states, "b"),
        ]
        there = self.there()
        self.kinds = [Kinds.of(c, [k for k, x in enumerate(c) if x is not None]) for c in there]
        self.search = scan.Search([x for x in self.kinds if x is not None], self.takes)

    def there(self) -> list[list[Any]]:
        """What the lists are filled with."""

        def meant(x: Any) -> Any:
            return x.held if isinstance(x, Holder) else x

        columns = [[p.grad for p in self.params], self.params, *[[s.get(k) for s in self.states] for k in "ab"]]
        return [[meant(x) for x in column] for column in columns]

    def find(self) -> tuple[list[list[Any]], list[Found] | None]:
        columns: list[list[Any]] = [[None] * self.n for _ in self.takes]
        return columns, self.search.find(columns)


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("n", [0, 1, 7, 64, 65, 700])
def test_lists_are_filled(in_c: None, n: int, held: bool, n_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "SHARE", 1)
    monkeypatch.setattr(scan, "SERIAL", -1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    tree = Tree(n, held)
    expected = tree.there()
    before = [[sys.getrefcount(x) for x in column] for column in expected]

    for _ in range(3):
        columns, found = tree.find()

        assert found is not None
        assert all(x is y for a, b in zip(columns, expected, strict=True) for x, y in zip(a, b, strict=True))
        for places, column in zip(found, expected, strict=True):
            assert numbers(places.addresses) == tuple(0 if x is None else x.data_ptr() for x in column)
        del columns
    counts = [[sys.getrefcount(x) for x in column] for column in expected]
    assert [
        (a, b) for x, y, c in zip(counts, before, expected, strict=True) for a, b, o in zip(x, y, c, strict=True)
        if a != b and o is not None
    ] == []  # fmt: skip


def test_gradients_that_python_has_not_seen(in_c: None) -> None:
    tree = Tree(40, held=False)
    other = Tree(40, held=False)
    tree.takes[0] = scan.Take(other.params, scan.What.GRADIENT)
    columns: list[list[Any]] = [[None] * 40]

    found = scan.Search([tree.search.kinds[0]], tree.takes[:1]).find(columns)

    assert found is not None
    assert [g is None for g in columns[0]] == [k % 3 == 0 for k in range(40)]
    assert all(g is p.grad for g, p in zip(columns[0], other.params, strict=True))


def test_versions_of_those_that_hold_others(in_c: None) -> None:
    tree = Tree(4, held=True)
    tree.params[2] = tree.takes[1].objects[2] = tree.params[2].held  # not all need be held

    _, found = tree.find()

    assert found is not None
    outers, inners = numbers(found[1].outers), numbers(found[1].versions)
    assert outers[2] == 0
    assert len({*outers, *inners}) == 8
    assert [bool(x.outers) for x in found] == [False, True, False, False]


def doubled(x: Any) -> tuple[str, torch.Tensor]:
    return ("held", x.held.double()) if isinstance(x, Holder) else ("data", x.data.double())


def replace(key: str, value: Any) -> Callable[[Tree], object]:
    return lambda tree: tree.states[67].__setitem__(key, value)


TREES: dict[str, Callable[[Tree], object]] = {
    "a gradient that is gone": lambda tree: setattr(tree.params[67], "grad", None),
    "a new gradient": lambda tree: setattr(tree.params[66], "grad", torch.ones_like(tree.params[66])),
    "a double gradient": lambda tree: setattr(tree.params[67].grad, *doubled(tree.params[67].grad)),
    "a gradient of another class": lambda tree: setattr(
        tree.params[67], "grad", tree.params[67].grad.detach().as_subclass(Own)
    ),
    "a gradient that is a parameter": lambda tree: setattr(
        tree.params[67], "grad", torch.nn.Parameter(tree.params[67].grad.detach())
    ),
    "a key that is missing": lambda tree: tree.states[67].pop("a"),
    "a dict of another class": lambda tree: tree.states.__setitem__(67, Heard(tree.states[67])),
    "no dict": lambda tree: tree.states.__setitem__(67, None),
    "None": replace("a", None),
    "a number": replace("b", 1.0),
    "another shape": replace("a", torch.ones(7)),
    "another dtype": replace("b", torch.zeros((), dtype=torch.float64)),
    "another parameter": lambda tree: tree.params.__setitem__(67, torch.ones(9)),
    "no parameter": lambda tree: tree.params.__setitem__(66, "p"),
    "a parameter of another class": lambda tree: tree.params.__setitem__(66, tree.params[66].as_subclass(Own)),
    "a part that is gone": lambda tree: tree.part and delattr(tree.params[67], "held"),
    "a part of another shape": lambda tree: tree.part and setattr(tree.params[67], "held", torch.ones(9)),
    "a part of a gradient that is gone": lambda tree: tree.part and delattr(tree.params[67].grad, "held"),
    "a part of state that is gone": lambda tree: tree.part and delattr(tree.states[67]["a"], "held"),
}


class Heard(dict[str, Any]):
    pass


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("change", TREES)
def test_what_lists_are_filled_with_has_changed(
    in_c: None, change: str, held: bool, n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not held and change.startswith("a part"):
        pytest.skip("nothing has parts")
    monkeypatch.setattr(scan, "SHARE", 1)
    monkeypatch.setattr(scan, "SERIAL", -1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    tree = Tree(130, held)
    assert tree.find()[1] is not None

    TREES[change](tree)

    assert tree.find()[1] is None


def test_gradients_are_taken_in_c(in_c: None) -> None:
    """If this fails, torch has renamed the functions: all works, but takes longer."""
    theirs = ctypes.CDLL(torch._C.__file__)

    assert all(hasattr(theirs, name) for name in native._GRADIENT)


def test_parts_that_are_not_in_slots() -> None:
    assert (Holder, "held") == HELD
    assert scan.part_of(torch.ones(1), "grad") is None
    assert scan.part_of(torch.ones(1), "held") is None


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


@pytest.mark.usefixtures("either")
def test_parts_of_a_column_are_those_that_are_asked_for() -> None:
    """One that is gone may have the place in memory of the next one."""
    column = Column([torch.full((), float(k)) for k in range(6)])
    guard = Guard(column)
    for _ in range(2):
        assert guard.holds(column)

    for k in [*range(5)] * 20:
        part = column.part(Part((k, k + 1)))
        assert [float(x) for x in part] == [k, k + 1]
        assert numbers(part.addresses) == tuple(x.data_ptr() for x in part)
    assert [float(x) for x in column.part(Part((3,)))] == [3]


def test_a_library_without_the_functions_is_refused(in_python: None) -> None:
    with pytest.raises(AttributeError):
        native.use(ctypes.CDLL(None))

    assert native.loaded == []
