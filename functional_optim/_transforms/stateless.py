"""Plain functions of updates as transformations."""

from collections.abc import Callable
from typing import Any

import torch

from .._compiler.arguments import checked_function
from .._compiler.states import EmptyState
from .._transform import GradientTransformation
from .._tree import Tree, tree_map


def _no_state(params: Tree) -> EmptyState:
    return EmptyState()


def stateless(f: Callable[[Tree, Tree | None], Tree]) -> GradientTransformation:
    """Makes a transformation of a function of the whole tree. It runs between two kernels.

    Args:
      f: `f(updates, params) -> updates`.

    Returns:
      The transformation.

    Example:
      >>> tx = stateless(lambda updates, params: [u.flip(0) for u in updates])
      >>> tx.update([torch.tensor([1.0, 2.0])], tx.init([torch.zeros(2)]))[0]
      [tensor([2., 1.])]
    """

    checked_function("f", "stateless", f, "`f(updates, params) -> updates`")

    def update(updates: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, Any]:
        return f(updates, params), state

    return GradientTransformation(_no_state, update)


def stateless_with_tree_map(f: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]) -> GradientTransformation:
    """Makes a transformation of a function of one leaf. It runs between two kernels; `elementwise` makes kernels.

    Args:
      f: `f(update, param) -> update`; `param` is None if `update` gets no parameters.

    Returns:
      The transformation.

    Example:
      >>> tx = stateless_with_tree_map(lambda u, p: u.flip(0))
      >>> tx.update([torch.tensor([1.0, 2.0])], tx.init([torch.zeros(2)]))[0]
      [tensor([2., 1.])]
    """

    checked_function("f", "stateless_with_tree_map", f, "`f(update, param) -> update`")

    def each(updates: Tree, params: Tree | None) -> Tree:
        if params is None:
            return tree_map(lambda u: None if u is None else f(u, None), updates)
        return tree_map(lambda u, p: None if u is None else f(u, p), updates, params)

    return stateless(each)
