"""Layouts: many tensors as views of few buffers, and columns whose tensors are such views."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch

from .internals import is_wrapper_of_a_transformation


ALIGNMENT = 8  # elements: 16 bytes of the half types; not bytes, so that layouts of several dtypes agree


class Place(NamedTuple):
    """A leaf within buffers.

    Args:
      buffer: the buffer, by position.
      offset: the position of its first element in the buffer.
      shape: its sizes.
      stride: its strides, in elements.
    """

    buffer: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


# Plain tuples, which compilers of all versions take for constants. A leaf is a view of a section of a buffer: its
# position, its number of elements, its sizes in the order of memory, and for each dimension its position in that order,
# or None if that is the order of the leaf. A buffer is split by its length, those of its sections, and these views.
LeafView = tuple[int, int, tuple[int, ...], tuple[int, ...] | None]
BufferSplit = tuple[int, tuple[int, ...], tuple[LeafView, ...]]


def leaf_view(leaf: int, place: Place) -> LeafView:
    """The view that a leaf at a place is.

    Example:
      >>> leaf_view(0, Place(0, 8, (2, 3), (3, 1))), leaf_view(1, Place(0, 16, (2, 3), (1, 2)))
      ((0, 6, (2, 3), None), (1, 6, (3, 2), (1, 0)))
    """
    order = memory_order(place.shape, place.stride)
    inverse = tuple(sorted(range(len(order)), key=order.__getitem__))
    in_memory = tuple([place.shape[k] for k in order])
    return leaf, place.numel, in_memory, None if inverse == tuple(range(len(order))) else inverse


class Layout:
    """The places of leaves in buffers.

    Args:
      places: the place of each leaf; None for a leaf that is absent.
    """

    def __init__(self, places: tuple[Place | None, ...]) -> None:
        self.places = places
        owners: dict[int, list[int]] = {}
        for i, place in enumerate(places):
            if place is not None:
                owners.setdefault(place.buffer, []).append(i)
        self.owners = [sorted(owners[b], key=self._order) for b in range(len(owners))]
        found = [[p for i in leaves if (p := places[i]) is not None] for leaves in self.owners]
        sections = [tuple([aligned(place.numel) for place in there]) for there in found]
        self.sizes = tuple(map(sum, sections))
        views = [tuple(map(leaf_view, leaves, there)) for leaves, there in zip(self.owners, found, strict=True)]
        self.splits: tuple[BufferSplit, ...] = tuple(zip(self.sizes, sections, views, strict=True))
        self.gaps = tuple(size > sum(p.numel for p in there) for size, there in zip(self.sizes, found, strict=True))

    def _order(self, i: int) -> tuple[int, int]:
        place = self.places[i]
        return (place.offset if place is not None else 0, i)

    def views(self, buffers: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """The leaves as views of buffers; see `views_of`."""
        return views_of(self.splits, len(self.places), buffers)


def views_of(splits: Sequence[BufferSplit], n: int, buffers: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Leaves as views of buffers, None for absent leaves.

    Args:
      splits: how each buffer is split.
      n: the number of leaves.
      buffers: the buffers.

    Raises:
      TypeError, ValueError: a buffer is no tensor, or not one of the right length.
    """
    found: list[torch.Tensor | None] = [None] * n
    for b, (x, (size, sections, views)) in enumerate(zip(buffers, splits, strict=True)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"buffer {b} of a packed tree is {type(x).__name__} {x!r:.60}, expected a tensor.")
        if x.shape != (size,):
            is_stack = x.ndim > 1 and x.shape[-1] == size
            raise ValueError(
                f"buffer {b} of a packed tree has shape {tuple(x.shape)}, but its layout has {(size,)}; "
                + (
                    "it is a stack of members, so take the packed tree in a function that `torch.vmap` maps, as in "
                    "`vmap(fo.unpack)(packed)`."
                    if is_stack
                    else "leaves are views of buffers, so change their values and not their number."
                )
            )
        # the derivative of one split is one concatenation, that of many slices a sum of as many whole buffers
        for (leaf, numel, shape, order), section in zip(views, torch.split(x, list(sections)), strict=True):
            view = (section if section.shape[0] == numel else section[:numel]).view(shape)
            found[leaf] = view if order is None else view.permute(order)
    return found


