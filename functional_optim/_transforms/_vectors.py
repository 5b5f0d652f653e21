"""The leaves of a tree as one flat vector, and back."""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from .._runtime.checks import at, check_fit, check_leaf, check_stored
from .._runtime.internals import has_members
from .._runtime.shard import is_dtensor, real_view
from .._tree import Tree, difference, flatten, leaves_like, paths


def wide(x: torch.Tensor) -> torch.dtype:
    """The dtype that a leaf is computed in: its own, or that of single precision for half types."""
    return torch.promote_types(x.dtype, torch.float32)


def flat(leaves: Sequence[torch.Tensor]) -> torch.Tensor:
    """The elements of leaves as one vector, complex ones as pairs of real numbers, in the widest dtype of all."""
    dtype = functools.reduce(torch.promote_types, (wide(x).to_real() for x in leaves))
    return torch.cat([real_view(x.detach().resolve_conj()).reshape(-1).to(dtype) for x in leaves])


def dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The product of two vectors, in the wider dtype of the two: gradients may have another one than parameters."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype).dot(y.to(dtype))


def vector(x: torch.Tensor) -> torch.Tensor:
    """The elements of one leaf as a vector, in a dtype that is wide enough."""
    return real_view(x.detach().resolve_conj().to(wide(x))).reshape(-1)


def rows(x: torch.Tensor) -> torch.Tensor:
    """Leaves that are stacked as the rows of a matrix."""
    parts = real_view(x)
    return parts.reshape(len(x), parts[0].numel())


def split(vector: torch.Tensor, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A flat vector as tensors of the shapes of leaves, each with memory of its own, in dtypes that are wide enough."""
    sizes = [x.numel() * (1 + x.is_complex()) for x in leaves]
    return [shaped(part.clone(), x) for part, x in zip(vector.split_with_sizes(sizes), leaves, strict=True)]


def shaped(part: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A vector as a tensor of the shape of a leaf, in a dtype that is wide enough."""
    part = part.to(wide(x).to_real())
    return torch.view_as_complex(part.view(*x.shape, 2)) if x.is_complex() else part.view(x.shape)


def refuse_members(name: str, subject: str, x: Any) -> None:
    """Refuses a tensor of members of `torch.vmap`, for a transformation that decides by numbers.

    Args:
      name: the transformation's name.
      subject: the tensor's name in messages.
      x: the tensor.

    Raises:
      TypeError: the tensor stands for several members.
    """
    if isinstance(x, torch.Tensor) and has_members(x):
        raise TypeError(
            f"{subject} stands for several members of `torch.vmap`, and {name} decides by numbers that Python reads; "
            f"take the steps of members in a loop."
        )


class Leaves:
    """The parameters of a tree that are there, and the tree's structure.

    Args:
      name: the transformation's name in messages.
      params: the parameters.

    Raises:
      ValueError: there are no parameters, or they are on several devices or distributed.
      TypeError: a parameter is no dense tensor of a floating dtype.
    """

    def __init__(self, name: str, params: Tree | None) -> None:
        if params is None:
            raise ValueError(f"{name} needs the parameters: call `update(updates, state, params)`.")
        self.name = name
        self.all, self.spec = flatten(params)
        self.present = [i for i, x in enumerate(self.all) if x is not None]
        self.params: list[torch.Tensor] = [self.all[i] for i in self.present]
        self.paths = paths(self.spec)
        for i, x in zip(self.present, self.params, strict=True):
            if not (isinstance(x, torch.Tensor) and x.is_complex()):  # complex ones are pairs of real numbers
                check_leaf("params", self.paths[i], x)
            if is_dtensor(x):
                raise ValueError(
                    f"params{at(self.paths[i])} is a DTensor; {name} works on one vector of all parameters, which a "
                    f"process has whole. Give it parameters that are not sharded."
                )
            if x.device != self.params[0].device:
                raise ValueError(
                    f"params{at(self.paths[i])} is on {x.device}, but others are on {self.params[0].device}; {name} "
                    f"works on one vector of all parameters, so they must be on one device."
                )

    def read(self, subject: str, tree: Tree, fit: bool = False) -> list[torch.Tensor]:
        """The leaves of a tree that belong to the parameters.

        Args:
          subject: the tree's name in messages.
          tree: a tree like the parameters.
          fit: whether leaves must be gradients or updates of their parameters.

        Raises:
          ValueError: the tree has another structure, or lacks a leaf, or a leaf has no memory.
          TypeError: the tree is one of members of `torch.vmap`.
        """
        try:
            found = leaves_like(self.spec, tree)
        except (ValueError, TypeError):
            raise ValueError(
                f"{subject} of {self.name} does not have the structure of params: {difference(self.spec, tree)}."
            ) from None
        for i in self.present:
            if found[i] is None:
                raise ValueError(
                    f"{subject}{at(self.paths[i])} is None; {self.name} works on one vector of all parameters. Leave a "
                    f"parameter that is not trained out, with `masked`, or give it a gradient of zeros."
                )
            refuse_members(self.name, f"params{at(self.paths[i])}", self.all[i])
            refuse_members(self.name, f"{subject}{at(self.paths[i])}", found[i])
            if fit and not (isinstance(found[i], torch.Tensor) and found[i].is_complex()):
                check_fit(subject, "parameter", self.paths[i], found[i], self.all[i])
            if isinstance(found[i], torch.Tensor) and found[i].layout is torch.strided:
                check_stored(subject, self.paths[i], found[i])
        return [found[i] for i in self.present]

    def check_shapes(self, subject: str, leaves: Sequence[torch.Tensor], n: int | None = None) -> None:
        """Refuses entries of a state that have other shapes than their parameters.

        Args:
          subject: the entry's name in messages.
          leaves: one for each parameter.
          n: how many rows each has, of the shape of the parameter; None if it has that shape itself.

        Raises:
          ValueError: with the path of the leaf.
        """
        for i, x, p in zip(self.present, leaves, self.params, strict=True):
            expected = tuple(p.shape) if n is None else (n, *p.shape)
            if tuple(x.shape) != expected:
                raise ValueError(
                    f"{subject}{at(self.paths[i])} of {self.name} has shape {tuple(x.shape)}, expected {expected}: it "
                    f"is of other parameters or options; make the state with `init`."
                )

    def tree(self, leaves: Sequence[Any]) -> Tree:
        """The tree with other leaves in the places of the parameters."""
        column: list[Any] = [None] * len(self.all)
        for i, x in zip(self.present, leaves, strict=True):
            column[i] = x
        return self.spec.unflatten(column)
