"""Trees of tensors: seeded ones, their leaves, copies."""

from collections.abc import Callable
from typing import Any

import optree
import torch


F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
Tree = Any
NAMESPACE = "functional_optim"


def leaves(tree: Tree) -> list[Any]:
    """The leaves of a tree; None is one."""
    return optree.tree_leaves(tree, none_is_leaf=True, namespace=NAMESPACE)


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors of a tree."""
    return [x for x in optree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


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


def mixed_tree() -> dict[str, torch.Tensor]:
    """Leaves of several dtypes and layouts."""
    tree = make_tree(0)
    return {
        "weight": tree["weight"],
        "bias": tree["bias"].float(),
        "scale": tree["scale"].bfloat16(),
        "columns": torch.ones(4, 6)[:, ::2],
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "empty": torch.zeros(0, 3),
    }


def zeros(*shape: int, **kwargs: Any) -> torch.Tensor:
    """Zeros of a shape that is given number by number; of none, one number."""
    return torch.zeros(shape, **kwargs)
