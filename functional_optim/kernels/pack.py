"""Small tensors that lie side by side: with many of them most of a step is waiting for what is known of each."""

from collections.abc import Sequence
from typing import Any

import torch


SMALL = 1 << 14  # elements; larger tensors gain nothing from lying side by side


def packable(x: Any) -> bool:
    """Whether `pack` moves something: small tensors of torch's own kind."""
    if type(x) is not torch.Tensor or x.layout is not torch.strided or not 0 < x.numel() <= SMALL:
        return False
    return x.is_contiguous() and not (x.is_meta or x.is_neg() or x.is_conj() or x.requires_grad)


def pack(tensors: Sequence[Any]) -> list[Any]:
    """Moves small tensors of torch's own kind into memory that they share, one behind the other.

    Args:
      tensors: tensors that own their memory; anything else among them stays as it is. One that is there several times
        becomes as many tensors.

    Returns:
      Tensors like them.

    Example:
      >>> a, b = pack([torch.ones(2), torch.zeros(1, 1)])
      >>> a, b, a.data_ptr() + 8 == b.data_ptr()
      (tensor([1., 1.]), tensor([[0.]]), True)
    """
    result = list(tensors)
    known = {id(x): x for x in tensors}
    movable = {key for key, x in known.items() if packable(x)}
    alike: dict[tuple[torch.dtype, torch.device], dict[torch.Size, list[int]]] = {}
    for k, x in enumerate(tensors):
        if id(x) in movable:
            alike.setdefault((x.dtype, x.device), {}).setdefault(x.shape, []).append(k)
    for (dtype, device), shapes in alike.items():
        sizes = [len(members) * shape.numel() for shape, members in shapes.items()]
        if sum(map(len, shapes.values())) == 1:
            continue
        whole = torch.empty(sum(sizes), dtype=dtype, device=device)
        for part, (shape, members) in zip(torch.split(whole, sizes), shapes.items(), strict=True):
            table = part.view(len(members), *shape)
            if len({id(tensors[k]) for k in members}) == 1:
                table.copy_(tensors[members[0]])
            else:
                torch.stack([tensors[k] for k in members], out=table)
            for k, x in zip(members, table.unbind(), strict=True):
                result[k] = x
    return result


def unpack(x: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy with memory of its own if it lies beside others.

    Args:
      x: a tensor, laid out densely if it lies beside others.

    Returns:
      A tensor like it.

    Example:
      >>> a, b = pack([torch.ones(2), torch.zeros(2)])
      >>> unpack(b), unpack(b).storage_offset(), unpack(torch.ones(2)[1:]).storage_offset()
      (tensor([0., 0.]), 0, 0)
    """
    return x if x.untyped_storage().nbytes() == x.numel() * x.element_size() else x.clone()
