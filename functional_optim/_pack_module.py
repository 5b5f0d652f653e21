"""`pack_module`: the parameters of a module, and their gradients, as views of buffers."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ._pack import pack
from ._packed import Packed
from ._runtime.internals import registries
from ._runtime.overlap import OverlapCheck, SharedMemoryError
from ._runtime.spec import PLAIN, TensorSpec


R = TypeVar("R")


def _apart(method: Callable[["PackedModule"], R]) -> Callable[["PackedModule"], R]:
    """A method that is called outside of a compiled graph, which cannot follow the checks of a module."""

    @functools.wraps(method)
    def called(packed: "PackedModule") -> R:
        if torch.compiler.is_dynamo_compiling():
            from ._traced import module_outside  # an import of the compiler, which takes seconds

            return module_outside(method, packed)
        return method(packed)

    return called


class PackedModule:
    """The parameters of a module and their gradients, as packed trees; made by `pack_module`.

    Args:
      module: the module.
      parameters: those of its parameters that are packed, by name.

    Example:
      >>> packed = pack_module(nn.Linear(2, 1))
      >>> [(name, tuple(p.shape)) for name, p in packed.params.tree().items()]
      [('weight', (1, 2)), ('bias', (1,))]
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._module, self._parameters = module, dict(parameters)
        self._frozen = {name: p for name, p in module.named_parameters() if name not in parameters}
        self._note_registered()
        self._params = pack({name: p.detach() for name, p in parameters.items()})
        self._grads = self._params.map(torch.zeros_like)
        views: dict[str, torch.Tensor] = self._params.tree()
        self._grad_views: dict[str, torch.Tensor] = self._grads.tree()
        for name, p in self._parameters.items():
            if p.grad is not None:
                self._grad_views[name].copy_(p.grad)
            p.grad, p.data = None, views[name]
            p.grad = self._grad_views[name]
        self._known = self._pointers()
        self._params.tied = tuple(self._parameters.values())

    @property
    @_apart
    def params(self) -> Packed:
        """The parameters. To write to one is to write to the other.

        Raises:
          RuntimeError: a parameter has been given other memory since, as `module.to(...)` does, or the module has
            other parameters.
        """
        self._refuse_replaced()
        found = self._pointers()
        if found != self._known:
            name = next(n for n, x, y in zip(self._parameters, found, self._known, strict=True) if x != y)
            raise RuntimeError(
                f"the parameter {name!r} has been given other memory since its module was packed; move and convert a "
                f"module first, then call `pack_module`."
            )
        return self._params

    def _pointers(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self._parameters.values()))

    @property
    @_apart
    def grads(self) -> Packed:
        """The gradients, zeros where a parameter has none.

        `backward` adds to them in place. A gradient that something has replaced, as `zero_grad` does by default, is
        copied to its place, and the parameter given the view again.
        """
        self._refuse_replaced()
        self._refuse_frozen()
        for name, p in self._parameters.items():
            view = self._grad_views[name]
            if p.grad is view:
                continue
            if p.grad is None:
                view.zero_()
            else:
                view.copy_(p.grad.detach())
            p.grad = view
        return self._grads

    @_apart
    def zero_grad(self) -> None:
        """Sets all gradients to zero, one operation for each buffer."""
        self._refuse_replaced()
        self._refuse_frozen()
        for name, p in self._parameters.items():
            if p.grad is not self._grad_views[name]:
                p.grad = self._grad_views[name]
        for x in self._grads.buffers:
            x.zero_()

    def _note_registered(self) -> None:
        """Notes the parameters and children that the module, and each module within it, have now."""
        self._entries = [own.values() for own in registries(self._module)]  # views, which follow their dicts
        self._registered = list(itertools.chain.from_iterable(self._entries))
        self._known_ids = list(map(id, self._registered))

    def _refuse_replaced(self) -> None:
        """Refuses a module whose parameters are not the packed ones.

        Raises:
          RuntimeError: with the name of one.
        """
        if list(map(id, itertools.chain.from_iterable(self._entries))) == self._known_ids:
            return
        own = self._parameters
        now = dict(self._module.named_parameters())
        there = {k: p for k, p in now.items() if k in own or (p.requires_grad and p is not self._frozen.get(k))}
        name = next((name for name in (*own, *there) if there.get(name) is not own.get(name)), None)
        if name is not None:
            change = "was taken from" if name not in there else "was replaced in" if name in own else "was given to"
            raise RuntimeError(
                f"the parameter {name!r} {change} the module after it was packed, so a step would not train what the "
                f"module computes with; pack the module again, with `pack_module`. A state goes on if names and shapes "
                f"are the same."
            )
        self._note_registered()

    def _refuse_frozen(self) -> None:
        """Refuses parameters that were frozen or unfrozen later.

        Raises:
          RuntimeError: with the name of one.
        """
        frozen = next((name for name, p in self._parameters.items() if not p.requires_grad), None)
        if frozen is not None:
            raise RuntimeError(
                f"{frozen!r} was frozen after the module was packed, and a gradient of zeros would not keep momentum "
                f"and decay from changing it; pack the module again, with `pack_module`, once it is frozen."
            )
        unfrozen = next((name for name, p in self._frozen.items() if p.requires_grad), None)
        if unfrozen is not None:
            raise RuntimeError(
                f"{unfrozen!r} was frozen when the module was packed and is not now, and a step would not train it; "
                f"pack the module again, with `pack_module`."
            )

    def __repr__(self) -> str:
        return f"PackedModule({self._params})"

    def __reduce__(self) -> Any:
        raise TypeError(
            "a PackedModule belongs to the memory of its module; copy or save the module, and pack the copy, with "
            "`pack_module`."
        )


