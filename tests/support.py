"""What tests of trees, states and steps share: records of memory to the bit, seeded trees, rules that pickle finds."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch

import functional_optim as fo


Tree = Any
NAMESPACE = "functional_optim"

# Formulas in double precision whose operations are ordered differently are a few units of 2**-53 apart in each
# operation. What enlarges that most is 1 - b2**t at t = 1 and b2 = 0.999, which loses three of sixteen digits:
# 2**-53 / 1e-3 = 1.1e-13. Twenty steps of size 1e-2 add up errors of that size in parameters of order one.
DOUBLE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14}


def leaves(tree: Tree) -> list[Any]:
    """The leaves of a tree; None is one."""
    return optree.tree_leaves(tree, none_is_leaf=True, namespace=NAMESPACE)


def tree_map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Applies a function to the leaves of trees that are there."""
    return optree.tree_map(
        lambda x, *xs: None if x is None else fn(x, *xs), tree, *rest, none_is_leaf=True, namespace=NAMESPACE
    )


def clone(tree: Tree) -> Tree:
    """A deep copy of the tensors of a tree, with their strides and whether they require a gradient."""

    def each(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        copy = x.detach().clone()
        return (torch.nn.Parameter(copy) if isinstance(x, torch.nn.Parameter) else copy).requires_grad_(x.requires_grad)

    return tree_map(each, tree)


def make_tree(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """A small tree of normal deviates: a matrix, a vector and a number."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (4, 3), "bias": (3,), "scale": ()}
    return {k: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for k, shape in shapes.items()}


def like(tree: Tree, seed: int) -> Tree:
    """Normal deviates in the shapes, layouts and dtypes of a tree."""
    generator = torch.Generator().manual_seed(seed)

    def each(x: torch.Tensor) -> torch.Tensor:
        new = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return torch.empty_like(x, requires_grad=False).copy_(new)

    return tree_map(each, tree)


def train(tx: Any, params: Tree, grads: Sequence[Tree], state: Any = None, donate: bool = False, **extra: Any) -> Any:
    """Steps through a list of gradients."""
    state = tx.init(params) if state is None else state
    for g in grads:
        params, state = fo.apply_gradients(tx, params, g, state, donate=donate, **extra)
    return params, state


def trajectory(tx: Any, params: Any, grads: list[Any]) -> Any:
    """The parameters of each step, by a transformation."""
    state, steps = tx.init(params), []
    for g in grads:
        params, state = fo.apply_gradients(tx, params, g, state)
        steps.append(params)
    return steps


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor's elements, in which NaN equals itself and -0.0 is not 0.0."""
    return x.detach().resolve_neg().contiguous().clone().reshape(-1).view(torch.uint8)


class Record(NamedTuple):
    """All that can be seen of a leaf."""

    kind: type
    meta: tuple[Any, ...]
    version: int
    content: Any


def _record(x: Any) -> Record:
    if not isinstance(x, torch.Tensor):
        return Record(type(x), (), 0, x)
    if x.layout is not torch.strided:
        return Record(type(x), (x.dtype, x.shape), x._version, bits(x.detach().to_dense()))
    meta = (x.dtype, x.shape, x.stride(), x.device, x.requires_grad)
    if x.device.type == "meta":
        return Record(type(x), meta, x._version, None)
    return Record(type(x), (*meta, x.data_ptr()), x._version, bits(x))


class Snapshot:
    """What trees are at one moment: their leaves by identity, and each tensor's memory, layout and version.

    Args:
      *trees: trees of tensors and of anything else.
    """

    def __init__(self, *trees: Tree) -> None:
        self.trees = trees
        self.leaves = leaves(trees)
        self.records = [_record(x) for x in self.leaves]

    def check(self) -> None:
        """Asserts that everything still is what it was, to the bit."""
        now = leaves(self.trees)
        assert list(map(id, now)) == list(map(id, self.leaves))
        for x, (kind, meta, version, content) in zip(now, self.records, strict=True):
            new = _record(x)
            assert (new.kind, new.meta, new.version) == (kind, meta, version)
            if isinstance(content, torch.Tensor):
                torch.testing.assert_close(new.content, content, rtol=0, atol=0)
            else:
                assert new.content is content


def assert_same_bits(actual: Tree, expected: Tree) -> None:
    """Asserts that two trees have one structure and, to the bit, the same tensors."""
    structures = [optree.tree_structure(t, none_is_leaf=True, namespace=NAMESPACE) for t in (actual, expected)]
    assert structures[0] == structures[1]
    for x, y in zip(leaves(actual), leaves(expected), strict=True):
        if isinstance(y, torch.Tensor):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            torch.testing.assert_close(bits(x), bits(y), rtol=0, atol=0)
        else:
            assert x == y


@fo.elementwise(extra=("value",))
def scale_by_value(u: torch.Tensor, *, value: Any, factor: Any = 1.0) -> torch.Tensor:
    """A rule of the tests' own that needs an extra argument."""
    return u * value * factor


@fo.elementwise(state={"best": fo.slot("first_update"), "seen": fo.slot(1.0, per="leaf")})
def remember_first(
    u: torch.Tensor, best: torch.Tensor, seen: torch.Tensor, *, rate: Any = 0.5
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A rule of the tests' own with two kinds of slots."""
    best = best + rate * (u - best)
    return best, best, seen * rate


def is_matrix(path: str, p: torch.Tensor) -> bool:
    """A mask that pickle finds."""
    return p.ndim > 1


class Halve:
    """An optimizer from elsewhere: it has `init` and `update`, and takes no extra arguments."""

    def init(self, params: Tree) -> tuple[()]:
        return ()

    def update(self, updates: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, Any]:
        return tree_map(lambda u: u / 2, updates), state


class TimesValue:
    """An optimizer from elsewhere that takes extra arguments, counts its calls and remembers what it was given."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def init(self, params: Tree) -> dict[str, int]:
        return {"calls": 0}

    def update(self, updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, Any]:
        self.calls.append(extra)
        return tree_map(lambda u: u * extra["value"], updates), {"calls": state["calls"] + 1}
