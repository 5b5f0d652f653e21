"""The protocol of a gradient transformation.

A transformation is a pair of pure functions: `init` makes a state from parameters, `update` turns updates and a state
into new ones. That is all that a caller needs, and all that an object from elsewhere must have.

Inside the package a transformation also says how it is built, so that chains can be laid out over the leaves of a tree
and fused. The methods of `GradientTransformation` with an underscore are these questions, most of them about a `View`.
"""

import abc
import inspect
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Self, TypeVar
from weakref import WeakValueDictionary

import torch

from ._compiler.arguments import checked_function
from ._compiler.rule import Bound
from ._compiler.states import EmptyState as EmptyState
from ._packed import Packed
from ._state_nodes import (
    Path as Path,
    StateNode,
    brief,
    wrong_state,
)
from ._tree import Tree, View, packed_like, unpacked


TRANSFORMATIONS: "WeakValueDictionary[str, GradientTransformation]" = WeakValueDictionary()  # by serial number
_SERIALS = itertools.count()
F = TypeVar("F", bound=Callable[..., Any])
Rewrite = Callable[[Path, "GradientTransformation"], "GradientTransformation"]


class Link(NamedTuple):
    """One transformation of a flattened chain.

    Args:
      tx: the transformation; made of a rule, or opaque: one that can only be called.
      path: indices and keys that lead to its state.
      seen: for each leaf of the tree, whether the transformation sees it.
      bound: the rule and its hyper-parameters, if it is made of one.
      lacking: slots of which some leaves have no entry, with the positions of those leaves.
      wraps: the number of transformations right in front of it that are inside it; None if it wraps none.
    """

    tx: "GradientTransformation"
    path: Path
    seen: tuple[bool, ...]
    bound: Bound | None = None
    lacking: Mapping[str, frozenset[int]] = {}
    wraps: int | None = None


