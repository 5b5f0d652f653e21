"""The operations of a step: one that returns new tensors, one that writes in place, and the reference.

A compiler keeps the first two whole, as calls of the kernels of eager mode. It traces the third, so that the formulas
are part of its graph. What a derivative is asked of is computed by the third, too.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .._runtime.internals import below_autograd, has_tangent, in_transformation, may_have_tangents
from .descriptions import DescribedStep, find_step


Tensors = Sequence[torch.Tensor]

LIBRARY: Any = torch.library.Library("functional_optim", "FRAGMENT")  # type: ignore[no-untyped-call]
ARGUMENTS = "str description, Tensor[] updates, Tensor[] params, Tensor[] state, Tensor[] numbers"
IN_PLACE = "str description, Tensor[] updates, Tensor(a!)[] params, Tensor(b!)[] state, Tensor[] numbers"
LIBRARY.define(f"pure_step({ARGUMENTS}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(f"donated_step({IN_PLACE}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(f"traced_step({ARGUMENTS}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))


def _pure_step(text: str, updates: Tensors, params: Tensors, state: Tensors, numbers: Tensors) -> list[torch.Tensor]:
    """The step by kernels, in new tensors."""
    step = find_step(text)
    results, new = step.take(updates, params, state, numbers)
    likes = [*_likes(step, updates, params), *state]
    dtypes = [*_dtypes(step, updates, params), *(x.dtype for x in state)]
    results += new
    _check(step, results, likes, dtypes)
    given = (*updates, *params, *state, *numbers)
    own = _apart(results, given, step.may_return_views)
    return [_in_layout_of(like, x, dtype) for like, x, dtype in zip(likes, own, dtypes, strict=True)]


def _donated_step(text: str, updates: Tensors, params: Tensors, state: Tensors, numbers: Tensors) -> None:
    """The step by kernels, in place. The state of steps that run in Python is copied to where it was."""
    step = find_step(text)
    in_place = not step.runs_foreign_code
    results, new = step.take(updates, params, state, numbers, donate=in_place)
    if not new and not results:
        return
    pairs = list(zip(state, new, strict=True))
    if not in_place:  # all of it can be refused before anything is written
        likes = [*_likes(step, updates, params), *state]
        _check(step, [*results, *new], likes, [x.dtype for x in likes])
        pairs += zip(_likes(step, updates, params), results, strict=True)
    pairs = [(x, y) for x, y in pairs if x is not y]
    moved = _apart([y for _, y in pairs], [*state, *params], step.may_return_views)
    for (x, _), y in zip(pairs, moved, strict=True):
        x.copy_(y)


def _traced_step(text: str, updates: Tensors, params: Tensors, state: Tensors, numbers: Tensors) -> list[torch.Tensor]:
    """The step by operations of torch, which autograd, transformations and compilers follow."""
    step = find_step(text)
    results, new = step.take(updates, params, state, numbers, reference=True)
    results += new
    return _apart(results, (*updates, *params, *state, *numbers), False)


def _likes(step: DescribedStep, updates: Tensors, params: Tensors) -> list[torch.Tensor]:
    """The tensors that the computed results are like."""
    base = params if step.apply else updates
    return [base[k] for k in step.picked]


def _dtypes(step: DescribedStep, updates: Tensors, params: Tensors) -> list[torch.dtype]:
    """The dtypes of the computed results: those of parameters, or of updates if these are not narrower."""
    likes = _likes(step, updates, params)
    if step.apply or not params:
        return [x.dtype for x in likes]
    partners = [x if k is None else params[k] for x, k in zip(likes, step.partners, strict=True)]
    return [torch.promote_types(x.dtype, p.dtype) for x, p in zip(likes, partners, strict=True)]


def _check(step: DescribedStep, results: Tensors, likes: Tensors, dtypes: Sequence[torch.dtype]) -> None:
    """Refuses results that are not like what they replace.

    Raises:
      ValueError: a transformation returned another shape or dtype.
    """
    for x, like, dtype in zip(results, likes, dtypes, strict=True):
        fits = x.dtype == dtype or torch.promote_types(x.dtype, dtype) == dtype
        if x.shape != like.shape or not fits or x.device != like.device:
            raise ValueError(
                f"{step.tx!r:.100} made {x.dtype} of shape {tuple(x.shape)} on {x.device} of {dtype} of shape "
                f"{tuple(like.shape)} on {like.device}. A compiled step returns updates and a state of the shapes and "
                f"dtypes that it was given."
            )


def _apart(results: Tensors, given: Iterable[torch.Tensor], views: bool) -> list[torch.Tensor]:
    """Results that share memory neither with what was given nor with each other, as operations promise.

    Args:
      results: the results.
      given: the arguments.
      views: whether results may be views, as those of a caller's functions may be.
    """
    taken = {id(x) for x in given}
    memory = {x.untyped_storage().data_ptr() for x in given} if views else set()
    own = []
    for x in results:
        if id(x) in taken or (views and x.untyped_storage().data_ptr() in memory):
            x = x.clone()
        taken.add(id(x))
        if views:
            memory.add(x.untyped_storage().data_ptr())
        own.append(x)
    return own


def _in_layout_of(like: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A result in the layout and dtype that the fake implementation promises."""
    if x.stride() == like.stride() and x.dtype == dtype:
        return x
    promised = torch.empty_like(like, dtype=dtype, requires_grad=False)
    return x if promised.stride() == x.stride() and x.dtype == dtype else promised.copy_(x)


