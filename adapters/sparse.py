"""torch.optim's optimizer that takes sparse gradients only, as a chain; see `classes`."""

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import torch

import functional_optim as fo
from functional_optim._params.template import Template
from functional_optim._runtime.internals import in_checkpoint
from functional_optim._runtime.shard import is_dtensor
from functional_optim._transforms.adam import sparse_adam_step

from ._named import B1, B2, EPS, LR, NamedClass, before
from ._naming import template
from ._steps import StepInputs


class SparseAdam(NamedClass, torch.optim.SparseAdam):
    """`torch.optim.SparseAdam` from a chain; arguments, defaults and state are the same.

    Gradients must be sparse. A step changes the rows of a parameter, and of its moments, that its gradient touches, and
    counts for all of them.

    Example:
      >>> import torch
      >>> table = torch.nn.Embedding(3, 1, sparse=True)
      >>> _ = torch.nn.init.ones_(table.weight)
      >>> opt = SparseAdam(table.parameters(), lr=0.5)
      >>> table(torch.tensor([1])).sum().backward()
      >>> opt.step()
      >>> table.weight.detach().flatten(), opt.state[table.weight]["step"]
      (tensor([1.0000, 0.5000, 1.0000]), 1)
    """

    COMPILES: ClassVar[bool] = False  # graphs have no sparse tensors

    def _switches(self, group: Mapping[str, Any]) -> tuple[Hashable, ...]:
        return (bool(group.get("maximize")),)

    def _template(self, switches: tuple[Any, ...]) -> Template:
        return template(fo.chain(*before(switches[0], False), sparse_adam_step(LR, B1, B2, EPS)), self.SLOTS)

    def _row_template(self, switches: tuple[Any, ...]) -> Template | None:
        return self._template(switches)

    def _counter_dtype(self) -> torch.dtype | None:
        return None

    def _step_on(self, inputs: StepInputs) -> None:
        if any(map(is_dtensor, inputs.params)):
            raise RuntimeError("SparseAdam does not support DTensors, whose rows may be in other processes")
        # checkpoints have state made by a step of dense zeros, which does nothing else
        if not all(g is None or g.is_sparse for g in inputs.grads) and (self.state or not in_checkpoint()):
            raise RuntimeError("SparseAdam does not support dense gradients, please consider Adam instead")
        self._bindings.sparse = True
        super()._step_on(inputs)
