"""Inputs of a step of an optimizer, and its step on the rows that sparse gradients touch."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from functional_optim._params.journal import Journal
from functional_optim._params.step import ParamStep
from functional_optim._params.template import Template
from functional_optim._rows import RowStep
from functional_optim._runtime.shard import is_dtensor
from functional_optim._runtime.spec import PLAIN


if TYPE_CHECKING:
    from .optimizer import ChainOptimizer


class StepInputs(NamedTuple):
    """The tensors and numbers that a step of an optimizer reads.

    Args:
      templates: the chains of the groups.
      params: the parameters, or tensors that stand for them.
      grads: their gradients.
      states: their states.
      extra: the extra arguments.
      guarded: whether the step is taken only if `extra["found_inf"]` is 0.
    """

    templates: Sequence[Template]
    params: Sequence[torch.Tensor]
    grads: Sequence[torch.Tensor | None]
    states: list[dict[str, Any]]
    extra: dict[str, Any]
    guarded: bool = False

    @property
    def are_dense(self) -> bool:
        """Whether no gradient is sparse."""
        return all(map(_is_dense, self.grads))

    def guarded_by(self, grad_scale: Any, found_inf: Any) -> "StepInputs":
        """The inputs of a step on gradients that are divided by `grad_scale`, taken only if `found_inf` is 0."""
        extra = dict(self.extra)
        for name, x, default in (("grad_scale", grad_scale, 1.0), ("found_inf", found_inf, 0.0)):
            extra[name] = default if x is None else x.reshape(()) if isinstance(x, torch.Tensor) else x
        return self._replace(extra=extra, guarded=True)

    def turns(self) -> "list[StepInputs]":
        """The inputs of one step after another, in each of which no two parameters are the same memory."""
        turns: list[list[torch.Tensor | None]] = [list(self.grads)]
        known: Counter[tuple[Any, ...]] = Counter()
        for i, (p, g) in enumerate(zip(self.params, self.grads, strict=True)):
            if g is None or type(p) not in PLAIN:
                continue
            place = (p.data_ptr(), p.dtype, p.shape, p.stride())
            turn, known[place] = known[place], known[place] + 1
            if turn:
                turns[0][i] = None
                turns += [[None] * len(self.grads) for _ in range(turn + 1 - len(turns))]
                turns[turn][i] = g
        return [self._replace(grads=grads) for grads in turns]


def _is_dense(grad: torch.Tensor | None) -> bool:
    """Whether a gradient is not sparse; one that is not there is not."""
    return grad is None or grad.layout is torch.strided


def take_rows(opt: "ChainOptimizer", inputs: StepInputs) -> None:
    """Takes a step on gradients of which some are sparse, all or nothing.

    Rows are computed first, on copies, and written last, when the step on dense gradients has succeeded.
    """
    bindings, states, extra, journal = opt._bindings, inputs.states, inputs.extra, Journal()
    assert bindings.params is not None
    row_templates, dense, touched = _split(opt, inputs)
    others = [i for i, g in enumerate(dense) if g is not None]
    before, rows = bindings.new, None
    step: ParamStep | None = None
    try:
        if any(g is not None for g in touched):
            step = bindings.step_for(opt, row_templates, touched, guarded=inputs.guarded, exact=True, of_rows=True)
            columns = step.state.columns(states, True)
            if columns is None:
                step.state.make(bindings.params.tensors, states, opt.param_groups, journal, bindings.held)
                bindings.adopt(opt, bindings.params.tensors, touched, states, journal)
                columns = step.state.columns(states)
                assert columns is not None, "the state that was missing has been made"
            bindings.note(step)
            rows = RowStep(step, inputs.params, columns, touched, others, bindings.disjoint)
            bindings.disjoint = rows.disjoint
            rows.take(states, bindings.options, extra, journal)
        if others:
            opt._step_dense(inputs._replace(grads=dense))
        if rows is not None:
            rows.write(states)
        if inputs.guarded and journal and float(extra["found_inf"]):
            bindings.undo(journal, before)
    except BaseException:
        bindings.forget_step(step)
        bindings.undo(journal, bindings.new)
        raise


def _split(
    opt: "ChainOptimizer", inputs: StepInputs
) -> tuple[list[Template], list[torch.Tensor | None], list[torch.Tensor | None]]:
    """The chains of rows, the dense gradients, and the sparse ones whose rows alone are stepped.

    A gradient that is sparse is made dense if its chain moves all rows, or if autograd records.

    Raises:
      RuntimeError: the optimizer refuses sparse gradients.
    """
    bindings = opt._bindings
    assert bindings.params is not None
    # in place of the chains of the groups, where there are those of their rows
    row_templates, dense = list(inputs.templates), list(inputs.grads)
    touched: list[torch.Tensor | None] = [None] * len(dense)
    for i, g in enumerate(inputs.grads):
        if g is None or _is_dense(g):
            continue
        found = bindings.row_template_of(opt, opt.param_groups[bindings.params.groups[i]])
        if found is None or not g.is_sparse or torch.is_grad_enabled() or is_dtensor(bindings.params.tensors[i]):
            dense[i] = g.to_dense()
        else:
            row_templates[bindings.params.templates[i]] = found
            dense[i], touched[i] = None, g
    return row_templates, dense, touched
