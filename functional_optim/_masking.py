"""Different transformations for different leaves: `masked` and `partition`."""

import inspect
import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch

from ._addresses import publish
from ._compiler.arguments import plain_number
from ._compiler.rule import Option
from ._fusible import Combination
from ._runtime.internals import register_in_exports
from ._state_nodes import StateNode, brief
from ._transform import (
    EmptyState,
    GradientTransformation,
    Link,
    Path,
    Rewrite,
    as_transformation,
    parts,
)
from ._tree import MaskedNode, View, broadcast_prefix, leaves_like, paths, show, tree_map
from ._warn import warn


class MaskedState(NamedTuple):
    """The state of `masked`: that of the inner transformation, with a `MaskedNode` for each leaf it does not see.

    Args:
      inner_state: the state of the inner transformation.

    Example:
      >>> from functional_optim import masked, scale
      >>> masked(scale(0.5), {"w": True, "b": False}).init({"w": torch.zeros(1), "b": torch.zeros(1)})
      MaskedState(inner_state=EmptyState())
    """

    inner_state: Any


class PartitionState(NamedTuple):
    """The state of `partition`: a `MaskedState` for each label.

    Args:
      inner_states: the states by label.

    Example:
      >>> from functional_optim import partition, scale
      >>> tx = partition({"slow": scale(0.1), "fast": scale(1.0)}, {"w": "slow", "b": "fast"})
      >>> list(tx.init({"w": torch.zeros(1), "b": torch.zeros(1)}).inner_states)
      ['slow', 'fast']
    """

    inner_states: dict[Any, Any]


publish("functional_optim", [EmptyState, MaskedNode, MaskedState, PartitionState])  # before exports have names for them
torch.serialization.add_safe_globals([EmptyState, MaskedNode, MaskedState, PartitionState])
for _cls in (EmptyState, MaskedNode, MaskedState, PartitionState):
    register_in_exports(_cls)


def resolve(choice: Any, view: View, subject: str) -> list[Any]:
    """Evaluates a mask or labels: one value for each leaf.

    Args:
      choice: a tree, a prefix of one, a function, a regular expression, or a mapping from regular expressions.
      view: the tree.
      subject: its name in messages.

    Returns:
      The values.

    Raises:
      ValueError: the mask or the labels do not fit the tree.
    """
    names = paths(view.spec)
    if isinstance(choice, re.Pattern):
        return [bool(choice.search(path)) for path in names]
    if isinstance(choice, Mapping) and choice and all(isinstance(k, re.Pattern) for k in choice):
        return [next((v for k, v in choice.items() if k.search(path)), None) for path in names]
    if callable(choice):
        if _takes_path_and_leaf(choice):
            pairs = zip(names, view.leaves, view.seen, strict=True)
            return [choice(path, leaf) if seen else None for path, leaf, seen in pairs]
        try:
            choice = choice(view.spec.unflatten(view.leaves))
        except Exception as error:
            error.add_note(
                f"{subject} is a function of one argument, so it was called with the whole tree; one that is to be "
                f"asked about each leaf takes two: the path and the parameter."
            )
            raise
    try:
        try:
            return broadcast_prefix(choice, view.spec)
        except ValueError:
            return leaves_like(view.spec, choice)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{subject} is neither like the parameters nor a prefix of them: {error}") from None


def _takes_path_and_leaf(choice: Callable[..., Any]) -> bool:
    """Whether a function takes the path and the parameter, as opposed to the whole tree."""
    parameters = inspect.signature(choice).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len([p for p in positional if p.default is p.empty]) == 2


CATCH_ALL = ("", ".", ".*", ".+")
PLACE = re.compile(r"param_groups\[\d+\]\.params\[\d+\]")  # of a parameter that an optimizer was given without a name


def _has_patterns(choice: Any) -> bool:
    """Whether a mask or labels are patterns for names; those for places have `params` in them."""
    if isinstance(choice, re.Pattern):
        return choice.pattern not in CATCH_ALL and "params" not in choice.pattern
    return isinstance(choice, Mapping) and any(isinstance(k, re.Pattern) and _has_patterns(k) for k in choice)


def _warn_of_places(choice: Any, view: View, subject: str) -> None:
    """Warns of patterns for names where parameters have none, but not of functions, which may use the leaf alone."""
    nameless = next((path for path, s in zip(paths(view.spec), view.seen, strict=True) if s and PLACE.search(path)), "")
    if nameless and _has_patterns(choice):
        warn(
            f"{subject} ask for paths of parameters, but the optimizer was given no names, so that {nameless!r} is "
            f"such a path; pass `model.named_parameters()`."
        )


def pattern_of(text: str, subject: str) -> re.Pattern[str]:
    """A regular expression that is given as text; `subject` begins the message of an error.

    Raises:
      ValueError: the text is none.
    """
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(
            f"{subject} is {text!r:.60}, which is no regular expression ({error}); pass one that is searched for in "
            f"paths, such as {re.escape(text)!r:.60}, or a tree or a function."
        ) from None