def _fake_step(text: str, updates: Tensors, params: Tensors, state: Tensors, numbers: Tensors) -> list[torch.Tensor]:
    """Tensors as the step returns them, without numbers."""
    step = find_step(text)
    likes = [*_likes(step, updates, params), *state]
    dtypes = [*_dtypes(step, updates, params), *(x.dtype for x in state)]
    return [torch.empty_like(x, dtype=dtype, requires_grad=False) for x, dtype in zip(likes, dtypes, strict=True)]


def _wants_derivative(*lists: Tensors) -> bool:
    """Whether autograd records, or a tangent is carried along."""
    tensors = list(itertools.chain(*lists))
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return True
    return may_have_tangents() and any(map(has_tangent, tensors))


def _pure_autograd(
    text: str, updates: Tensors, params: Tensors, state: Tensors, numbers: Tensors
) -> Sequence[torch.Tensor]:
    if _wants_derivative(updates, params, state, numbers):
        return _traced_step(text, updates, params, state, numbers)
    with below_autograd():
        return torch.ops.functional_optim.pure_step.default(  # type: ignore[no-any-return]
            text, updates, params, state, numbers
        )


INSIDE = (
    "donate=True writes in place, which a torch.func transformation cannot follow; use donate=False inside of it, or "
    "take the step outside."
)


def _donated_autograd(text: str, updates: Tensors, params: Tensors, state: Tensors, numbers: Tensors) -> None:
    if in_transformation():
        raise RuntimeError(INSIDE)
    if _wants_derivative(updates, params, state, numbers):
        raise RuntimeError(
            "a parameter, an update, a state or a hyper-parameter requires a gradient, and donate=True would write in "
            "place while autograd is recording; wrap the step in `torch.no_grad()`, or use donate=False to "
            "differentiate through it."
        )
    with below_autograd():
        torch.ops.functional_optim.donated_step.default(text, updates, params, state, numbers)


def _donated_vmap(*args: Any) -> None:
    raise RuntimeError(INSIDE)


LIBRARY.impl("pure_step", _pure_step, "CompositeExplicitAutograd")
LIBRARY.impl("donated_step", _donated_step, "CompositeExplicitAutograd")
LIBRARY.impl("traced_step", _traced_step, "CompositeImplicitAutograd")
LIBRARY.impl("pure_step", _pure_autograd, "Autograd")
LIBRARY.impl("donated_step", _donated_autograd, "Autograd")
torch.library.register_fake("functional_optim::pure_step", _fake_step, lib=LIBRARY)
torch.library.register_fake("functional_optim::donated_step", lambda *args: None, lib=LIBRARY)
# under `vmap` a step is the operations that it is traced as
LIBRARY.impl("pure_step", _traced_step, "FuncTorchBatched")
LIBRARY.impl("donated_step", _donated_vmap, "FuncTorchBatched")
