"""Steps that autograd records: kernels compute the step, and kernels of its derivative the cotangents.

The inputs of the step are saved, which it leaves alone: the derivative computes other values again, which moves
fewer bytes than saving them. The derivative is itself recorded, as torch operations, for whoever differentiates it.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch

from .._compiler.differentiate import NoDerivative
from .backend import KERNEL_BACKENDS, refuse_replacement
from .groups import Columns
from .internals import in_transformation, is_mapped_by_autograd, uncompiled
from .numbers import Numbers
from .recording import Recording, Tensors
from .step import BoundStep


def can_record(bound: BoundStep) -> bool:
    """Whether kernels compute a step and its derivative."""
    kernels = type(bound) is BoundStep and not bound.in_place and bound.joins is None
    return kernels and all(backend in KERNEL_BACKENDS for backend, _ in bound.parts)


def record(bound: BoundStep, columns: Columns, numbers: Numbers, plain: bool = True) -> Columns:
    """Computes a step that autograd records.

    Args:
      bound: the step.
      columns: the columns that its tensors are gathered from.
      numbers: the scalar table of each group.
      plain: whether no transformation of `torch.func` is active.

    Returns:
      The columns that change, complete.
    """
    step = Recording(bound, numbers)
    function = _Step if plain else _FollowedStep
    outputs = iter(function.apply(step, *bound.gather(columns), *step.tensors))  # type: ignore[no-untyped-call]
    nested = [[[next(outputs) for _ in group.leaves] for _ in group.outputs] for group in bound.groups]
    return bound.scatter(columns, nested)


def _follow_back(
    step: Recording, tensors: Tensors, cotangents: Sequence[torch.Tensor | None], wanted: Sequence[bool]
) -> list[torch.Tensor]:
    """The cotangents of wanted tensors by torch operations, which autograd records."""
    given = [(k, x) for k, x in enumerate(cotangents) if x is not None]
    outputs = step.evaluate_reference(tensors)
    chosen = [x for x, there in zip(tensors, wanted, strict=True) if there]
    reached = [(outputs[k], d) for k, d in given if outputs[k].requires_grad]
    if not reached:
        return [torch.zeros_like(x) for x in chosen]
    found = torch.autograd.grad(
        [x for x, _ in reached], chosen, [d for _, d in reached], create_graph=True, materialize_grads=True
    )
    return list(found)


def _pull_back_followed(
    step: Recording, tensors: Tensors, cotangents: Sequence[torch.Tensor | None], wanted: Sequence[bool]
) -> tuple[torch.Tensor, ...]:
    """The cotangents of wanted tensors by torch operations, which transformations follow."""

    def outputs(*chosen: torch.Tensor) -> list[torch.Tensor]:
        given = iter(chosen)
        found = step.evaluate_reference([next(given) if there else x for x, there in zip(tensors, wanted, strict=True)])
        return [x for x, d in zip(found, cotangents, strict=True) if d is not None]

    pull_back = torch.func.vjp(outputs, *[x for x, there in zip(tensors, wanted, strict=True) if there])[1]
    return tuple(pull_back([d for d in cotangents if d is not None]))


def _saved_by(ctx: Any) -> Tensors:
    """The tensors that a step was taken with.

    Raises:
      RuntimeError: one of them has been written in place since, with the leaves that it may be.
    """
    try:
        saved: Tensors = ctx.saved_tensors
    except RuntimeError as error:
        if not re.search("modified (by an )?inplace", str(error)):  # two wordings: a tensor, and a view of a buffer
            raise
        said = re.search(r"\[torch\.(?:cuda\.)?(\w+) \[([\d, ]*)\]\]", str(error))
        form = (said[1], tuple(int(n) for n in said[2].split(",") if n.strip())) if said else None
        names = ctx.step.tensor_names(form)
        shown = f"{'by its shape and dtype ' if form else ''}one of: {', '.join(names[:8])}"
        shown += ", ..." if len(names) > 8 else ""
        raise RuntimeError(
            f"a tensor that a step was given has been written in place, and the derivative of the step is still to be "
            f"computed from it. It is {shown}. Take steps with donate=False until `backward` is done, "
            f"write to a clone, or put a new tensor in its place. torch says: {str(error).split(' Hint:')[0]}"
        ) from error
    return saved


class _FollowedStep(torch.autograd.Function):
    """A step, of its tensors; one that `torch.func` follows."""

    @staticmethod
    def forward(step: Recording, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(step.compute(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.step, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[Any, ...]:
        return uncompiled(_back)(ctx, cotangents)


def _back(ctx: Any, cotangents: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    """The cotangents of the arguments of a step."""
    wanted = ctx.needs_input_grad[1:]
    present = tuple(d is not None for d in cotangents)
    given = [d for d in cotangents if d is not None]
    if not given:
        return (None, *[None] * len(wanted))
    saved = _saved_by(ctx)
    if any(map(is_mapped_by_autograd, given)):
        refuse_replacement(ctx.step.asked, "autograd (several cotangents at once)")
        # by `create_graph`: a derivative of the cotangents follows the saved tensors
        recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            tensors = [
                x.view_as(x) if recorded and x.requires_grad else x.detach().requires_grad_(there)
                for x, there in zip(saved, wanted, strict=True)
            ]
            results = iter(_follow_back(ctx.step, tensors, cotangents, wanted))
    else:  # without `create_graph` nobody differentiates the derivative
        derivative = _PullBack.apply if torch.is_grad_enabled() or in_transformation() else _PullBack.forward
        results = iter(derivative(ctx.step, present, wanted, *saved, *given))
    return (None, *[next(results) if there else None for there in wanted])


class _Step(_FollowedStep):
    """The same for autograd alone. Where `setup_context` is another function than torch's, each call looks up the
    signature of `forward`, which takes longer than a small step."""

    @staticmethod
    def forward(ctx: Any, step: Recording, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        output = _FollowedStep.forward(step, *tensors)
        _FollowedStep.setup_context(ctx, (step, *tensors), output)
        return output

    setup_context = torch.autograd.Function.setup_context


class _PullBack(torch.autograd.Function):
    """The cotangents of wanted tensors, of the tensors of a step and the cotangents of its outputs."""

    @staticmethod
    def forward(
        step: Recording, present: Sequence[bool], wanted: Sequence[bool], *arguments: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        tensors, cotangents = _arguments(present, arguments)
        try:
            return tuple(step.pull_back(tensors, cotangents, wanted))
        except NoDerivative as error:
            refuse_replacement(step.asked, f"autograd (kernels have no derivative of {error})")
            results = _pull_back_followed(step, tensors, cotangents, wanted)
            given = set(map(id, arguments))  # tensors that autograd saves, and takes for no result as they are
            return tuple([x.view_as(x) if id(x) in given else x for x in results])

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, step: Recording, present: Sequence[bool], wanted: Sequence[bool], *arguments: Any
    ) -> tuple[Any, int]:
        """Some cotangents at once, as `jacrev` has them: torch operations, which `vmap` maps."""
        refuse_replacement(step.asked, "autograd (several cotangents at once)")

        def one(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return _pull_back_followed(step, *_arguments(present, arguments), wanted)

        return torch.func.vmap(one, in_dims=tuple(in_dims[3:]))(*arguments), 0

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.step, ctx.present, ctx.wanted, *arguments = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[Any, ...]:
        refuse_replacement(ctx.step.asked, "autograd (the derivative of a derivative)")
        needed = ctx.needs_input_grad[3:]
        find = _second_followed if in_transformation() else _second
        found = iter(find(ctx, ctx.saved_tensors, cotangents, needed))
        return (None, None, None, *[next(found) if there else None for there in needed])


def _second(
    ctx: Any, saved: Tensors, cotangents: Sequence[torch.Tensor | None], needed: Sequence[bool]
) -> Sequence[torch.Tensor | None]:
    """The cotangents of needed arguments of a derivative by torch operations, which autograd records."""
    with torch.enable_grad():
        # aliases, for a tensor may follow from another one before the step
        arguments = [x.view_as(x) if x.is_floating_point() else x for x in saved]
        arguments = [
            x if x.requires_grad or not (there and x.is_floating_point()) else x.requires_grad_()
            for x, there in zip(arguments, _floats(ctx, arguments), strict=True)
        ]
        tensors, given = _arguments(ctx.present, arguments)
        outputs = _follow_back(ctx.step, tensors, given, ctx.wanted)
        chosen = [x for x, there in zip(arguments, needed, strict=True) if there]
        pairs = [(x, d) for x, d in zip(outputs, cotangents, strict=True) if d is not None and x.requires_grad]
        if not pairs or not chosen:
            return [None] * len(chosen)
        return torch.autograd.grad(
            [x for x, _ in pairs],
            chosen,
            [d for _, d in pairs],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )


def _second_followed(
    ctx: Any, saved: Tensors, cotangents: Sequence[torch.Tensor | None], needed: Sequence[bool]
) -> Sequence[torch.Tensor | None]:
    """The same where a transformation of `torch.func` follows, which no tensor within it may be marked for."""

    def outputs(*chosen: torch.Tensor) -> list[torch.Tensor]:
        given = iter(chosen)
        arguments = [next(given) if there else x for x, there in zip(saved, needed, strict=True)]
        found = _pull_back_followed(ctx.step, *_arguments(ctx.present, arguments), ctx.wanted)
        return [x for x, d in zip(found, cotangents, strict=True) if d is not None]

    pull_back = torch.func.vjp(outputs, *[x for x, there in zip(saved, needed, strict=True) if there])[1]
    return pull_back([d for d in cotangents if d is not None])  # type: ignore[no-any-return]


def _floats(ctx: Any, arguments: Tensors) -> Sequence[bool]:
    """The arguments of a derivative that its own derivative follows: wanted tensors."""
    return [*ctx.wanted, *[False] * (len(arguments) - len(ctx.wanted))]


def _arguments(present: Sequence[bool], arguments: Tensors) -> tuple[Tensors, list[torch.Tensor | None]]:
    """The tensors of a step and the cotangents of its outputs, of all arguments of its derivative."""
    n = len(arguments) - sum(present)
    given = iter(arguments[n:])
    return arguments[:n], [next(given) if there else None for there in present]
