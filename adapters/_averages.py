"""Averages in the place of parameters, for the length of a `with` block."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from functional_optim import _walk
from functional_optim._reading import marked_slots
from functional_optim._runtime.checks import check_stored
from functional_optim._runtime.shard import gathered_anew, local_tensor


if TYPE_CHECKING:
    from .optimizer import ChainOptimizer


@dataclass(frozen=True)
class _Swapped:
    """A parameter or a buffer that may hold its average.

    Args:
      p: the tensor.
      memory: a second tensor over the memory that it had, which autograd does not know.
      trained: a copy of its values.
    """

    p: torch.Tensor
    memory: torch.Tensor
    trained: torch.Tensor

    @classmethod
    def of(cls, p: torch.Tensor) -> "_Swapped":
        return cls(p, p.detach(), p.detach().clone())

    def put_back(self) -> None:
        """Puts the trained values back, in the memory where they were if it has not been freed."""
        part = local_tensor(self.memory)
        freed = part.numel() and not part.untyped_storage().nbytes()
        if not freed:
            with contextlib.suppress(Exception):  # of a tensor class of somebody's own
                if not _is_same(local_tensor(self.p), part):
                    self.p.data = self.memory
                self.memory.copy_(self.trained)
                return
        self.p.data = self.trained


@dataclass(frozen=True)
class _Registered:
    """A buffer in its module.

    Args:
      module: the module.
      name: its attribute.
      buffer: the tensor.
    """

    module: nn.Module
    name: str
    buffer: torch.Tensor

    def put_back(self) -> None:
        """Makes the tensor the module's buffer again, if another one has taken its place."""
        if getattr(self.module, self.name, None) is not self.buffer:
            setattr(self.module, self.name, self.buffer)


@contextlib.contextmanager
def averaged(
    optimizer: "ChainOptimizer",
    model: nn.Module | Iterable[nn.Module] | None,
    buffers: Mapping[str, torch.Tensor] | None,
    slot: str | None = None,
) -> Iterator[None]:
    """Swaps averages in, and parameters and buffers back; see `ChainOptimizer.averaged_params`."""
    models = _modules(model)
    pairs = _pairs(optimizer, slot)
    if not pairs:
        raise ValueError(
            "there are no averaged parameters: put `params_ema(decay)` or `params_swa(start)` at the end of the chain, "
            "or mark a slot of your rule by `slot(..., evaluate=True)`, and take a step."
        )
    if "_averaged" in optimizer.__dict__:
        raise RuntimeError("averaged_params() was called inside itself, where parameters are averages already.")
    statistics = _buffer_pairs(model, buffers)
    for x, average in (*pairs, *statistics):
        check_stored("a parameter or buffer", "", x)
        check_stored("an average", "", average)
    places = [
        _Registered(module, name, buffer)
        for each in models
        for module in each.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    kept = {id(place.buffer): place.buffer for place in places}
    undo: list[_Registered | _Swapped] = [
        *places,
        *map(_Swapped.of, kept.values()),
        *(_Swapped.of(p) for p, _ in pairs),
    ]
    with gathered_anew([p for p, _ in pairs], models):
        try:
            try:
                optimizer.__dict__["_averaged"] = True
                for x, average in (*pairs, *statistics):
                    x.detach().copy_(average.detach())
                yield
            finally:
                _undo(optimizer, undo)
        finally:  # an interrupt between two lines above leaves the rest to this call
            _undo(optimizer, undo)


def _undo(optimizer: "ChainOptimizer", swapped: list[_Registered | _Swapped]) -> None:
    """Restores tensors, the last one first, and removes each from the list; raises the first error at the end."""
    failed: Exception | None = None
    while swapped:
        try:
            swapped[-1].put_back()
        except Exception as error:
            failed = failed or error
        swapped.pop()
    optimizer.__dict__.pop("_averaged", None)
    if failed is not None:
        raise failed


def _pairs(optimizer: "ChainOptimizer", slot: str | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Parameters and their averages.

    Raises:
      ValueError: a parameter has two, or there is none of that name.
    """
    pairs = []
    for group in optimizer.param_groups:
        template = optimizer._bindings.template_of(optimizer, group)
        places = marked_slots({path: rule._bound.rule for path, rule in _walk.rules(template.tx).items()}, slot)
        averages = [template.keys[place] for place in places]
        for p in group["params"]:
            found = [key for key in averages if p in optimizer.state and key in optimizer.state[p]]
            if len(found) > 1:
                raise ValueError(
                    f"there are two averages of one parameter, {found[0]!r} and {found[1]!r}; say which to swap in: "
                    f"`averaged_params(slot={found[1]!r})`."
                )
            pairs += [(p, optimizer.state[p][key]) for key in found]
    return pairs


def _buffer_pairs(
    model: nn.Module | Iterable[nn.Module] | None, buffers: Mapping[str, torch.Tensor] | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Buffers of a model and the values that take their place.

    Raises:
      TypeError: there are values, and no model that they are for.
      ValueError: there is no such buffer, or it has another shape.
    """
    if buffers is None:
        return []
    if not isinstance(buffers, Mapping):
        raise TypeError(f"`buffers` of averaged_params is {buffers!r:.60}, expected a dict of tensors by name.")
    if not buffers:
        return []
    if not isinstance(model, nn.Module):
        raise TypeError("`buffers` are those of one module; pass it too: `averaged_params(model, buffers=...)`.")
    own = dict(model.named_buffers())
    for name, value in buffers.items():
        if name not in own:
            raise ValueError(f"`buffers` has {name!r}, which is no buffer of the model; it has {', '.join(own)}.")
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"`buffers` has {value!r:.60} for {name!r}, expected a tensor.")
        if value.shape != own[name].shape:
            raise ValueError(
                f"`buffers` has a value of shape {tuple(value.shape)} for {name!r}, whose shape is "
                f"{tuple(own[name].shape)}."
            )
    return [(own[name], value) for name, value in buffers.items()]


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same memory, looked at in the same way."""
    return (a.dtype, a.device, a.layout) == (b.dtype, b.device, b.layout) and a.is_set_to(b)


def _modules(model: nn.Module | Iterable[nn.Module] | None) -> list[nn.Module]:
    """The argument `model` as a list.

    Raises:
      TypeError: something in it is no module.
    """
    if model is None:
        return []
    if not isinstance(model, (nn.Module, Iterable)):
        raise TypeError(f"`model` is {type(model).__name__} {model!r:.60}, expected a module or several.")
    models = [model] if isinstance(model, nn.Module) else list(model)
    for each in models:
        if not isinstance(each, nn.Module):
            raise TypeError(f"`model` holds {type(each).__name__} {each!r:.60}, expected a module or several.")
    return models