def aligned(n: int) -> int:
    """Number of elements that a leaf of `n` elements takes in a buffer.

    Example:
      >>> [aligned(n) for n in (0, 1, 8, 9)]
      [0, 8, 8, 16]
    """
    return -(-n // ALIGNMENT) * ALIGNMENT


def memory_order(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Dimensions by stride, outermost first; those of size one do not count and stay behind their neighbour."""
    last, keys = 0, []
    for k in reversed(range(len(shape))):
        last = stride[k] if shape[k] != 1 else last
        keys.append((-last, k))
    return tuple(k for _, k in sorted(keys))


def _is_settled(x: Any) -> bool:
    """Whether a buffer is a plain tensor that no derivative is taken by."""
    return type(x) is torch.Tensor and not (x.requires_grad or x.is_meta or is_wrapper_of_a_transformation(x))


class PackedTensors:
    """Tensors that are views of buffers.

    Args:
      form: the structure of their tree, with the places of leaves, its `layout`.
      buffers: the buffers.
    """

    def __init__(self, form: Any, buffers: Sequence[Any]) -> None:
        self.form, self.buffers = form, tuple(buffers)
        self.layout: Layout = form.layout
        self.tied: tuple[torch.Tensor, ...] = ()  # tensors in this memory with version counters of their own
        self._kept: tuple[Any, list[torch.Tensor | None]] = (None, [])

    @property
    def views(self) -> list[torch.Tensor | None]:
        """The tensors, None for one that is absent.

        Views are kept while buffers have their memory. Those that autograd or `torch.func` follow are made anew, for
        they belong to the mode that they were made in.
        """
        if torch.compiler.is_dynamo_compiling() or not all(map(_is_settled, self.buffers)):
            return self.layout.views(self.buffers)
        key = [(x.data_ptr(), x.shape, x.dtype, x.device) for x in self.buffers]
        if self._kept[0] != key:
            views = self.layout.views(self.buffers)
            if not all(_is_settled(x) for x in views if x is not None):  # a transformation wraps views of any tensor
                return views
            self._kept = (key, views)
        return self._kept[1]

    def with_buffers(self, buffers: Sequence[Any]) -> Self:
        """Tensors of the same form in other buffers."""
        return type(self)(self.form, buffers)


class PackedColumn(Sequence[Any]):
    """A column whose tensors are views of buffers, which are made when somebody looks at them.

    Args:
      packed: the tensors.
      picks: for each leaf of the column, the position of its tensor, or the object that stands for one that has none.
    """

    def __init__(self, packed: PackedTensors, picks: tuple[Any, ...]) -> None:
        self.packed, self.picks = packed, picks

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, i: Any) -> Any:
        return self.leaves[i]

    @cached_property
    def leaves(self) -> list[Any]:
        """The tensors."""
        views = self.packed.views
        return [views[k] if type(k) is int else k for k in self.picks]

    def place(self, i: int) -> Place | None:
        """The place of a tensor; None if there is none."""
        k = self.picks[i]
        return self.packed.layout.places[k] if type(k) is int else None

    def dtypes(self) -> list[torch.dtype | None]:
        """The dtype of each tensor, None where there is none."""
        of_buffers, places = [getattr(x, "dtype", None) for x in self.packed.buffers], self.packed.layout.places
        found = [places[k] if type(k) is int else None for k in self.picks]
        return [None if place is None else of_buffers[place.buffer] for place in found]

    def with_buffers(self, buffers: Sequence[torch.Tensor]) -> "PackedColumn":
        """A column of the same layout in other buffers."""
        return PackedColumn(self.packed.with_buffers(buffers), self.picks)

    def result_in(self, column: Any) -> "PackedColumn":
        """The column whose structure a result of this layout has: its own one, if that is packed alike, else this."""
        alike = isinstance(column, PackedColumn) and column.packed.layout is self.packed.layout
        return column if alike else self