def copied(choice: Any) -> Any:
    """A mask or labels whose containers and tensors are not the caller's: changing them later changes nothing here."""

    def own(x: Any) -> Any:
        return x.item() if hasattr(x, "item") and getattr(x, "ndim", None) == 0 else x

    return choice if callable(choice) or isinstance(choice, re.Pattern) else tree_map(own, choice)


class Masked(Combination):
    """A transformation of some leaves; made by `masked`."""

    def __init__(self, inner: GradientTransformation, mask: Any) -> None:
        super().__init__([inner])
        self.inner, self.mask = inner, copied(mask)

    def _narrow(self, view: View) -> View:
        """The tree with the leaves of the mask alone.

        Raises:
          ValueError: the mask is something else than True or False at a leaf.
        """
        mask = resolve(self.mask, view, f"the mask of {_called(self.inner)}")
        bad = next((k for k, m in enumerate(mask) if view.seen[k] and not _is_truth(m)), None)
        if bad is not None:
            raise ValueError(
                f"the mask of {_called(self.inner)} is {mask[bad]!r:.40} at {paths(view.spec)[bad]!r}, "
                f"expected True or False."
            )
        return view.narrow([bool(m) for m in mask])

    def _init(self, view: View) -> Any:
        narrow = self._narrow(view)
        self._check(view, narrow)
        return MaskedState(self.inner._init(narrow))

    def _warn(self, view: View) -> None:
        narrow = self._narrow(view)
        self._check(view, narrow)
        self.inner._warn(narrow)

    def _check(self, view: View, narrow: View) -> None:
        if any(view.seen) and not any(narrow.seen):
            _warn(f"the mask {_cut(show(self.mask))} of {_called(self.inner)} matches no parameter", view)
        else:
            _warn_of_places(self.mask, view, f"masks such as {_cut(show(self.mask))} of {_called(self.inner)}")

    def _rewrite(self, fn: Rewrite, path: Path) -> GradientTransformation:
        return Masked(self.inner._rewrite(fn, (*path, 0)), self.mask)

    def _links(self, view: View, path: Path) -> list[Link]:
        return self.inner._links(self._narrow(view), (*path, 0))

    def _state_nodes(self, path: Path) -> list[StateNode]:
        return [StateNode(self, path, MaskedState, (0,)), *self.inner._state_nodes((*path, 0))]

    def _asks_leaves(self) -> bool:
        return callable(self.mask) or super()._asks_leaves()

    def __reduce__(self) -> tuple[Any, ...]:
        return Masked, (self.inner, self.mask)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Masked) and self.inner == other.inner and _same(self.mask, other.mask)

    def __hash__(self) -> int:
        return hash((Masked, self.inner))

    def __repr__(self) -> str:
        return f"masked({self.inner!r}, {show(self.mask)})"


def _warn(subject: str, view: View) -> None:
    names = [p for p, s in zip(paths(view.spec), view.seen, strict=True) if s]
    warn(f"{subject}; there are {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}.")


def _called(tx: GradientTransformation) -> str:
    """A transformation in a message; without numbers where an adapter looks them up, which nobody has written so."""
    bounds = [part._bound for part in parts(tx).values() if part._bound is not None]
    if any(isinstance(value, Option) for bound in bounds for value in bound.values.values()):
        return _cut(", ".join(f"{bound.rule.name}(...)" for bound in bounds))
    return _cut(repr(tx))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]} ..."


def _is_truth(x: Any) -> bool:
    if isinstance(x, torch.Tensor):
        return x.ndim == 0 and x.dtype is torch.bool
    return isinstance(plain_number(x), bool)


def _same(a: Any, b: Any) -> bool:
    try:
        return a is b or (type(a) is type(b) and bool(a == b))
    except (TypeError, ValueError, RuntimeError):
        return False


