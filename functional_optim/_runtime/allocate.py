"""New tensors for results, each in memory of its own, made in one operation with their data pointers."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .internals import has_members
from .library import HEAD, library, operations, spec_rows
from .pointers import Pointers
from .spec import PLAIN, TensorSpec


SMALL = 1 << 14  # bytes of a row; torch copies longer ones by several threads
Make = Callable[[torch.Tensor], torch.Tensor]


class Allocator:
    """The new tensors of a step. Each has memory of its own, so that one may outlive the others.

    The operation of `pointers.c` takes a bit more than half the time of as many calls of torch on a CPU. On CUDA the
    allocator takes most of it either way.

    Args:
      likes: for each column, the specs of the tensors that its new tensors are like, each with a tensor of that spec.
      makers: for each column, the function that makes a new tensor from one of them.
    """

    def __init__(self, likes: Sequence[Sequence[tuple[TensorSpec, torch.Tensor]]], makers: Sequence[Make]) -> None:
        self.makers = makers
        self.lengths = [len(column) for column in likes]
        wanted = [(spec, make) for column, make in zip(likes, makers, strict=True) for spec, _ in column]
        self.n = len(wanted)
        examples = {spec: x for column in likes for spec, x in column}
        operation = operations()
        # of a member of `vmap` that has escaped nothing is made; the step refuses it when it reads tensors
        usable = operation is not None and not any(map(has_members, examples.values()))
        self.operation = operation.new_tensors.default if usable else None
        if self.operation is not None:
            rows = {x: k for k, x in enumerate(dict.fromkeys(wanted))}
            self.table = _describe_new([(examples[spec], make) for spec, make in rows])
            self.index = torch.tensor([rows[x] for x in wanted], dtype=torch.int64, device="cpu")

    def __call__(self, like: Sequence[Sequence[torch.Tensor]], pointers: Pointers) -> list[list[torch.Tensor]]:
        """Makes the tensors of each column, and puts their pointers among those of the step.

        Args:
          like: for each column, the tensors that its new tensors are like.
          pointers: the pointers.
        """
        if self.operation is not None:
            new = self.operation(self.index, self.table, pointers.new)
            if len(new) == self.n:
                return _split(new, self.lengths)
            del new  # tensors that take memory, too
        # without a compiler; and without memory, for the error of torch, which says how much was asked for
        made = [list(map(make, tensors)) for tensors, make in zip(like, self.makers, strict=True)]
        first = pointers.n + 1
        pointers.memory[first : first + self.n] = [x.data_ptr() for column in made for x in column]
        return made


def _describe_new(wanted: Sequence[tuple[torch.Tensor, Make]]) -> torch.Tensor:
    """Rows of `pointers.c` for tensors that functions make of others; they are made, one at a time, to be described.

    On meta they would take no memory, but the first one there has torch import SymPy, which is longer than a step.
    """
    dims = max((x.dim() for x, _ in wanted), default=0)
    table = torch.empty((len(wanted), HEAD + 2 * dims), dtype=torch.int64, device="cpu")
    for row, (x, make) in zip(table, wanted, strict=True):
        row.copy_(spec_rows([make(x)], dims)[0])
    return table


def _split(tensors: list[torch.Tensor], lengths: Sequence[int]) -> list[list[torch.Tensor]]:
    """A list as lists of some lengths."""
    start, found = 0, []
    for n in lengths:
        found.append(tensors[start : start + n])
        start += n
    return found


def unbind_copies(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """The rows of a stack, each in memory of its own: `torch.unbind_copy`, in half the time where rows are small.

    Args:
      x: the stack.
    """
    own, n = operations(), len(x)
    bytes_of_row = x.nbytes // max(n, 1)
    plain = type(x) in PLAIN and x.is_cpu and x.is_contiguous() and not (x.is_neg() or x.is_conj())
    plain = plain and not x.requires_grad  # autograd follows torch's
    if own is None or not plain or n < 2 or not 0 < bytes_of_row <= SMALL:
        return torch.unbind_copy(x, 0)  # type: ignore[return-value, func-returns-value]
    pointers, table = Pointers(0, n), spec_rows([x[0].clone(memory_format=torch.contiguous_format)], x.dim() - 1)
    index = torch.zeros(n, dtype=torch.int64, device="cpu")
    rows: list[torch.Tensor] = own.new_tensors.default(index, table, pointers.new)
    if len(rows) < n:  # torch's own error says how much memory was asked for
        return torch.unbind_copy(x, 0)  # type: ignore[return-value, func-returns-value]
    _copy_rows()(x.data_ptr(), bytes_of_row, n, pointers.address + 8 * (pointers.n + 1))
    return rows


@functools.lru_cache(maxsize=1)
def _copy_rows() -> Any:
    function = library().copy_rows
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    function.restype = None
    return function
