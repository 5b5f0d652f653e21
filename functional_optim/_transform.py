"""The protocol: what a gradient transformation is."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ._compiler.rule import (
    Bound,
    EmptyState as EmptyState,
)
from ._tree import Tree, View


class Link(NamedTuple):
    """One transformation of a flattened chain.

    Args:
      tx: the transformation; rule-made, or one that can only be called.
      path: indices and keys that lead to its state.
      seen: for each leaf of the tree, whether the transformation sees it.
      bound: the rule and its hyper-parameters, if it is made of one.
    """

    tx: "GradientTransformation"
    path: tuple[int | str, ...]
    seen: tuple[bool, ...]
    bound: Bound | None = None


class GradientTransformation:
    """A pair of pure functions: `init` makes a state, `update` turns updates into better ones.

    Calling this class with the two functions makes a transformation of them. It works in any chain, as a step of
    its own between kernels. Extra keyword arguments of an update reach every transformation; a function that does
    not take `**extra` gets those that it names.

    Args:
      init: `init(params) -> state`.
      update: `update(updates, state, params=None, **extra) -> (updates, state)`.

    Example:
      >>> import torch
      >>> halve = GradientTransformation(lambda params: EmptyState(), lambda updates, state, params=None: (
      ...     {k: u / 2 for k, u in updates.items()}, state))
      >>> updates, _ = halve.update({"w": torch.ones(2)}, halve.init({"w": torch.ones(2)}))
      >>> updates["w"]
      tensor([0.5000, 0.5000])
    """

    def __init__(self, init: Callable[[Any], Any], update: Callable[..., tuple[Any, Any]]) -> None:
        self._functions = (init, update)
        parameters = inspect.signature(update).parameters.values()
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._extras = None if takes_all else frozenset(p.name for p in parameters)

    def init(self, params: Tree) -> Any:
        """Makes the state for a tree of parameters."""
        return self._functions[0](params)

    def update(self, updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, Any]:
        """Transforms updates.

        Args:
          updates: a tree of tensors like `params`; None for a parameter without a gradient.
          state: what `init` or the last `update` returned.
          params: the current parameters.
          **extra: further arguments, such as `value`, for whichever transformation wants them.

        Returns:
          The new updates and the new state.
        """
        if self._extras is not None:
            extra = {k: v for k, v in extra.items() if k in self._extras}
        return self._functions[1](updates, state, params, **extra)

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        """The two functions, for `init, update = tx`."""
        return iter((self.init, self.update))

    def __eq__(self, other: object) -> bool:
        return type(other) is GradientTransformation and other._functions == self._functions

    def __hash__(self) -> int:
        return hash(self._functions)

    def __repr__(self) -> str:
        init, update = (getattr(f, "__qualname__", repr(f)) for f in self._functions)
        return f"GradientTransformation({init}, {update})"

    def _init(self, view: View) -> Any:
        """Makes the state for the leaves that are seen."""
        return self.init(view.tree())

    def _warn(self, view: View) -> None:
        """Warns of what can be no one's intention for the leaves that are seen."""

    def _rewrite(
        self,
        fn: Callable[[tuple[int | str, ...], "GradientTransformation"], "GradientTransformation"],
        path: tuple[int | str, ...],
    ) -> "GradientTransformation":
        """The same transformation with the innermost ones, which `fn` is given with their paths, replaced."""
        return fn(path, self)

    def _links(self, view: View, path: tuple[int | str, ...]) -> list[Link]:
        """The transformations that this one consists of, in order."""
        return [Link(self, path, view.seen)]


def as_transformation(x: Any) -> GradientTransformation:
    """Takes anything that has `init` and `update`.

    Raises:
      TypeError: it has not.
    """
    if isinstance(x, GradientTransformation):
        return x
    if isinstance(x, type) or not (callable(getattr(x, "init", None)) and callable(getattr(x, "update", None))):
        raise TypeError(
            f"expected a gradient transformation, an object with `init` and `update`, got {x!r:.100}"
            f"{'; did you forget to call it?' if callable(x) else ''}"
        )
    return GradientTransformation(x.init, x.update)
