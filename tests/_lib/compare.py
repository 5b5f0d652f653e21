"""Comparisons to the bit or within derived bounds, and snapshots of all that a step may change."""

from typing import Any, NamedTuple

import optree
import torch

from _lib.trees import BF16, F16, F32, F64, NAMESPACE, Tree, leaves, tensors


# Formulas in double precision whose operations are ordered differently are a few units of 2**-53 apart in each
# operation. What enlarges that most is 1 - b2**t at t = 1 and b2 = 0.999, which loses three of sixteen digits:
# 2**-53 / 1e-3 = 1.1e-13. Twenty steps of size 1e-2 add up errors of that size in parameters of order one.
DOUBLE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14}
# The same operations in the same order: the same bits.
EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 0.0}
# Backends compute the same formula in the same order, so they differ where libraries do: a square root or a power by
# an ulp, a sum over many elements by its order, in double precision, which float32 rarely shows. A formula of the
# tests hands on at most some ten of these, to which its own roundings add, over three steps. What is stored in a half
# type is rounded from float32: where both sides of a rounding boundary are met, values are one ulp apart, and the next
# step may round it once more.
TOLERANCE = {F32: 32 * 2**-24, F64: 32 * 2**-53, BF16: 2 * 2**-8, F16: 2 * 2**-11}


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
    """Trees at one moment: their leaves by identity, and each tensor's memory, layout and version.

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
                assert_equal_bytes(new.content, content)
            else:
                assert new.content is content


def assert_equal_bytes(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Asserts that two tensors of bytes are equal; the message, which takes twenty times as long, is made if not."""
    if not torch.equal(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_same_bits(actual: Tree, expected: Tree) -> None:
    """Asserts that two trees have one structure and, to the bit, the same tensors."""
    structures = [optree.tree_structure(t, none_is_leaf=True, namespace=NAMESPACE) for t in (actual, expected)]
    assert structures[0] == structures[1]
    for x, y in zip(leaves(actual), leaves(expected), strict=True):
        if isinstance(y, torch.Tensor):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            assert_equal_bytes(bits(x), bits(y))
        else:
            assert x == y


def assert_alike(actual: Any, expected: Any) -> None:
    """Compares trees of tensors, each dtype by its own tolerance, relative to the largest number in the trees.

    What is small may have been left by large numbers that cancel.
    """
    assert optree.tree_structure(actual) == optree.tree_structure(expected)
    numbers = torch.cat([torch.ones(1, dtype=F64), *(x.double().flatten() for x in tensors(expected))])
    scale = numbers.nan_to_num(0, 0, 0).abs().amax().item()
    for x, y in zip(tensors(actual), tensors(expected), strict=True):
        bound = TOLERANCE.get(y.dtype, 0)
        torch.testing.assert_close(x, y, rtol=bound, atol=bound * scale, equal_nan=True)


def ulps(actual: torch.Tensor, expected: torch.Tensor, *terms: torch.Tensor) -> torch.Tensor:
    """The difference of two tensors in units in the last place.

    A unit is that of the largest of the numbers: a sum that cancels has the errors of its terms.
    """
    largest = torch.stack([x.detach().abs() for x in (actual, expected, *terms)]).amax(0)
    largest = largest.clamp_(torch.finfo(largest.dtype).tiny, torch.finfo(largest.dtype).max / 2)
    unit = torch.nextafter(largest, torch.full_like(largest, torch.inf)) - largest
    return (actual.detach().double() - expected.detach().double()).abs() / unit.double()
