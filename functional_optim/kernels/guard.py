"""Whether tensors still are what tables were prepared for: type, dtype, shape, strides, device, requires_grad."""

from collections.abc import Sequence
from typing import Any

import torch

from .layout import meta


try:  # torch's own check in C++: 30 ns a tensor; without it the same in Python, 1 us a tensor
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # pragma: no cover
    TensorGuards = None  # type: ignore[assignment,misc]

PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_plain(x: torch.Tensor) -> bool:
    """Whether a tensor is of torch's own kinds, whose memory a kernel may be handed."""
    return type(x) in PLAIN and x.layout is torch.strided and x.device.type != "meta" and not x.is_neg()


class Guard:
    """Remembers what some tensors are.

    Args:
      tensors: the tensors.

    Example:
      >>> guard = Guard([torch.zeros(2)])
      >>> guard.holds([torch.ones(2)]), guard.holds([torch.ones(3)])
      (True, False)
    """

    BLOCK = 128  # tensors; torch keeps a table of those it has seen, which should stay near

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.plain = all(map(is_plain, tensors))
        self.length = len(tensors)
        self.fast: list[Any] = []
        distinct = len(set(map(id, tensors))) == len(tensors)  # torch's check refuses one tensor twice
        if TensorGuards is not None and self.plain and distinct:
            for start in range(0, len(tensors), self.BLOCK):
                block = tensors[start : start + self.BLOCK]
                sizes: list[Any] = [list(x.shape) for x in block]
                strides: list[Any] = [list(x.stride()) for x in block]
                self.fast.append(TensorGuards(*block, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides))
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
