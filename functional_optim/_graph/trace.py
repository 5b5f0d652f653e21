"""Tracing a step: plain Python that a compiler follows, around one operation. Imported while a compiler runs."""

from collections.abc import Mapping
from typing import Any

import torch

from .._graph_breaks import outside
from .._packed import Packed
from .._runtime.backend import ASKED
from .._runtime.internals import in_transformation
from .._step import take_step
from .._structures import NOTHING, read, rebuild, with_aliases
from .._transform import GradientTransformation
from .._tree import Tree
from .descriptions import Outline, Trees, describe, reordered, with_forms
from .refusals import INSIDE, RECORDED


REASON = (
    "the trees of a compiled step are dicts, lists, tuples and NamedTuples of plain tensors and None, or packed; extra "
    "arguments are tensors or numbers, or such trees; a step with anything else, such as a number in a state, runs "
    "outside of the graph"
)
MADE_INSIDE = (
    "the chain is made inside of the compiled function; make it outside, and give numbers that change as extra "
    "arguments, 0-d tensors or schedules"
)
PACKED_ALIKE = "updates and parameters of `update` are packed alike in a compiled step; `apply_gradients` takes either"
INIT_OUTSIDE = (
    "`init` is called inside of the compiled function; call it once, outside, and pass the state to the function"
)
step_outside, with_chain_outside, unpacked_outside = outside(REASON), outside(MADE_INSIDE), outside(PACKED_ALIKE)
init_outside, misfit_outside = outside(INIT_OUTSIDE), outside("the trees of the step do not fit")
within_outside, recorded_outside = outside(INSIDE), outside(RECORDED)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def description_of(
    serial: str, apply: bool, updates: Any, params: Any, state: Any, extra: Any, backend: str | None
) -> tuple[str, str]:
    """The text of a step, and the reason why there is none; constants of the graph.

    An exception here would be one of the compiler, which asks the user to report it.
    """
    outlines = [None if x is None else Outline(with_forms(x[0]), x[1]) for x in (updates, params, state, extra)]
    try:
        return describe(serial, apply, Trees(*outlines), backend), ""  # type: ignore[arg-type]
    except ValueError as error:
        return "", str(error)


def trace_step(
    tx: GradientTransformation,
    apply: bool,
    updates: Tree,
    state: Any,
    params: Tree | None,
    extra: Mapping[str, Any],
    donate: bool,
) -> tuple[Tree, Any]:
    """Takes a step as an operation; see `run`.

    With the backend `"reference"` the operation is one that the compiler looks into.
    """
    given = (tx, apply, updates, state, params, extra, donate)
    if not hasattr(tx, "_serial"):
        return with_chain_outside(take_step, *given)
    numbers = {name: as_numbers(x) for name, x in extra.items()}
    u, s, e = read(updates), read(state), read(numbers)
    p = read(params) if params is not None else NOTHING
    # leaves of the updates that are None are None in the result
    absent_pass = params is not None and same(u.structure, p.structure)
    if not (apply or params is None or absent_pass) and (isinstance(updates, Packed) or isinstance(params, Packed)):
        return unpacked_outside(take_step, *given)
    if u.strange or p.strange or s.strange or e.strange or (apply and params is None):
        return step_outside(take_step, *given)
    backend = ASKED.names[-1] if ASKED.names else None
    text, misfit = description_of(
        tx._serial,
        apply,
        (u.structure, _there(u.leaves)),
        None if params is None else (p.structure, _there(p.leaves)),
        (s.structure, _there(s.leaves)),
        (e.structure, _there(e.leaves)),
        backend,
    )
    if misfit:
        # an exception here would make Dynamo look into steps of eager mode from then on
        torch._dynamo.graph_break(msg=misfit)
        return misfit_outside(take_step, *given)
    arguments = (_tensors(u.leaves), _tensors(p.leaves), _tensors(s.leaves), [*_tensors(e.leaves), *tx._tensors])
    records = torch.is_grad_enabled() and any(x.requires_grad for own in arguments for x in own)
    if donate and (records or is_transformed()):  # the operation would refuse it, too, in an error with its arguments
        refused_outside = within_outside if is_transformed() else recorded_outside
        return refused_outside(take_step, *given)
    if donate and backend != "reference":
        torch.ops.functional_optim.donated_step(text, *arguments)
        return params if apply else updates, state
    step = torch.ops.functional_optim.traced_step if backend == "reference" else torch.ops.functional_optim.pure_step
    results = iter(step(text, *arguments))
    base, other = (p, u) if apply else (u, p)
    leaves = [
        x if x is None or (absent_pass and y is None) else next(results)
        for x, y in zip(base.leaves, other.leaves if absent_pass else base.leaves, strict=True)
    ]
    if absent_pass and records:
        leaves = with_aliases(leaves, base.leaves)
    new_state = [x if x is None else next(results) for x in s.leaves]
    if donate:
        for x, y in zip([*base.leaves, *s.leaves], [*leaves, *new_state], strict=True):
            if x is not y and x.ndim:
                x.copy_(y)
            elif x is not y:  # before 2.14, torch loses a graph's write to a 0-d float64 tensor, but through a view
                x.view(1).copy_(y.view(1))
        return params if apply else updates, state
    if params is not None and not apply and not absent_pass:  # results have the containers of the parameters
        leaves = [leaves[k] for k in order_in(u.structure, p.structure, len(leaves))]
        base = p
    return rebuild(base.structure, leaves, base.forms), rebuild(s.structure, new_state, s.forms)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_transformed() -> bool:
    """Whether a step is inside of a `torch.func` transformation, a constant of the graph, which is guarded by it."""
    return in_transformation()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def same(a: Any, b: Any) -> bool:
    """Whether two structures are one, a constant of the graph."""
    return bool(a == b)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def order_in(old: Any, new: Any, n: int) -> tuple[int, ...]:
    """The positions in one structure of the `n` leaves of another one, a constant of the graph."""
    return tuple(reordered(range(n), old, new))


def as_numbers(x: Any) -> Any:
    """An extra argument with numbers as tensors.

    A number that a compiler takes for a variable stays one in the product with a tensor; `torch.tensor` of it would be
    a constant, and each value a graph of its own.
    """
    return torch.ones((), dtype=torch.float64) * x if isinstance(x, (int, float)) else x


def _there(leaves: list[Any]) -> tuple[bool, ...]:
    return tuple([x is not None for x in leaves])


def _tensors(leaves: list[Any]) -> list[Any]:
    return [x for x in leaves if x is not None]
