"""`torch.optim.LBFGS`: the same iterates, and steps that leave parameters where the loss is a number."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch

from functional_optim._lbfgs.capture import refuse_capture
from functional_optim._lbfgs.point import Point
from functional_optim._lbfgs.recursion import Number, two_loop
from functional_optim._lbfgs.strong_wolfe import strong_wolfe
from functional_optim._runtime.checks import check_stored
from functional_optim._runtime.shard import real_view
from functional_optim._warn import warn

from ._groups import copied
from ._loading import check_entry, check_state_dict, parts_of
from ._numbers import check_number, naming_numbers


CONVEX = 1e-10  # torch's least product of a step and the difference of gradients over it
NUMBER_OPTIONS = ("lr", "max_iter", "max_eval", "tolerance_grad", "tolerance_change", "history_size")
NEGATED = ("lr", "tolerance_change")  # options of which torch takes no tensor of bools
VECTORS = ("d", "prev_flat_grad")
LISTS = ("old_dirs", "old_stps", "ro")
# options that files lack: one of newer versions of torch, and one that torch adds to the defaults where it loads
LATER_OPTIONS = ("maximize", "differentiable")


class _Loss:
    """The loss over the parameters of an optimizer as one vector; it moves them, in place.

    Args:
      params: the parameters.
      closure: evaluates the model and returns the loss.
      maximize: whether the loss is to grow: then its negative is minimized.
    """

    def __init__(self, params: Sequence[torch.Tensor], closure: Callable[[], Any], maximize: bool) -> None:
        self.params, self.closure, self.maximize = params, closure, maximize

    def evaluate(self) -> tuple[Any, float, torch.Tensor]:
        """The loss at the parameters, as the closure returns it; it as a number, and the gradient, to be minimized.

        Raises:
          TypeError: the closure returned something else than a number.
        """
        with torch.enable_grad():
            loss = self.closure()
        try:
            value, grad = float(loss), self.flat_grad()
        except (TypeError, ValueError, RuntimeError):
            if isinstance(loss, (int, float)) or (isinstance(loss, torch.Tensor) and loss.numel() == 1):
                raise
            raise TypeError(f"the closure of LBFGS returned {loss!r:.60}, expected the loss, one number.") from None
        return (loss, -value, -grad) if self.maximize else (loss, value, grad)

    def flat_grad(self) -> torch.Tensor:
        """The gradients of all parameters, zeros for one that has none.

        Raises:
          ValueError: a gradient has no memory.
        """
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self.params]
        _check_stored("the gradient of parameter", dict(enumerate(grads)))
        dense = [g if g.layout is torch.strided else g.to_dense() for g in grads]
        return torch.cat([real_view(g.resolve_conj()).reshape(-1) for g in dense])

    def move(self, step: Number, direction: torch.Tensor) -> None:
        """Adds a multiple of a direction to the parameters."""
        views = [real_view(p.detach(), f"parameter {i}") for i, p in enumerate(self.params)]
        for view, part in zip(views, direction.split_with_sizes([view.numel() for view in views]), strict=True):
            view.add_(part.view(view.shape), alpha=float(step))

    def copies(self) -> list[torch.Tensor]:
        """Copies of the parameters."""
        return [p.detach().clone() for p in self.params]

    def put_back(self, values: Sequence[torch.Tensor]) -> None:
        """Overwrites the parameters."""
        for p, value in zip(self.params, values, strict=True):
            p.detach().copy_(value)

    def search(self, start: Point, first: Number, direction: torch.Tensor, max_steps: int) -> tuple[Point, int]:
        """Searches a step along a direction; parameters are where they were afterwards."""
        before = self.copies()

        def at(step: Number) -> Point:
            self.move(step, direction)
            _, value, grad = self.evaluate()
            self.put_back(before)
            return Point(step, value, grad.dot(direction), grad)

        return strong_wolfe(at, start, first, direction.abs().max(), max_steps=max_steps)


class _Moved(NamedTuple):
    """A last move after which the loss was not evaluated.

    Args:
      before: the parameters before it.
      step, direction: the move.
    """

    before: list[torch.Tensor]
    step: Number
    direction: torch.Tensor


def _is_finite(value: float, grad: torch.Tensor) -> bool:
    return math.isfinite(value) and bool(torch.isfinite(grad.abs().max()))


def _warn(value: float) -> None:
    found = "a gradient that is not finite" if math.isfinite(value) else f"a loss of {value}"
    warn(
        f"the closure of LBFGS returned {found}; parameters stay at the last point where both were finite.",
        RuntimeWarning,
    )


@naming_numbers
class LBFGS(torch.optim.LBFGS):
    """`torch.optim.LBFGS`; arguments, defaults, state and iterates are the same.

    A loss or a gradient that is no finite number is refused: the line search backs off from it; without a line search
    the move is taken back and the step ends there, with a warning. torch goes on with NaN in the parameters. If the
    closure raises, parameters and state are what they were before the step.

    Args:
      params: parameters, named parameters, or one parameter group.
      lr: the first step of the line search, or the step without one.
      max_iter: how many iterations a step takes at most.
      max_eval: how often it evaluates the closure at most; by default `max_iter * 5 // 4`.
      tolerance_grad: the largest element of the gradient at which it ends.
      tolerance_change: the change of the loss or of parameters at which it ends.
      history_size: the number of pairs of differences that the inverse Hessian is made of.
      line_search_fn: `"strong_wolfe"` or None.
      maximize: whether the loss is to grow; an argument of torch 2.14 and later.

    Raises:
      ValueError: `lr` is out of its range, or there are several parameter groups.

    Example:
      >>> import torch
      >>> p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
      >>> opt = LBFGS([p], line_search_fn="strong_wolfe")
      >>> def closure():
      ...     opt.zero_grad()
      ...     loss = (p * p).sum()
      ...     loss.backward()
      ...     return loss
      >>> opt.step(closure).item(), p.detach().abs().max().item() < 1e-6
      (25.0, True)

    Source: Liu & Nocedal 1989, "On the limited memory BFGS method for large scale optimization".
    """

    _moved: _Moved | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds the one parameter group.

        Raises:
          ValueError: there is one.
        """
        super().add_param_group(copied(param_group))
        if len(self.param_groups) > 1:
            del self.param_groups[1:]
            raise ValueError("LBFGS doesn't support per-parameter options (parameter groups)")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step of up to `max_iter` iterations.

        Args:
          closure: clears the gradients, evaluates the model, computes the gradients and returns the loss. It is called
            several times, with gradients enabled.

        Returns:
          The first loss.

        Raises:
          TypeError: there is no closure, or an option is no number.
          RuntimeError: `line_search_fn` is none that is known, or a CUDA graph is being captured.
        """
        if not callable(closure):
            raise TypeError(
                f"LBFGS evaluates the model several times in a step: call `step(closure)` with a function that clears "
                f"the gradients, computes the loss and its gradients, and returns the loss, not {closure!r:.60}."
            )
        if len(self.param_groups) != 1:
            raise AssertionError(f"Expected exactly one param_group, but got {len(self.param_groups)}")
        group = self.param_groups[0]
        if group["line_search_fn"] not in (None, "strong_wolfe"):
            raise RuntimeError(f"only 'strong_wolfe' is supported, not {group['line_search_fn']!r:.60}")
        for name in NUMBER_OPTIONS:
            check_number(name, group[name])
            if name in NEGATED and isinstance(group[name], torch.Tensor) and group[name].dtype is torch.bool:
                raise TypeError(f"`{name}` is a tensor of dtype {group[name].dtype}, expected a number.")
        refuse_capture("LBFGS compares values of the loss", group["params"])
        with torch.no_grad():
            return self._step(_Loss(group["params"], closure, group.get("maximize", False)), group)

    def _step(self, over: _Loss, group: dict[str, Any]) -> Any:
        """Takes a step, all or nothing: `own` takes the place of the state at its end."""
        first = over.params[0]
        _check_stored("parameter", dict(enumerate(over.params)))
        _check_stored("the state", _vectors_of(self.state.get(first, {})))
        own = {"func_evals": 0, "n_iter": 0, **self.state.get(first, {})}
        own |= {key: list(own[key]) for key in LISTS if key in own}
        own.pop("al", None)  # numbers of torch's own that need not be kept
        before = over.copies()
        try:
            loss, moved = self._iterate(over, group, own, before)
        except BaseException:
            over.put_back(before)
            raise
        state = self.state.setdefault(first, {})
        state.clear()
        state.update(own)
        self._moved = moved
        return loss

    def _iterate(
        self, over: _Loss, group: dict[str, Any], own: dict[str, Any], before: list[torch.Tensor]
    ) -> tuple[Any, _Moved | None]:
        """Moves the parameters.

        Args:
          over: the loss.
          group: the options.
          own: the state, which is written to.
          before: copies of the parameters.

        Returns:
          The first loss; and the last move, if the loss was not evaluated after it.
        """
        first_loss, value, grad = over.evaluate()
        own["func_evals"] += 1
        if not grad.numel():
            return first_loss, None
        if not _is_finite(value, grad):
            self._take_back(over, own)
            _warn(value)
            return first_loss, None
        if grad.abs().max() <= group["tolerance_grad"]:
            return first_loss, None
        lr = group["lr"].reshape(()) if isinstance(group["lr"], torch.Tensor) else group["lr"]
        evaluations = 1
        n = 0
        while n < group["max_iter"]:  # a number from a file may be no whole one
            n += 1
            own["n_iter"] += 1
            direction = own["d"] = _direction(own, grad, group["history_size"])
            own["prev_flat_grad"], own["prev_loss"] = grad, value
            own["t"] = _first_step(grad) * lr if own["n_iter"] == 1 else lr
            slope = grad.dot(direction)
            if slope > -group["tolerance_change"]:
                break
            last = n == group["max_iter"]
            before = before if n == 1 else over.copies()
            if group["line_search_fn"] is not None:
                start = Point(0, value, slope, grad)
                point, used = over.search(start, own["t"], direction, group["max_eval"] - evaluations)
                own["t"], value, grad = point.step, point.value, point.grad
                over.move(own["t"], direction)
            else:
                over.move(own["t"], direction)
                if last:
                    return first_loss, _Moved(before, own["t"], direction)
                _, value, grad = over.evaluate()
                used = 1
                if not _is_finite(value, grad):
                    over.put_back(before)
                    own["t"] = 0.0  # no pair is made of a move that was taken back
            evaluations += used
            own["func_evals"] += used
            if not _is_finite(value, grad):
                _warn(value)
                break
            if (
                last
                or evaluations >= group["max_eval"]
                or grad.abs().max() <= group["tolerance_grad"]
                or direction.mul(own["t"]).abs().max() <= group["tolerance_change"]
                or abs(value - own["prev_loss"]) < group["tolerance_change"]
            ):
                break
        return first_loss, None

    def _take_back(self, over: _Loss, own: dict[str, Any]) -> None:
        """Takes back the last move of the last step, if parameters are where that left them, without an evaluation."""
        if self._moved is None:
            return
        now = over.copies()
        over.put_back(self._moved.before)
        over.move(self._moved.step, self._moved.direction)
        if all(map(torch.equal, over.params, now)):
            over.put_back(self._moved.before)
            own["t"] = 0.0
        else:  # somebody has changed the parameters
            over.put_back(now)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict, of this class or of torch's; tensors are copied.

        Raises:
          KeyError: it lacks the states or the groups; nothing has been changed.
          ValueError: it is the state of other parameters or of another class; nothing has been changed.
        """
        check_state_dict(state_dict)
        # behind the hooks of others, which may mend the state dict
        last = self.register_load_state_dict_pre_hook(lambda _, found: self._checked(found))
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        self._moved = None

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state dict that fits, with copies of its states."""
        states, groups = parts_of(state_dict)
        # entries of no parameter are kept, as torch keeps them
        own = {key: saved for key, saved in states.items() if any(key in group["params"] for group in groups)}
        self._refuse_another_class(own, groups)
        params = [p for group in self.param_groups for p in group["params"]]
        n = sum(p.numel() * (1 + p.is_complex()) for p in params)
        for key, saved in own.items():
            vectors = _vectors_of(saved)
            wrong = next((x for x in vectors.values() if x.numel() != n), None)
            if wrong is not None:
                raise ValueError(
                    f"the saved state of parameter {key} has a vector of {wrong.numel()} elements, but the parameters "
                    f"have {n}."
                )
            for k, x in saved.items():
                check_entry(f"the saved {k!r}", f"of parameter {key}", x, params)
        for g, group in enumerate(groups):
            check_entry("'lr'", f"of param_groups[{g}] of the state dict", group["lr"], params)
        return {**state_dict, "state": deepcopy(states)}

    def _refuse_another_class(self, states: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]]) -> None:
        """Refuses options and states that another class has saved."""
        expected = [k for k in self.defaults if k not in LATER_OPTIONS]
        for g, group in enumerate(groups):
            lacking = [k for k in expected if k not in group]
            if lacking:
                raise ValueError(
                    f"param_groups[{g}] of the state dict lacks {', '.join(map(repr, lacking))}; it has "
                    f"{', '.join(repr(k) for k in group if k != 'params')}, so another class than LBFGS saved it."
                )
        for key, saved in states.items():
            if not isinstance(saved, Mapping):
                raise ValueError(f"the saved state of parameter {key} is {saved!r:.60}, expected a dict.")
            lacking = [k for k in ("func_evals", "n_iter") if saved and k not in saved]
            if lacking:
                raise ValueError(
                    f"the saved state of parameter {key} lacks {', '.join(map(repr, lacking))}; it has "
                    f"{', '.join(map(repr, saved))}, so another class than LBFGS saved it."
                )


def _vectors_of(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The vectors of a state, by key and position."""
    listed = {f"{k}[{i}]": x for k in LISTS[:2] for i, x in enumerate(state.get(k) or ())}
    return {**{k: state[k] for k in VECTORS if state.get(k) is not None}, **listed}


