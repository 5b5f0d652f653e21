"""Chains, and steps of them."""

from typing import Any

import torch

from ._compiler.arguments import checked_switch
from ._fusible import Combination
from ._graph.run import run
from ._packed import Packed
from ._recorded import requires_gradient, warn_of_growth
from ._runtime.checks import check_fit, check_leaf, check_stored
from ._runtime.internals import needs_dispatch
from ._state_nodes import StateNode, brief
from ._structures import add, sums
from ._transform import (
    GradientTransformation,
    Link,
    Path,
    Rewrite,
    as_transformation,
    parts,
)
from ._tree import Tree, View, difference, flatten, leaves_like, packed_like, paths
from ._warn import warn


class Chain(Combination):
    """Transformations one after another; made by `chain` and `named_chain`.

    Args:
      members: the transformations.
      names: their names, or None if their states form a tuple.
    """

    def __init__(self, members: tuple[GradientTransformation, ...], names: tuple[str, ...] | None = None) -> None:
        super().__init__(members)
        self.names = names
        self._hash: int | None = None  # computed when it is asked for

    def __reduce__(self) -> tuple[Any, ...]:
        return Chain, (self.members, self.names)

    def _keys(self) -> tuple[int | str, ...]:
        return tuple(range(len(self.members))) if self.names is None else self.names

    def _init(self, view: View) -> Any:
        states = tuple(tx._init(view) for tx in self.members)
        return states if self.names is None else dict(zip(self.names, states, strict=True))

    def _rewrite(self, fn: Rewrite, path: Path) -> GradientTransformation:
        pairs = zip(self._keys(), self.members, strict=True)
        return Chain(tuple(tx._rewrite(fn, (*path, key)) for key, tx in pairs), self.names)

    def _links(self, view: View, path: Path) -> list[Link]:
        return [
            link for key, tx in zip(self._keys(), self.members, strict=True) for link in tx._links(view, (*path, key))
        ]

    def _state_nodes(self, path: Path) -> list[StateNode]:
        keys = self._keys()
        own = StateNode(self, path, tuple if self.names is None else dict, keys)
        return [own, *[x for k, tx in zip(keys, self.members, strict=True) for x in tx._state_nodes((*path, k))]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chain) and (self.members, self.names) == (other.members, other.names)

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash((self.members, self.names))  # differs between processes
        return self._hash

    def __repr__(self) -> str:
        if self.names is None:
            return f"chain({', '.join(map(repr, self.members))})"
        pairs = ", ".join(f"({n!r}, {m!r})" for n, m in zip(self.names, self.members, strict=True))
        return f"named_chain({pairs})"


def chain(*transformations: GradientTransformation) -> GradientTransformation:
    """Applies transformations one after another, as one program.

    Neighbours that are made of rules run as one kernel: values stay in registers between them, in float32 for half
    types and rounded once, when they are stored. A chain of bfloat16 updates is therefore more exact than its
    members called one by one. Anything else that has `init` and `update` runs between two kernels.

    Args:
      *transformations: the transformations; none is the identity.

    Returns:
      The transformation. Its state is the tuple of the states of its members.

    Raises:
      TypeError: an argument has no `init` and `update`.

    Example:
      >>> import functional_optim as fo
      >>> fo.chain(fo.clip_by_global_norm(1.0), fo.scale(-0.1))
      chain(clip_by_global_norm(max_norm=1.0), scale(step_size=-0.1))
    """
    members = tuple(as_transformation(tx, f"`transformations[{k}]` of chain") for k, tx in enumerate(transformations))
    _warn_if_not_last(members)
    return Chain(members)


def named_chain(*transformations: tuple[str, GradientTransformation]) -> GradientTransformation:
    """Like `chain`, with a name for each member: the state is a dict by name.

    Args:
      *transformations: pairs of a name and a transformation.

    Returns:
      The transformation.

    Raises:
      ValueError: a name occurs twice.
      TypeError: an argument is no pair of a name and a transformation.

    Example:
      >>> import functional_optim as fo, torch
      >>> tx = fo.named_chain(("momentum", fo.trace(decay=0.9)), ("lr", fo.scale(-0.1)))
      >>> tx.init(torch.zeros(1))["momentum"]
      TraceState(trace=tensor([0.]))
    """
    for k, pair in enumerate(transformations):
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(
                f"`transformations[{k}]` of named_chain is {pair!r:.60}, expected a pair of a name and a "
                f'transformation, such as ("momentum", fo.trace(0.9)).'
            )
    names = tuple(name for name, _ in transformations)
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise ValueError(f"named_chain has the name {repeated[0]!r} twice; names must differ.")
    members = tuple(as_transformation(tx, f"{name!r} of named_chain") for name, tx in transformations)
    _warn_if_not_last(members)
    return Chain(members, names)