class Partition(Combination):
    """A transformation for each label; made by `partition`."""

    def __init__(self, transforms: Mapping[Any, GradientTransformation], labels: Any) -> None:
        super().__init__(transforms.values())
        self.transforms, self.labels = dict(transforms), copied(labels)

    def _parts(self, view: View) -> dict[Any, View]:
        """For each label, the tree with its leaves alone.

        Raises:
          ValueError: a leaf has a label without a transformation.
        """
        labels = resolve(self.labels, view, "the labels of partition")
        for path, label, seen in zip(paths(view.spec), labels, view.seen, strict=True):
            if seen and (not isinstance(label, Hashable) or label not in self.transforms):
                raise ValueError(
                    f"the parameter at {path!r} has the label {label!r}, which has no transformation; there are "
                    f"{', '.join(map(repr, self.transforms))}."
                )
        return {k: view.narrow([label == k for label in labels]) for k in self.transforms}

    def _init(self, view: View) -> Any:
        self._check(view)
        parts = self._parts(view)
        return PartitionState({k: MaskedState(tx._init(parts[k])) for k, tx in self.transforms.items()})

    def _warn(self, view: View) -> None:
        self._check(view)
        for k, part in self._parts(view).items():
            self.transforms[k]._warn(part)

    def _check(self, view: View) -> None:
        names = paths(view.spec)
        patterns = self.labels if isinstance(self.labels, Mapping) and any(view.seen) else ()
        unfound = [k for k in patterns if isinstance(k, re.Pattern) and not any(map(k.search, names))]
        for k in unfound:
            _warn(f"the pattern {k.pattern!r:.80} of partition is found in no parameter's path", view)
        if not unfound:
            _warn_of_places(self.labels, view, "the labels of partition")

    def _rewrite(self, fn: Rewrite, path: Path) -> GradientTransformation:
        transforms = {k: tx._rewrite(fn, (*path, 0, k, 0)) for k, tx in self.transforms.items()}
        return Partition(transforms, self.labels)

    def _links(self, view: View, path: Path) -> list[Link]:
        parts = self._parts(view)
        return [
            link
            for k, tx in self.transforms.items()
            if any(parts[k].seen)
            for link in tx._links(parts[k], (*path, 0, k, 0))
        ]

    def _state_nodes(self, path: Path) -> list[StateNode]:
        found = [
            StateNode(self, path, PartitionState, (0,)),
            StateNode(self, (*path, 0), dict, tuple(self.transforms)),
        ]
        for k, tx in self.transforms.items():
            found += [StateNode(tx, (*path, 0, k), MaskedState, (0,)), *tx._state_nodes((*path, 0, k, 0))]
        return found

    def _asks_leaves(self) -> bool:
        return callable(self.labels) or super()._asks_leaves()

    def __reduce__(self) -> tuple[Any, ...]:
        return Partition, (self.transforms, self.labels)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Partition) and self.transforms == other.transforms and _same(self.labels, other.labels)

    def __hash__(self) -> int:
        return hash((Partition, frozenset(self.transforms.items())))

    def __repr__(self) -> str:
        return f"partition({self.transforms!r}, {show(self.labels)})"


def masked(inner: GradientTransformation, mask: Any) -> GradientTransformation:
    """Applies a transformation to some leaves; the updates of the others pass through as they are.

    A mask that is a function is asked about the parameters at every step of the pure functions, and when an optimizer
    is bound to its parameters. A tree is copied.

    Args:
      inner: the transformation.
      mask: a tree of bools like the parameters, or a prefix of it; a compiled regular expression, searched for in
        each leaf's path; a function of the path and the parameter; or, as in optax, a function of the whole tree
        that returns a tree of bools.

    Returns:
      The transformation.

    Raises:
      TypeError: `inner` is no transformation.
      ValueError: `mask` is text that is no regular expression.

    Example:
      >>> import functional_optim as fo, torch
      >>> tx = fo.masked(fo.scale(2.0), lambda path, p: p.ndim > 1)
      >>> params = {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
      >>> fo.masked(fo.scale(2.0), re.compile("weight")).update(params, tx.init(params), params)[0]
      {'weight': tensor([[2.]]), 'bias': tensor([1.])}
    """
    own = as_transformation(inner, "`inner` of masked")
    return Masked(own, pattern_of(mask, "`mask` of masked") if isinstance(mask, str) else mask)


def partition(
    transforms: Mapping[Any, GradientTransformation], param_labels: Any | Callable[..., Any]
) -> GradientTransformation:
    """Applies to each leaf the transformation of its label.

    A function of labels is asked about the parameters at every step of the pure functions, and when an optimizer is
    bound to its parameters. A tree is copied.

    Args:
      transforms: transformations by label. Some may go unused.
      param_labels: a tree of labels like the parameters, or a prefix of it; a mapping from compiled regular
        expressions to labels, of which the first that is found in a leaf's path counts; a function of the path and
        the parameter; or, as in optax, a function of the whole tree that returns a tree of labels.

    Returns:
      The transformation.

    Raises:
      TypeError: `transforms` is no mapping, or a value of it is no transformation.

    Example:
      >>> import functional_optim as fo, torch
      >>> tx = fo.partition(
      ...     {"slow": fo.sgd(0.1), "fast": fo.sgd(1.0)},
      ...     {re.compile("bias"): "fast", re.compile(""): "slow"},
      ... )
      >>> params = {"bias": torch.ones(1), "weight": torch.ones(1)}
      >>> tx.update(params, tx.init(params), params)[0]
      {'bias': tensor([-1.]), 'weight': tensor([-0.1000])}
    """
    if not isinstance(transforms, Mapping):
        raise TypeError(
            f"`transforms` of partition is {brief(transforms)}, expected a dict of transformations by label, such as "
            f'{{"slow": fo.sgd(0.1), "fast": fo.sgd(1.0)}}.'
        )
    own = {k: as_transformation(tx, f"`transforms[{k!r}]` of partition") for k, tx in transforms.items()}
    return Partition(own, param_labels)


multi_transform = partition