def _check_stored(name: str, tensors: Mapping[Any, torch.Tensor]) -> None:
    """Refuses tensors whose storage has been freed or cut, which operations of torch would read.

    Raises:
      ValueError: with the name and the key.
    """
    for key, x in tensors.items():
        if isinstance(x, torch.Tensor) and x.layout is torch.strided:
            check_stored(f"{name} {key}", "", x)


def _first_step(grad: torch.Tensor) -> Number:
    """The step of the first iteration, as a part of the learning rate; torch keeps a number, or a tensor."""
    steps: list[Number] = [1.0, 1.0 / grad.abs().sum()]
    return min(steps)


def _direction(own: dict[str, Any], grad: torch.Tensor, history_size: int) -> torch.Tensor:
    """The direction of an iteration; the state takes up the curvature pair of the last one."""
    if own["n_iter"] == 1:
        own.update(old_dirs=[], old_stps=[], ro=[], H_diag=1)
        return grad.neg()
    y, s = grad.sub(own["prev_flat_grad"]), own["d"].mul(own["t"])
    product = y.dot(s)
    if product > CONVEX:
        for key, x in zip(LISTS, (y, s, 1.0 / product), strict=True):
            own[key].append(x)
            del own[key][: max(len(own[key]) - history_size, 0)]
        own["H_diag"] = product / y.dot(y)
    return two_loop(grad.neg(), own["old_stps"], own["old_dirs"], own["ro"], own["H_diag"])
