"""The operations of a step: one that returns new tensors, one that writes in place, and the reference.

A compiler keeps the first two whole, as calls of the kernels of eager mode. It traces the third, so that the formulas
are part of its graph. What a derivative is asked of is computed by the third, too.
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from .._runtime.checks import at
from .._runtime.internals import (
    MEMBERS_IN_GRAPHS,
    all_transformations,
    before_transformations,
    below_autograd,
    has_tangent,
    in_transformation,
    may_have_tangents,
    vmap_levels,
    wrap_members,
)
from .._runtime.overlap import SharedMemoryError
from .._runtime.spec import TensorSpec, are_ordinary
from .._runtime.stacks import Stack
from .._state_nodes import brief
from .descriptions import DescribedStep, find_step, path_of
from .referred import refuse_referred_tensors
from .refusals import INSIDE, RECORDED


Tensors = Sequence[torch.Tensor]
Promise = tuple[torch.Tensor, torch.dtype]  # a tensor whose shape, layout and device a result has, and its dtype

LIBRARY: Any = torch.library.Library("functional_optim", "FRAGMENT")  # type: ignore[no-untyped-call]
ARGUMENTS = "str description, Tensor[] updates, Tensor[] params, Tensor[] state, Tensor[] numbers"
IN_PLACE = "str description, Tensor[] updates, Tensor(a!)[] params, Tensor(b!)[] state, Tensor[] numbers"
LIBRARY.define(f"pure_step({ARGUMENTS}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(f"donated_step({IN_PLACE}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(f"traced_step({ARGUMENTS}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
OF_MEMBERS = ARGUMENTS.replace("description,", "description, int[] sizes, bool[] stacked,")
LIBRARY.define(f"mapped_step({OF_MEMBERS}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))


def _pure_step(text: str, updates: Tensors, params: Tensors, state: Tensors, numbers: Tensors) -> list[torch.Tensor]:
    """The step by kernels, in new tensors."""
    step = find_step(text)
    results, new = step.take(updates, params, state, numbers)
    results += new
    promised = _promised(step, updates, params, state)
    _check(step, results, promised)
    given = (*updates, *params, *state, *numbers)
    own = _apart(results, given, not step.of_rules)
    return [_in_layout_of(like, x, dtype) for x, (like, dtype) in zip(own, promised, strict=True)]


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
        _check(step, [*results, *new], [(x, x.dtype) for x in likes])
        pairs += zip(_likes(step, updates, params), results, strict=True)
    pairs = [(x, y) for x, y in pairs if x is not y]
    moved = _apart([y for _, y in pairs], [*state, *params], not step.of_rules)
    for (x, _), y in zip(pairs, moved, strict=True):
        x.copy_(y)


def _traced_step(text: str, updates: Tensors, params: Tensors, state: Tensors, numbers: Tensors) -> list[torch.Tensor]:
    """The step by operations of torch, which autograd, transformations and compilers follow.

    Where Python reads a number in the step, Dynamo breaks its graph at the operation, and would then compile the
    functions that this call of it calls, one by one.
    """
    if "torch._dynamo" in sys.modules:
        from .._graph_breaks import followed_outside  # an import of the compiler, which takes seconds

        return followed_outside(_step_by_torch, text, updates, params, state, numbers)
    return _step_by_torch(text, updates, params, state, numbers)


def _step_by_torch(
    text: str, updates: Tensors, params: Tensors, state: Tensors, numbers: Tensors
) -> list[torch.Tensor]:
    step, given = find_step(text), (*updates, *params, *state, *numbers)
    try:
        results, new = step.take(updates, params, state, numbers, reference=True)
    except (AssertionError, RuntimeError):
        # a compiler's message, if a tensor is the reason, names no rule; torch 2.11 says nothing of one here
        if torch.compiler.is_compiling() or not are_ordinary(updates, params, state, numbers):
            refuse_referred_tensors(step.tx)
        raise
    results += new
    return _apart(results, given, False)


def _likes(step: DescribedStep, updates: Tensors, params: Tensors) -> list[torch.Tensor]:
    """The tensors that the computed results are like."""
    base = params if step.apply else updates
    return [base[k] for k in step.picked]


def _promised(step: DescribedStep, updates: Tensors, params: Tensors, state: Tensors) -> list[Promise]:
    """The form of each result of a step; updates have the dtype of parameters if these are wider."""
    pairs = zip(_likes(step, updates, params), step.partners, strict=True)
    computed = [(x, x.dtype if k is None else torch.promote_types(x.dtype, params[k].dtype)) for x, k in pairs]
    return [*computed, *((x, x.dtype) for x in state)]


def _check(step: DescribedStep, results: Tensors, promised: Sequence[Promise]) -> None:
    """Refuses results that are not like what they replace.

    Raises:
      ValueError: a transformation returned another shape or dtype.
    """
    for x, (like, dtype) in zip(results, promised, strict=True):
        fits = x.dtype == dtype or torch.promote_types(x.dtype, dtype) == dtype
        if x.shape != like.shape or not fits or x.device != like.device:
            raise ValueError(
                f"{brief(step.tx)} made {x.dtype} of shape {tuple(x.shape)} on {x.device} of {dtype} of shape "
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


def _like_step(text: str, updates: Tensors, params: Tensors, state: Tensors, numbers: Tensors) -> list[torch.Tensor]:
    """Tensors as the step returns them, without numbers."""
    step = find_step(text)
    promised = _promised(step, updates, params, state)
    return [torch.empty_like(x, dtype=dtype, requires_grad=False) for x, dtype in promised]


# A fake implementation is also called where a tensor of a step is on meta, with all of its tensors: such a step is
# computed, or refused, as in eager mode.


def _fake_step(text: str, *lists: Tensors) -> list[torch.Tensor]:
    """The fake implementation of `pure_step`."""
    return _pure_step(text, *lists) if are_ordinary(*lists) else _like_step(text, *lists)


def _fake_donated_step(text: str, *lists: Tensors) -> None:
    """The fake implementation of `donated_step`.

    Raises:
      ValueError: a tensor that would be written is an expanded one, with the path of its leaf.
    """
    if are_ordinary(*lists):
        _donated_step(text, *lists)
        return
    step, (_, params, state, _) = find_step(text), lists
    for name, outline, tensors in (("params", step.trees.params, params), ("state", step.trees.state, state)):
        for k, x in enumerate(tensors):
            if 0 in x.stride() and TensorSpec.of(x).repeats:  # compilers refuse to write to it, without its name
                assert outline is not None
                label = f"{name}{at(path_of(outline, k))}"
                raise SharedMemoryError(label, label).for_donation()


def _wants_derivative(*lists: Tensors) -> bool:
    """Whether autograd records, or a tangent is carried along."""
    tensors = list(itertools.chain(*lists))
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return True
    return may_have_tangents() and any(map(has_tangent, tensors))


def _pure_autograd(
    text: str, updates: Tensors, params: Tensors, state: Tensors, numbers: Tensors
) -> Sequence[torch.Tensor]:
    """The step where autograd may record it: by the reference if it does."""
    if _wants_derivative(updates, params, state, numbers):
        return _traced_step(text, updates, params, state, numbers)
    with below_autograd():
        return torch.ops.functional_optim.pure_step.default(  # type: ignore[no-any-return]
            text, updates, params, state, numbers
        )


def _donated_autograd(text: str, updates: Tensors, params: Tensors, state: Tensors, numbers: Tensors) -> None:
    """The step in place, which is refused where autograd or a transformation follows it."""
    if in_transformation():
        raise RuntimeError(INSIDE)
    if _wants_derivative(updates, params, state, numbers):
        raise RuntimeError(RECORDED)
    with below_autograd():
        torch.ops.functional_optim.donated_step.default(text, updates, params, state, numbers)


def _donated_vmap(*args: Any) -> None:
    raise RuntimeError(INSIDE)


class Members(NamedTuple):
    """The levels of `vmap` that a step is mapped by.

    Args:
      step: the step.
      sizes: the number of members at each level, outermost first.
      lengths: the numbers of tensors of the updates, the parameters, the state, and of numbers.
      stacked: for each level, whether each of these tensors has a dimension of members; they come first.
      counters: the positions of counters among the tensors of the state.
    """

    step: DescribedStep
    sizes: tuple[int, ...]
    lengths: tuple[int, ...]
    stacked: tuple[tuple[bool, ...], ...]
    counters: frozenset[int]

    @classmethod
    def of(cls, text: str, sizes: Sequence[int], stacked: Sequence[bool], lists: Sequence[Tensors]) -> "Members":
        """The mapping that the arguments of the operation describe."""
        n = sum(map(len, lists))
        rows = tuple(tuple(stacked[k * n : (k + 1) * n]) for k in range(len(sizes)))
        counters = frozenset(k for k, x in enumerate(lists[2]) if not x.is_floating_point())  # slots of rules are not
        return cls(find_step(text), tuple(sizes), tuple(map(len, lists)), rows, counters)

    @property
    def results(self) -> tuple[tuple[bool, ...], ...]:
        """For each level, whether each result is stacked: all are but counters that members share."""
        first, n_state = sum(self.lengths[:2]), self.lengths[2]
        return tuple(
            (
                *[True] * len(self.step.picked),
                *[own[first + k] or k not in self.counters for k in range(n_state)],
            )
            for own in self.stacked
        )

    def split(self, tensors: Tensors) -> list[Tensors]:
        """The tensors of the updates, the parameters, the state, and numbers."""
        ends = itertools.accumulate(self.lengths, initial=0)
        return [tensors[start:stop] for start, stop in itertools.pairwise(ends)]

    def __call__(self, compute: Callable[..., Tensors], tensors: Tensors) -> list[torch.Tensor]:
        """The results of a function of the step's tensors, for all members."""

        def one(*own: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(compute(*self.split(own)))

        mapped: Callable[..., Any] = one
        for given, made in reversed(list(zip(self.stacked, self.results, strict=True))):
            in_dims, out_dims = (tuple(0 if own else None for own in flags) for flags in (given, made))
            mapped = torch.vmap(mapped, in_dims, out_dims)  # type: ignore[arg-type]
        return list(mapped(*tensors))


def _pure_of_members(
    text: str, updates: Tensors, params: Tensors, state: Tensors, numbers: Tensors
) -> Sequence[torch.Tensor]:
    """The step under `vmap`: one operation for all members, or operations of torch where something else follows."""
    levels = vmap_levels()
    if not levels or not find_step(text).of_rules or not MEMBERS_IN_GRAPHS:
        return _traced_step(text, updates, params, state, numbers)
    lists = (updates, params, state, numbers)
    stacks = [Stack.of(x, levels) for x in itertools.chain(*lists)]
    rows = list(zip(*[stack.stacked for stack in stacks], strict=True))
    used = [(level, row) for level, row in zip(levels, rows, strict=True) if any(row)]
    sizes, stacked = [level.size for level, _ in used], [own for _, row in used for own in row]
    members = Members.of(text, sizes, stacked, lists)
    with before_transformations():
        whole = torch.ops.functional_optim.mapped_step(
            text, sizes, stacked, *members.split([stack.tensor for stack in stacks])
        )
    results = list(whole)
    for (level, _), made in zip(used, members.results, strict=True):
        results = [wrap_members([x], level.level)[0] if own else x for x, own in zip(results, made, strict=True)]
    return results


def _mapped_step(text: str, sizes: Sequence[int], stacked: Sequence[bool], *lists: Tensors) -> list[torch.Tensor]:
    """The step of all members by kernels, in new tensors."""
    members, given = Members.of(text, sizes, stacked, lists), list(itertools.chain(*lists))

    def compute(updates: Tensors, params: Tensors, state: Tensors, numbers: Tensors) -> Tensors:
        results, new = members.step.take(updates, params, state, numbers)
        return [*results, *new]

    with all_transformations():
        results = members(compute, given)
    return [x.contiguous() for x in _apart(results, given, True)]


def _mapped_traced(text: str, sizes: Sequence[int], stacked: Sequence[bool], *lists: Tensors) -> list[torch.Tensor]:
    """The same by operations of torch."""
    members = Members.of(text, sizes, stacked, lists)
    return members(partial(_traced_step, text), list(itertools.chain(*lists)))


def _mapped_fake(text: str, sizes: Sequence[int], stacked: Sequence[bool], *lists: Tensors) -> list[torch.Tensor]:
    """Tensors as the step of all members returns them, without numbers."""
    if are_ordinary(*lists):
        return _mapped_step(text, sizes, stacked, *lists)
    members, one = Members.of(text, sizes, stacked, lists), list(itertools.chain(*lists))
    for own in members.stacked:
        one = [x[0] if flag else x for x, flag in zip(one, own, strict=True)]
    results = []
    for k, x in enumerate(_like_step(text, *members.split(one))):
        outer = [size for size, made in zip(sizes, members.results, strict=True) if made[k]]
        results.append(x.new_empty((*outer, *x.shape)))
    return results


def _mapped_autograd(text: str, sizes: Sequence[int], stacked: Sequence[bool], *lists: Tensors) -> Any:
    if _wants_derivative(*lists):
        return _mapped_traced(text, sizes, stacked, *lists)
    with below_autograd():
        return torch.ops.functional_optim.mapped_step.default(text, sizes, stacked, *lists)


def _with_lists(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel for arguments among which None stands for an empty list, as in calls of code by AOTInductor."""
    return lambda text, *lists: kernel(text, *[() if x is None else x for x in lists])


LIBRARY.impl("pure_step", _with_lists(_pure_step), "CompositeExplicitAutograd")
LIBRARY.impl("donated_step", _with_lists(_donated_step), "CompositeExplicitAutograd")
LIBRARY.impl("traced_step", _traced_step, "CompositeImplicitAutograd")
LIBRARY.impl("pure_step", _with_lists(_pure_autograd), "Autograd")
LIBRARY.impl("donated_step", _with_lists(_donated_autograd), "Autograd")
torch.library.register_fake("functional_optim::pure_step", _fake_step, lib=LIBRARY)
torch.library.register_fake("functional_optim::donated_step", _fake_donated_step, lib=LIBRARY)
LIBRARY.impl("pure_step", _pure_of_members, "FuncTorchBatched")
LIBRARY.impl("donated_step", _donated_vmap, "FuncTorchBatched")
LIBRARY.impl("traced_step", _traced_step, "FuncTorchBatched")  # `vmap` decomposes no operation of lists
LIBRARY.impl("mapped_step", _mapped_step, "CompositeExplicitAutograd")
LIBRARY.impl("mapped_step", _mapped_autograd, "Autograd")
LIBRARY.impl("mapped_step", _mapped_traced, "FuncTorchBatched")
torch.library.register_fake("functional_optim::mapped_step", _mapped_fake, lib=LIBRARY)