class GradientTransformation:
    """A pair of pure functions: `init` makes a state, `update` turns updates into better ones.

    Calling this class with the two functions makes a transformation of them. It works in any chain, as a step of
    its own between kernels. Extra keyword arguments of an update reach every transformation; a function that does
    not take `**extra` gets the ones that it names.

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

    _tree_steps: list[Any] = []  # of this very object; assigned anew, never changed in place  # noqa: RUF012
    _described_steps: list[Any] = []  # of this very object, that graphs name; like `_tree_steps`  # noqa: RUF012
    _serial: str  # of this very object; compiled graphs are guarded by it, and find the object by it
    _bound: Bound | None = None  # the rule and its hyper-parameters, if it is made of one
    _tensors: tuple[torch.Tensor, ...] = ()  # hyper-parameters that are tensors, each once

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        if torch.compiler.is_dynamo_compiling():  # a step refuses it
            return self
        self._serial = f"transformation {next(_SERIALS)}"
        TRANSFORMATIONS[self._serial] = self
        return self

    def __init__(self, init: Callable[[Any], Any], update: Callable[..., tuple[Any, Any]]) -> None:
        if torch.compiler.is_dynamo_compiling():  # a step refuses it; nothing is asked of the functions
            self._functions, self._extras = (init, update), None
            return
        for name, function, form in (
            ("init", init, "`init(params) -> state`"),
            ("update", update, "`update(updates, state, params=None, **extra) -> (updates, state)`"),
        ):
            checked_function(name, "GradientTransformation", function, form)
        self._functions = (init, update)
        parameters = inspect.signature(update).parameters.values()
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        # positions tell updates, state and parameters, under any names
        positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        self._extras = None if takes_all else frozenset((*positional[3:], *by_name))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_tree_steps", "_described_steps", "_serial")}

    def init(self, params: Tree) -> Any:
        """Makes the state for a tree of parameters."""
        return self._functions[0](unpacked(params))

    def update(self, updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, Any]:
        """Transforms updates.

        Args:
          updates: a tree of tensors like `params`; None for a parameter without a gradient.
          state: the result of `init`, or the state of the last `update`.
          params: the current parameters.
          **extra: further arguments, such as `value`, for whichever transformation wants them.

        Returns:
          The new updates and the new state.
        """
        if self._extras is not None:
            extra = {k: v for k, v in extra.items() if k in self._extras}
        result = self._functions[1](unpacked(updates), state, unpacked(params), **extra)
        like = updates if params is None else params
        if not isinstance(like, Packed):
            return result
        found, state = result
        return packed_like(like, found), state

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        """The two functions, for `init, update = tx`."""
        return iter((self.init, self.update))

    def __eq__(self, other: object) -> bool:
        return type(other) is GradientTransformation and other._functions == self._functions

    def __hash__(self) -> int:
        return hash(self._functions)

    def __repr__(self) -> str:
        init, update = (getattr(f, "__qualname__", type(f).__name__) for f in self._functions)
        return f"GradientTransformation({init}, {update})"

    def _init(self, view: View) -> Any:
        """The state for the leaves that are seen."""
        return self.init(view.tree())

    def _warn(self, view: View) -> None:
        """Warns of masks that match none of the leaves that are seen."""

    def _rewrite(self, fn: Rewrite, path: Path) -> "GradientTransformation":
        """The same transformation with its innermost ones replaced by `fn` of their paths and themselves.

        So optimizers put options of parameter groups in the place of numbers.
        """
        return fn(path, self)

    def _swap(self, tensor: Callable[[torch.Tensor], torch.Tensor]) -> "GradientTransformation":
        """The same transformation with other tensors as hyper-parameters, if it is one that is not made of others."""
        return self

    def _with_tensors(self, tensors: Sequence[torch.Tensor]) -> "GradientTransformation":
        """The same transformation with other tensors in the places of `_tensors`."""
        if not self._tensors:
            return self
        new = {id(x): y for x, y in zip(self._tensors, tensors, strict=True)}
        return self._rewrite(lambda path, inner: inner._swap(lambda x: new[id(x)]), ())

    def _links(self, view: View, path: Path) -> list[Link]:
        """The innermost transformations in order, each with the leaves that it sees and the path to its state.

        `chain` concatenates the links of its members, `masked` narrows the view, a rule is one link.
        """
        return [Link(self, path, view.seen)]

    def _asks_leaves(self) -> bool:
        """Whether a mask or label is a function, whose answer may depend on more than the structure of the tree."""
        return False

    def _extra_names(self) -> frozenset[str] | None:
        """Names of the extra arguments of `update`; None if any is taken."""
        return None if self._extras is None else self._extras - {"updates", "state", "params"}

    def _state_nodes(self, path: Path) -> list[StateNode]:
        """The parts of the state that are known before there are parameters, containers before their entries."""
        return []


FACTORIES: set[Any] = set()  # functions that make declared transformations


def declares(factory: F) -> F:
    """Marks a function that makes a declared transformation; descriptions of chains may call it."""
    FACTORIES.add(factory)
    return factory


class LabelFunction(abc.ABC):
    """A function of this package that labels leaves, as one of `partition`; descriptions of chains may hold it."""

    @abc.abstractmethod
    def __call__(self, path: str, p: torch.Tensor) -> Hashable:
        """The label of a leaf."""


class Declared(GradientTransformation):
    """A pair of functions that is known by the call that made it: it is printed, compared and pickled as that call.

    Args:
      factory: the function that makes it, marked by `declares`, which a module has under its name.
      arguments: what `factory` was called with, by name.
      init, update: see `GradientTransformation`.
      state_type: the class of its state.
    """

    def __init__(
        self,
        factory: Callable[..., GradientTransformation],
        arguments: Mapping[str, Any],
        init: Callable[[Any], Any],
        update: Callable[..., tuple[Any, Any]],
        state_type: type,
    ) -> None:
        super().__init__(init, update)
        self.factory, self.arguments, self.state_type = factory, dict(arguments), state_type

    def update(self, updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, Any]:
        """Transforms updates; see `GradientTransformation.update`."""
        if type(state) is not self.state_type:
            raise wrong_state(self._state_nodes(())[0], state)
        return super().update(updates, state, params, **extra)

    def _state_nodes(self, path: Path) -> list[StateNode]:
        return [StateNode(self, path, self.state_type)]

    @property
    def name(self) -> str:
        """The name of the function that makes it."""
        return self.factory.__name__

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(self.factory, **self.arguments), ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Declared) and (self.factory, self.arguments) == (other.factory, other.arguments)

    def __hash__(self) -> int:
        return hash((self.factory, *self.arguments.values()))

    def __repr__(self) -> str:
        defaults = inspect.signature(self.factory).parameters
        given = {k: v for k, v in self.arguments.items() if defaults[k].default != v}
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in given.items())})"


def as_transformation(x: Any, subject: str = "") -> GradientTransformation:
    """Takes anything that has `init` and `update`.

    Args:
      x: the object.
      subject: the argument that it is, for the message.

    Raises:
      TypeError: the object lacks one of them.
    """
    if isinstance(x, GradientTransformation):
        return x
    if isinstance(x, type) or not (callable(getattr(x, "init", None)) and callable(getattr(x, "update", None))):
        hint = "; did you forget to call it?" if callable(x) else "."
        raise TypeError(
            f"{subject}{': ' if subject else ''}expected a gradient transformation, an object with `init` and "
            f"`update`, got {brief(x)}{hint}"
        )
    return GradientTransformation(x.init, x.update)


def parts(tx: GradientTransformation) -> dict[Path, GradientTransformation]:
    """The innermost transformations of a transformation, by path: rules, and opaque ones.

    Example:
      >>> import functional_optim as fo
      >>> parts(fo.sgd(0.1))
      {(1,): scale_by_learning_rate(learning_rate=0.1)}
    """
    found: dict[Path, GradientTransformation] = {}
    tx._rewrite(found.setdefault, ())
    return found
