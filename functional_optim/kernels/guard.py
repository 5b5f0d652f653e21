"""Whether tensors still are what tables were prepared for: type, dtype, shape, strides, device, requires_grad."""

from collections.abc import Hashable, Sequence
from operator import attrgetter
from typing import Any

import torch

from .alike import PLAIN, look, map_alike
from .layout import meta


try:  # torch's own check in C++: 30 ns a tensor; without it the same in Python, 1 us a tensor
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # pragma: no cover
    TensorGuards = None  # type: ignore[assignment,misc]

REQUIRES_GRAD = attrgetter("requires_grad")


def is_plain(x: torch.Tensor) -> bool:
    """Whether a tensor is of torch's own kinds, whose memory a kernel may be handed."""
    return type(x) in PLAIN and x.layout is torch.strided and x.device.type != "meta" and not x.is_neg()


def _have_addresses(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether no tensor is a wrapper of `torch.func` that has left its function, which looks like any other."""
    try:
        for x in tensors:
            x.data_ptr()
    except RuntimeError:
        return False
    return True


class Guard:
    """Remembers what some tensors are.

    Args:
      tensors: the tensors.
      looks: what they look like, if that is known.

    Example:
      >>> guard = Guard([torch.zeros(2)])
      >>> guard.holds([torch.ones(2)]), guard.holds([torch.ones(3)])
      (True, False)
    """

    BLOCK = 128  # tensors; torch keeps a table of those it has seen, which should stay near

    def __init__(self, tensors: Sequence[torch.Tensor], looks: Sequence[Hashable] | None = None) -> None:
        looks = list(map(look, tensors)) if looks is None else looks
        self.plain = all(map(is_plain, dict(zip(looks, tensors, strict=True)).values())) and _have_addresses(tensors)
        self.requires_grad = any(map(REQUIRES_GRAD, tensors))
        self.inference = any(map(torch.Tensor.is_inference, tensors))
        self.length = len(tensors)
        self.fast: list[Any] = []
        distinct = len(set(map(id, tensors))) == len(tensors)  # torch's check refuses one tensor twice
        if TensorGuards is not None and self.plain and distinct:
            sizes: list[Any] = map_alike(lambda x: list(x.shape), tensors, looks)
            strides: list[Any] = map_alike(lambda x: list(x.stride()), tensors, looks)
            for start in range(0, len(tensors), self.BLOCK):
                block = slice(start, start + self.BLOCK)
                check = TensorGuards(
                    *tensors[block], dynamic_dims_sizes=sizes[block], dynamic_dims_strides=strides[block]
                )
                self.fast.append(check)
        self.metas = [] if self.fast else [self._key(x) for x in tensors]

    @staticmethod
    def _key(x: torch.Tensor) -> tuple[Any, ...]:
        return (type(x), x.requires_grad, x.is_neg(), meta(x)) if x.layout is torch.strided else (type(x), x.layout)

    def holds(self, tensors: Sequence[Any]) -> bool:
        """Whether other tensors are the same in all that a kernel depends on."""
        if len(tensors) != self.length:
            return False
        if self.fast:
            return all(
                guard.check(*tensors[k * self.BLOCK : (k + 1) * self.BLOCK]) for k, guard in enumerate(self.fast)
            )
        return all(
            isinstance(x, torch.Tensor) and self._key(x) == key for x, key in zip(tensors, self.metas, strict=True)
        )