def pack_module(module: nn.Module) -> PackedModule:
    """Makes the parameters of a module that require a gradient, and their gradients, views of a few buffers.

    Parameters stay the objects that they are, so optimizers that have them keep working; tied ones stay tied. Frozen
    parameters and buffers of the module stay where they are. The result gives packed trees of both: steps of
    `apply_gradients` that are donated train the module, and a process group reduces one buffer of gradients.

    A parameter that a loss does not depend on has a gradient of zeros in place of none, so momentum and decay change
    it; freeze it before if they should not. Move and convert a module before it is packed. One that is given other
    parameters later is refused by the next step: pack it again.

    Args:
      module: the module.

    Returns:
      An object with the packed trees `params` and `grads`, by the names of `module.named_parameters()`, and
      `zero_grad()`.

    Raises:
      TypeError: the module has no parameters that require a gradient, or one that is no plain tensor: one that is on
        meta, has not been initialized, is spread over processes, or has a sparse gradient. Nothing has been changed.
      ValueError: parameters share memory without being tied.

    Example:
      >>> import functional_optim as fo
      >>> model = torch.nn.Linear(3, 1)
      >>> packed = fo.pack_module(model)
      >>> tx = fo.adamw(1e-2)
      >>> state = tx.init(packed.params)
      >>> for _ in range(3):
      ...     packed.zero_grad()
      ...     model(torch.ones(2, 3)).square().sum().backward()
      ...     _, state = fo.apply_gradients(tx, packed.params, packed.grads, state, donate=True)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"pack_module takes a module, got {type(module).__name__}; `pack` takes trees.")
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        raise TypeError("the module has no parameters that require a gradient, so there is nothing to pack.")
    for name, p in parameters.items():
        _check(name, p)
    others = dict(module.named_buffers()) | {k: p for k, p in module.named_parameters() if not p.requires_grad}
    _refuse_overlap(parameters, others)
    with torch.no_grad():
        return PackedModule(module, parameters)


def _check(name: str, p: Any) -> None:
    """Refuses a parameter that cannot be a view of a buffer."""
    label = f"the parameter {name!r}"
    if type(p) not in PLAIN:
        raise TypeError(f"{label} is {type(p).__name__}, whose memory is not that of a tensor; leave it unpacked.")
    if p.is_meta:
        raise TypeError(f"{label} is on meta and has no memory; call `module.to_empty(device=...)` first.")
    if p.layout is not torch.strided or (p.grad is not None and p.grad.layout is not torch.strided):
        raise TypeError(f"{label} or its gradient is sparse; use `nn.Embedding(..., sparse=False)`.")


def _refuse_overlap(parameters: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> None:
    """Refuses parameters that share memory with another tensor of the module."""
    plain = {k: x for k, x in others.items() if type(x) in PLAIN and x.layout is torch.strided and not x.is_meta}
    names, tensors = [*parameters, *plain], [*parameters.values(), *plain.values()]
    specs = [TensorSpec.of(x) for x in tensors]
    written = [k < len(parameters) for k in range(len(tensors))]
    pairs = ((k, k) for k, spec in enumerate(specs) if written[k] and spec.repeats)
    clash = next(pairs, None) or OverlapCheck(specs, written).find([x.data_ptr() for x in tensors])
    if clash is not None:
        first, second = (f"the {'parameter' if written[k] else 'tensor'} {names[k]!r}" for k in clash)
        remedy = "make them one parameter, or clone one of the two"
        raise ValueError(SharedMemoryError.text(first, second, "pack_module", remedy))
