"""Packed: a tree whose tensors are views of few buffers."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ._runtime.packing import Layout, PackedTensors, Place, aligned, memory_order
from ._runtime.spec import TensorSpec
from ._structures import FORMS, read, rebuild


class Form:
    """The form of a packed tree: its structure, and the places of its leaves. Equal forms are one object; see `form`.

    Args:
      spec: the structure.
      layout: the places.

    Attributes:
      serial: a name, by which compiled graphs are guarded.
      containers: the structure as a compiler follows it; None if it has other containers than those of Python.
      order: the position of each leaf of `containers` among those of `spec`.
    """

    _serials = itertools.count()

    def __init__(self, spec: Any, layout: Layout) -> None:
        self.spec, self.layout = spec, layout
        self.serial = f"form {next(self._serials)}"
        skeleton = read(spec.unflatten([None] * spec.num_leaves))
        self.containers = None if skeleton.strange else skeleton.structure
        self.order: list[int] = []
        if not skeleton.strange:
            places = spec.flatten_up_to(rebuild(self.containers, range(spec.num_leaves)))
            self.order = sorted(range(len(places)), key=places.__getitem__)
        FORMS[self.serial] = self


@functools.lru_cache(maxsize=256)
def form(spec: Any, places: tuple[Place | None, ...]) -> Form:
    """The form of a structure and places."""
    return Form(spec, Layout(places))


class Packed(PackedTensors):
    """A tree whose leaves are views of one buffer per dtype and device; `pack` makes one.

    Every function of this package takes it in place of the tree. For `torch.func`, `torch.utils._pytree` and optree it
    is a container of its buffers. It is printed as its layout, compared as an object, pickled, and saved by
    `torch.save`, with its structure.

    Attributes:
      buffers: the buffers, vectors. Elements between leaves are zeros that no step reads.

    Example:
      >>> import functional_optim as fo, torch
      >>> packed = fo.pack({"w": torch.ones(2, 2), "b": torch.zeros(8)})
      >>> packed
      Packed(2 leaves in 1 buffer: 16 of torch.float32 on cpu)
      >>> packed.tree()["w"]
      tensor([[1., 1.],
              [1., 1.]])
    """

    @classmethod
    def of(cls, spec: Any, leaves: Sequence[Any]) -> "Packed":
        """Copies of tensors, packed. Autograd and `torch.func` follow.

        Args:
          spec: the structure.
          leaves: the tensors, None for one that is absent.
        """
        pieces: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        lengths: dict[tuple[torch.dtype, torch.device], int] = {}
        places: list[Place | None] = []
        for x in leaves:
            if x is None:
                places.append(None)
                continue
            kind = (x.dtype, x.device)
            own, offset = pieces.setdefault(kind, []), lengths.setdefault(kind, 0)
            order = _dense_order(x)
            flat = x.permute(order).reshape(-1)
            places.append(Place(list(pieces).index(kind), offset, tuple(x.shape), _strides(x.shape, order)))
            own.append(flat)
            room = aligned(flat.shape[0])
            if room != flat.shape[0]:
                own.append(flat.new_zeros(room - flat.shape[0]))
            lengths[kind] = offset + room
        buffers = [torch.cat(own) for own in pieces.values()]
        return cls(form(spec, tuple(places)), buffers)

    def tree(self) -> Any:
        """The tree, whose leaves are views of the buffers: to write to one is to write to the other."""
        if self.form.containers is not None and torch.compiler.is_dynamo_compiling():
            from ._traced import traced_tree  # an import of the compiler, which takes seconds

            return traced_tree(self.form.serial, self.form.containers, self.buffers)
        return self.form.spec.unflatten(self.views)

    def map(self, fn: Callable[[torch.Tensor], Any]) -> "Packed":
        """A packed tree of the same structure with the results of a function of each buffer.

        Args:
          fn: the function, such as `torch.zeros_like`. It returns a vector of the length of the buffer.

        Example:
          >>> import functional_optim as fo, torch
          >>> fo.pack([torch.ones(2), torch.ones(3)]).map(torch.zeros_like).tree()
          [tensor([0., 0.]), tensor([0., 0., 0.])]
        """
        return self.with_buffers(list(map(fn, self.buffers)))

    def __repr__(self) -> str:
        n, k = len(self.layout.places), len(self.buffers)
        kinds = [
            f"{'x'.join(map(str, x.shape))} of {x.dtype} on {x.device}" if isinstance(x, torch.Tensor) else f"{x!r:.60}"
            for x in self.buffers
        ]
        return (
            f"Packed({n} lea{'f' if n == 1 else 'ves'} in {k} buffer{'' if k == 1 else 's'}"
            f"{': ' if kinds else ''}{', '.join(kinds)})"
        )


def _dense_order(x: torch.Tensor) -> tuple[int, ...]:
    """The dimensions of a tensor in the order in which its elements are packed: that of memory, if it has no holes."""
    plain = tuple(range(x.ndim))
    if x.is_contiguous() or TensorSpec.of(x).layout is None:
        return plain
    return memory_order(x.shape, x.stride())


def _strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor without holes whose dimensions are in an order, outermost first."""
    strides, step = [0] * len(shape), 1
    for k in reversed(order):
        strides[k], step = step, step * max(shape[k], 1)
    return tuple(strides)