def _warn_if_not_last(members: tuple[GradientTransformation, ...]) -> None:
    """Warns of a rule that needs updates as they will be added to the parameters, and is not at the end."""
    early: str | None = None
    for member in members:
        # an opaque transformation may do anything
        rules = [part._bound.rule for part in parts(member).values() if part._bound is not None]
        if early and any(not rule.final for rule in rules):
            warn(
                f"{early} stands before {brief(member)}, which changes updates again, but it works on updates as they "
                f"are added to the parameters; put it at the end of the chain."
            )
            return
        early = early or next((rule.name for rule in rules if rule.final), None)


def identity() -> GradientTransformation:
    """Returns updates as they are.

    Returns:
      The transformation.

    Example:
      >>> identity()
      chain()
    """
    return Chain(())


def apply_updates(params: Tree, updates: Tree) -> Tree:
    r"""Adds updates to parameters, $\theta \leftarrow \theta + u$, in the wider dtype of the two.

    Args:
      params: a tree of tensors.
      updates: a tree like it; None leaves a parameter as it is.

    Returns:
      The new parameters, in their own dtypes.

    Raises:
      ValueError, TypeError: the trees do not fit, or a tensor has no memory.

    Example:
      >>> import torch
      >>> apply_updates({"w": torch.ones(2)}, {"w": torch.full((2,), 0.5)})
      {'w': tensor([1.5000, 1.5000])}
    """
    if params is None:
        raise TypeError("`params` of apply_updates is None, expected a tree of tensors.")
    if torch.compiler.is_dynamo_compiling():
        added = add(params, updates)
        if added is not None:
            return added
    leaves, spec = flatten(params)
    try:
        others = leaves_like(spec, updates)
    except (ValueError, TypeError):
        raise ValueError(f"updates do not have the structure of params: {difference(spec, updates)}.") from None
    for path, p, u in zip(paths(spec), leaves, others, strict=True):
        if p is not None and u is not None:
            check_fit("updates", "parameter", path, u, check_leaf("params", path, p))
            check_stored("params", path, p)
            check_stored("updates", path, u)
    if torch.is_grad_enabled() and not needs_dispatch() and not requires_gradient(others):
        warn_of_growth([None if u is None else p for p, u in zip(leaves, others, strict=True)], spec)
    if isinstance(params, Packed) and isinstance(updates, Packed) and params.form is updates.form:
        return params.with_buffers(sums(params.buffers, updates.buffers))
    return packed_like(params, spec.unflatten(sums(leaves, others)))


def apply_gradients(
    tx: GradientTransformation, params: Tree, grads: Tree, state: Any, *, donate: bool = False, **extra: Any
) -> tuple[Tree, Any]:
    """Updates parameters by gradients: `update` and `apply_updates` in one, as one program.

    Args:
      tx: the transformation.
      params: a tree of floating tensors.
      grads: a tree like it; None skips a parameter and leaves its state as it is.
      state: the result of `tx.init(params)`, or the state of the last step.
      donate: whether to reuse the memory of `params` and `state` for the results, as JAX does with donated
        arguments: both are updated in place and returned. The state of a rule for whole tensors, and parts of
        the state that come before one or before a transformation that is not made of rules, are returned anew: go
        on with the state that is returned. Gradients are never written.
      **extra: further arguments, such as `value`, for whichever transformation wants them.

    Returns:
      The new parameters and the new state.

    Raises:
      ValueError, TypeError: a tree, shape, dtype or device does not fit, or donated tensors share memory. Nothing
        has been written.
      RuntimeError: `donate` where autograd or `torch.func` is recording.

    Example:
      >>> import functional_optim as fo, torch
      >>> tx = fo.sgd(learning_rate=0.1)
      >>> params = {"w": torch.ones(2)}
      >>> state = tx.init(params)
      >>> params, state = fo.apply_gradients(tx, params, {"w": torch.ones(2)}, state)
      >>> params["w"]
      tensor([0.9000, 0.9000])
    """
    tx = tx if isinstance(tx, GradientTransformation) else as_transformation(tx, "`tx` of apply_gradients")
    if params is None:
        raise TypeError("`params` of apply_gradients is None, expected a tree of tensors.")
    if donate is not True and donate is not False:
        donate = checked_switch("donate", "apply_gradients", donate)
    return run(tx, True, grads, state, params, extra, donate)
