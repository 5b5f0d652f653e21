"""Steps of the rows that sparse gradients touch.

They are computed on copies of the rows and counters, and written back when everything else has succeeded, so that a
step that fails changes nothing. Kernels, options and counters are those of any step over parameters.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch

from ._params.journal import Journal
from ._params.local import tensor_of
from ._params.step import ParamStep
from ._params.template import States
from ._regions import Stored
from ._runtime.checks import at, check_fit, check_leaf, check_stored
from ._runtime.cuda.capture import refuse_work_of_the_host
from ._runtime.groups import Columns, Key
from ._runtime.internals import needs_dispatch
from ._runtime.overlap import OverlapCheck, SharedMemoryError
from ._runtime.spec import TensorSpec


def capacity(n: int) -> int:
    """The number of rows that copies of `n` rows have: a number out of few, so that steps find what they are bound to.

    Example:
      >>> [capacity(n) for n in (0, 9, 33, 1000)]
      [8, 10, 40, 1024]
    """
    grain = 1 << max(n.bit_length() - 3, 0)
    return max(-(-n // grain) * grain, 8)


class Rows:
    """The rows that a sparse gradient touches: the slices of a tensor at its indices.

    Copies of rows have some rows of zeros behind them; see `capacity`.

    Args:
      grad: the gradient, in coordinate form; values that have the same indices are added up.

    Example:
      >>> grad = torch.sparse_coo_tensor([[2, 0, 2]], [1.0, 2.0, 3.0], (4,), check_invariants=True)
      >>> rows = Rows(grad)
      >>> rows.values, rows.of(torch.arange(1.0, 5.0))
      (tensor([2., 4., 0., 0., 0., 0., 0., 0.]), tensor([1., 3., 0., 0., 0., 0., 0., 0.]))
    """

    def __init__(self, grad: torch.Tensor) -> None:
        grad = grad.detach().coalesce()
        self.values = grad.values()
        self.n = len(self.values)
        self.indices = tuple(grad.indices())
        self.is_number = not grad.ndim
        if self.is_number:  # one row
            self.indices = (torch.zeros(self.n, dtype=torch.int64, device=grad.device),)
        if self.n != capacity(self.n):
            values, self.values = self.values, self._room(self.values, self.values.shape[1:])
            self.values[: self.n] = values

    def _room(self, like: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Memory for rows of a shape, with zeros behind them."""
        made = torch.empty((capacity(self.n), *shape), dtype=like.dtype, device=like.device)
        made[self.n :].zero_()
        return made

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of the rows of a tensor."""
        x = x.detach()
        x = x.unsqueeze(0) if self.is_number else x
        made = self._room(x, x.shape[len(self.indices) :])
        if len(self.indices) == 1:
            torch.index_select(x, 0, self.indices[0], out=made[: self.n])  # four times as fast as the other
        else:
            made[: self.n] = x[self.indices]
        return made

    def write(self, x: torch.Tensor, rows: torch.Tensor) -> None:
        """Writes rows to a tensor."""
        x = x.unsqueeze(0) if self.is_number else x
        if len(self.indices) == 1:
            x.index_copy_(0, self.indices[0], rows[: self.n])
        else:
            x.index_put_(self.indices, rows[: self.n])


class RowStep:
    """A step of the rows that sparse gradients touch.

    Args:
      step: the step over parameters whose gradients are sparse; its rules compute element by element.
      params: all parameters.
      columns: the slots; see `ParamState.columns`.
      grads: the sparse gradients, None for all other parameters.
      others: the parameters that another part of the step writes.
      disjoint: that of the last step.

    Attributes:
      disjoint: pointers and specs of tensors that were found to share no memory.

    Raises:
      ValueError, TypeError: a tensor does not fit.
      SharedMemoryError: tensors that are written share memory.
      CaptureError: a CUDA graph is being captured.
    """

    def __init__(
        self,
        step: ParamStep,
        params: Sequence[torch.Tensor],
        columns: Columns,
        grads: Sequence[torch.Tensor | None],
        others: Sequence[int],
        disjoint: Sequence[tuple[int, TensorSpec]],
    ) -> None:
        refuse_work_of_the_host("the rows of sparse gradients are found", step.devices)
        self.step, self.n_params, self.keys = step, len(params), tuple(columns)
        stored = {s.key: s for segment in step.regions for s in segment.region.stored}
        self.per_leaf = {k for k, s in stored.items() if k == "step" or (s.slot is not None and s.slot.per_leaf)}
        self.whole: dict[tuple[Key, int], Any] = {("params", i): params[i] for i in step.present}
        self.whole |= {(key, i): columns[key][i] for key, s in stored.items() for i in step.present if s.seen[i]}
        self._check(params, grads, stored)
        self.disjoint = disjoint
        if not needs_dispatch():
            self._refuse_overlap([*self.whole.items(), *((("params", i), params[i]) for i in others)])
        self.rows = {i: Rows(g) for i, g in enumerate(grads) if g is not None}
        self.copies = {(key, i): self._copy(key, i, x) for (key, i), x in self.whole.items()}

    def _check(
        self,
        params: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor | None],
        stored: Mapping[Key, Stored],
    ) -> None:
        """Refuses tensors whose rows are not those of the gradient."""
        for i in self.step.present:
            g, name = grads[i], self.step.paths[i]
            p = tensor_of(params[i], f"params at {name!r}")
            check_leaf("params", name, p)
            check_stored("params", name, p)
            if g is not None and g.shape != params[i].shape:
                raise ValueError(
                    f"updates{at(name)} has shape {tuple(g.shape)}, but its parameter has {tuple(params[i].shape)}."
                )
            for key, s in stored.items():
                if s.seen[i] and key not in self.per_leaf:
                    check_stored(s.name, name, check_fit(s.name, "parameter", name, self.whole[key, i], p))

    def _refuse_overlap(self, tensors: Sequence[tuple[tuple[Key, int], Any]]) -> None:
        """Refuses to write to memory that two tensors share."""
        found = [(key, i, x) for (key, i), x in tensors if isinstance(x, torch.Tensor)]
        addresses = [(x.data_ptr(), TensorSpec.of(x)) for _, _, x in found]
        if addresses == self.disjoint:
            return
        specs = [spec for _, spec in addresses]
        clash: tuple[int, int] | None = next(((k, k) for k, spec in enumerate(specs) if spec.repeats), None)
        if clash is None:
            clash = OverlapCheck(specs, [True] * len(specs)).find([address for address, _ in addresses])
        if clash is not None:
            (a, i, _), (b, j, _) = found[clash[0]], found[clash[1]]
            raise SharedMemoryError(self._label(a, i), self._label(b, j))
        self.disjoint = addresses

    def _label(self, key: Key, i: int) -> str:
        """A tensor as messages call it."""
        name = "params" if key == "params" else f"state {key if isinstance(key, str) else key[1]}"
        return f"{name}{at(self.step.paths[i])}"

    def _copy(self, key: Key, i: int, x: Any) -> torch.Tensor:
        """A copy of the rows of a tensor, or of a number."""
        if key == "step":
            return self.step.state.counter_of(x, i)
        return x.clone() if key in self.per_leaf else self.rows[i].of(x)

    def take(
        self,
        states: States,
        options: Sequence[Mapping[str, Any]],
        extra: Mapping[str, Any],
        journal: Journal,
    ) -> None:
        """Computes the step on copies.

        Args:
          states: the state of each parameter.
          options: mappings that hyper-parameters are looked up in.
          extra: the extra arguments.
          journal: takes note of entries of state that are replaced.

        Raises:
          ValueError, TypeError, RuntimeError: something does not fit.
        """
        columns: dict[Key, list[Any]] = {key: [None] * self.n_params for key in ("params", *self.keys)}
        for (key, i), x in self.copies.items():
            columns[key][i] = x
        params = columns.pop("params")
        grads = [self.rows[i].values if i in self.rows else None for i in range(self.n_params)]
        self.step.begin()
        outcome = self.step.take(dict(columns), params, grads, states, options, extra, frozenset(), journal)
        assert outcome == "taken", "all gradients and entries are there and dense"

    def write(self, states: Sequence[MutableMapping[str, Any]]) -> None:
        """Writes the rows and numbers that have been computed.

        Args:
          states: the state of each parameter.
        """
        for (key, i), x in self.copies.items():
            whole = self.whole[key, i]
            if not isinstance(whole, torch.Tensor):
                states[i]["step"] = int(x) if self.step.state.counts_in_integers else x
            elif key in self.per_leaf:
                whole.copy_(x)
            else:
                self.rows[i].write(whole, x)
