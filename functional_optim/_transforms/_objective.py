"""The objective along the direction of updates, as line searches evaluate it."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .._lbfgs.capture import refuse_capture
from .._lbfgs.point import Point
from .._runtime.internals import in_transformation
from .._tree import MaskedNode, Tree, flatten
from ._constants import without_derivatives
from ._vectors import Leaves, dot, flat, refuse_members, wide


class Objective:
    """The objective along the direction of updates.

    Args:
      name: the line search's name in messages.
      updates: the direction.
      params: the parameters.
      value, grad: the objective and its gradient there; they are computed if they are None.
      value_fn: the objective.
      extra: further arguments of an update, all of which `value_fn` takes.

    Raises:
      TypeError, ValueError: something is missing or does not fit.
      RuntimeError: a gradient of the objective is asked for where a transformation of `torch.func` is active.
      CaptureError: a CUDA graph is being captured.
    """

    def __init__(
        self,
        name: str,
        updates: Tree,
        params: Tree,
        value: Any,
        grad: Tree,
        value_fn: Callable[..., Any] | None,
        extra: Mapping[str, Any],
    ) -> None:
        if value_fn is None:
            raise TypeError(
                f"{name} evaluates the objective: call `update(updates, state, params, value=..., grad=..., "
                f"value_fn=...)`, with a function of the parameters; of an optimizer, `step(closure, value_fn=...)`."
            )
        self.name, self.own = name, Leaves(name, params)
        refuse_capture(f"{name} compares values of the objective", self.own.params)
        _refuse_holes(name, params)
        self.updates = self.own.read("updates", updates, fit=True)
        self.value_fn, self.extra = value_fn, _taken(name, value_fn, extra)
        self.direction = flat(self.updates)
        if value is None or grad is None:
            found, leaves = self._evaluate(0.0)
            value = found if value is None else value
            grad = self.own.tree(gradients(found, leaves)) if grad is None else grad
        grads = self.own.read("grad", grad, fit=True)
        self.given = updates, params, grad, value
        self.start = Point(0.0, self._scalar(f"`value` of {name}", value), dot(flat(grads), self.direction), grads)

    def value(self, step: Any) -> float:
        """The objective at a step."""
        with torch.no_grad():
            return self._scalar("`value_fn`", self._call(self._at(step)))

    def point(self, step: Any) -> Point:
        """The objective at a step, with its gradient."""
        value, leaves = self._evaluate(step)
        grads = gradients(value, leaves)
        with torch.no_grad():
            return Point(step, self._scalar("`value_fn`", value), dot(flat(grads), self.direction), grads)

    def scaled(self, step: Any) -> Tree:
        """The updates times a step; zeros for a step of 0, whatever the updates are."""
        step = float(step)
        with torch.no_grad():
            made = self.own.tree([u * step if step else torch.zeros_like(u) for u in self.updates])
        return without_derivatives(self.name, made, *self.given)

    def number(self, x: Any) -> torch.Tensor:
        """A number as it is stored: in the dtype of the first parameter, on its device."""
        first = self.own.params[0]
        return torch.tensor(float(x), dtype=wide(first).to_real(), device=first.device)

    def count(self, x: int) -> torch.Tensor:
        """A counter as it is stored."""
        return torch.tensor(x, device=self.own.params[0].device)

    def _scalar(self, subject: str, x: Any) -> float:
        """The objective as a number.

        Raises:
          TypeError, ValueError: the objective is something else.
        """
        refuse_members(self.name, subject, x)
        if isinstance(x, torch.Tensor) and (x.numel() != 1 or x.is_complex()):
            raise ValueError(
                f"{subject} is a tensor of shape {tuple(x.shape)} and {x.dtype}, expected one real number."
            )
        try:
            return float(x.detach() if isinstance(x, torch.Tensor) else x)
        except (TypeError, ValueError):
            raise ValueError(f"{subject} is {x!r:.60}, expected one real number.") from None

    def _at(self, step: Any) -> list[torch.Tensor]:
        """The parameters as they are after a step, to the bit."""
        with torch.no_grad():
            moved = [u * float(step) for u in self.updates] if float(step) else None
            pairs = zip(self.own.params, moved or self.updates, strict=True)
            return [(p.detach() + u).to(p.dtype) if moved else p.detach().clone() for p, u in pairs]

    def _call(self, leaves: list[torch.Tensor]) -> Any:
        return self.value_fn(self.own.tree(leaves), **self.extra)

    def _evaluate(self, step: Any) -> tuple[Any, list[torch.Tensor]]:
        """The objective at a step, recorded by autograd, and the parameters that it depends on.

        Raises:
          RuntimeError: a transformation of `torch.func` is active, in which no tensor may ask for its gradient.
        """
        if in_transformation():
            raise RuntimeError(
                f"{self.name} computes gradients of the objective by autograd, which cannot be done inside of "
                f"`torch.func.grad`, `vmap` and their like: take its steps outside of them. A derivative through them "
                f"would lack a term, so unroll another optimizer for one."
            )
        with torch.enable_grad():
            leaves = [x.requires_grad_() for x in self._at(step)]
            return self._call(leaves), leaves


def gradients(value: Any, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of a recorded value.

    Raises:
      ValueError: the value does not depend on the leaves.
    """
    if not (isinstance(value, torch.Tensor) and value.requires_grad):
        raise ValueError(
            f"`value_fn` returned {value!r:.60}, which autograd does not know to depend on the parameters; compute it "
            f"in operations of torch from the parameters that the function is given."
        )
    with torch.enable_grad():
        found = torch.autograd.grad(value.reshape(()), leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def _refuse_holes(name: str, params: Tree) -> None:
    """Refuses parameters some of which the transformation does not see."""
    if any(isinstance(x, MaskedNode) for x in flatten(params, is_leaf=lambda x: isinstance(x, MaskedNode))[0]):
        raise ValueError(
            f"{name} is inside `masked` or `partition` and does not see all parameters, so it cannot evaluate "
            f"`value_fn`; put it behind: `chain(masked(scale_by_lbfgs(), mask), scale(-1.0), {name}(...))`."
        )


def _taken(name: str, value_fn: Callable[..., Any], extra: Mapping[str, Any]) -> Mapping[str, Any]:
    """The extra arguments, which are for the objective.

    Raises:
      TypeError: the objective does not take one.
    """
    parameters = inspect.signature(value_fn).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [k for k in extra if k not in parameters and not takes_all]
    if unknown:
        raise TypeError(f"{name} got the extra argument {unknown[0]!r}, which `value_fn` does not take.")
    return extra
