"""Averages in the place of parameters, for the length of a `with` block."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from functional_optim import _walk
from functional_optim._runtime.shard import gathered_anew, local_tensor
from functional_optim._transforms.averaging import AVERAGES


if TYPE_CHECKING:
    from .optimizer import ChainOptimizer


@dataclass(frozen=True)
class _Swapped:
    """A parameter that holds its average.

    Args:
      p: the parameter.
      memory: a second tensor over the memory that the parameter had, which autograd does not know.
      trained: a copy of its values.
    """

    p: torch.Tensor
    memory: torch.Tensor
    trained: torch.Tensor

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


@contextlib.contextmanager
def averaged(optimizer: "ChainOptimizer", model: nn.Module | Iterable[nn.Module] | None) -> Iterator[None]:
    """Swaps averages in, and parameters back; see `ChainOptimizer.averaged_params`."""
    models = _modules(model)
    pairs = _pairs(optimizer)
    if not pairs:
        raise ValueError(
            "there are no averaged parameters: put `params_ema(decay)` at the end of the chain, and take a step."
        )
    if "_averaged" in optimizer.__dict__:
        raise RuntimeError("averaged_params() was called inside itself, where parameters are averages already.")
    swapped = [_Swapped(p, p.detach(), p.detach().clone()) for p, _ in pairs]
    with gathered_anew([p for p, _ in pairs], models):
        try:
            try:
                optimizer.__dict__["_averaged"] = True
                for each, (_, average) in zip(swapped, pairs, strict=True):
                    each.memory.copy_(average.detach())
                yield
            finally:
                _undo(optimizer, swapped)
        finally:  # an interrupt between two lines above leaves the rest to this call
            _undo(optimizer, swapped)


def _undo(optimizer: "ChainOptimizer", swapped: list[_Swapped]) -> None:
    """Puts parameters back, and takes from the list those that are; an error is raised when all others are back."""
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


def _pairs(optimizer: "ChainOptimizer") -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Parameters and their averages; where a chain has several, the last."""
    pairs = []
    for group in optimizer.param_groups:
        template = optimizer._template_of(group)
        rules = _walk.rules(template.tx)
        averages = [
            key for (path, slot), key in template.keys.items() if AVERAGES.get(rules[path].bound.rule.name) == slot
        ]
        for p in group["params"]:
            found = [optimizer.state[p][key] for key in averages if p in optimizer.state and key in optimizer.state[p]]
            pairs += [(p, average) for average in found[-1:]]
    return pairs


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
    models = [model] if isinstance(model, nn.Module) else list(model)
    for each in models:
        if not isinstance(each, nn.Module):
            raise TypeError(f"`model` holds {type(each).__name__} {each!r:.60}, expected a module or several.")
    return models
