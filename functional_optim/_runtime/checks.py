"""Refusals: tensors that no rule can work on, or that do not go with one another. Messages name the leaf's path."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import torch

from .._compiler.rule import hint_of_members, other_than_a_number
from .._compiler.slots import Slot
from .internals import innermost
from .spec import PLAIN, TensorSpec, lies_outside


KeyT = TypeVar("KeyT")


def at(path: str) -> str:
    """A leaf's path as part of a message."""
    return f" at {path!r}" if path else ""


def check_leaf(name: str, path: str, x: Any) -> torch.Tensor:
    """Refuses a leaf that no rule can work on.

    Raises:
      TypeError: the leaf is not a dense tensor of a floating dtype.
    """
    if not isinstance(x, torch.Tensor):
        hint = ""
        if isinstance(x, torch.nn.Module):
            raise TypeError(
                f"{name}{at(path)} is {type(x).__name__}, a module; pass `dict(module.named_parameters())`."
            )
        if isinstance(x, Iterator):
            hint = " or a tree of a known kind: a dict, such as `dict(module.named_parameters())`"
        elif isinstance(x, Iterable) and not isinstance(x, (str, bytes)):
            hint = " or a tree of a known kind: a dict, a list, a tuple, or a class registered with optree"
        raise TypeError(f"{name}{at(path)} is {type(x).__name__} {x!r:.80}, expected a tensor{hint}.")
    if x.layout is not torch.strided:
        hint = "pass `x.to_dense()`"
        if name == "updates":
            hint += (
                ", or a model that makes no sparse gradients (`nn.Embedding(..., sparse=False)`), or step with "
                "`SGD`, `Adagrad` or `SparseAdam` of functional_optim.adapters, which change only its rows"
            )
        raise TypeError(f"{name}{at(path)} is sparse ({x.layout}), expected a dense tensor; {hint}.")
    if not x.dtype.is_floating_point or x.dtype.itemsize < 2:
        hint = "leave it out of the tree"
        if name.startswith("state"):
            hint = "put a tensor of such a dtype there"
        elif x.is_complex():
            hint = f"view it as real pairs with `torch.view_as_real{'(x.resolve_conj())' if x.is_conj() else ''}`"
        elif name.startswith("the extra argument"):  # every leaf that is computed needs one
            hint = "pass `x.float()`"
        raise TypeError(
            f"{name}{at(path)} has dtype {x.dtype}, expected float32, float64, bfloat16 or float16; {hint}."
        )
    return x


def check_fit(name: str, other: str, path: str, x: Any, y: torch.Tensor) -> torch.Tensor:
    """Refuses a leaf that does not go with another one of the same path.

    Raises:
      TypeError: the leaf is not a dense tensor of a floating dtype.
      ValueError: the two differ in shape or device.
    """
    check_leaf(name, path, x)
    if x.shape != y.shape:
        raise ValueError(f"{name}{at(path)} has shape {tuple(x.shape)}, but its {other} has {tuple(y.shape)}.")
    if x.device != y.device:
        raise ValueError(f"{name}{at(path)} is on {x.device}, but its {other} is on {y.device}; move one of them.")
    return x  # type: ignore[no-any-return]


def refuse_freed(name: str, path: str, shape: Sequence[int]) -> NoReturn:
    """Refuses a tensor whose storage has been freed or cut, of a leaf of some shape."""
    raise ValueError(
        f"{name}{at(path)} of a leaf of shape {tuple(shape)} has no memory: its storage has been freed or cut; give it "
        f"its elements first, or leave the leaf out (a step skips one whose update is None)."
    )


def is_freed(x: torch.Tensor) -> bool:
    """Whether the storage of a tensor has been freed or cut, or of the one that wrappers of `torch.func` stand for."""
    x = innermost(x)
    if type(x) not in PLAIN or x.layout is not torch.strided:
        return False
    if x.is_contiguous() and x.storage_offset() * x.element_size() + x.nbytes <= x.untyped_storage().nbytes():
        return False  # no spec is needed for nearly all
    spec = TensorSpec.of(x)
    return spec.plain and lies_outside(x, spec)


def find_freed(columns: Mapping[KeyT, Sequence[Any]]) -> tuple[KeyT, int] | None:
    """The column and position of a tensor whose storage has been freed or cut, which operations of torch would read."""
    for key, column in columns.items():
        for i, x in enumerate(column):
            if isinstance(x, torch.Tensor) and is_freed(x):
                return key, i
    return None


def check_stored(name: str, path: str, x: torch.Tensor) -> None:
    """Refuses a tensor whose storage has been freed or cut, before torch operations read it, which do not look.

    Raises:
      ValueError: with the path.
    """
    if is_freed(x):
        refuse_freed(name, path, x.shape)


def refuse_meta(name: str) -> NoReturn:
    """Refuses a parameter on meta."""
    raise RuntimeError(
        f"{name} is on meta and has no memory; give it some, with `model.to_empty(device=...)` and initial values, "
        f"before the first step."
    )


def refuse_leaf(name: str, target: torch.Tensor) -> None:
    """Refuses to write to a leaf of autograd's graph while autograd records.

    Raises:
      RuntimeError: the target is a leaf that requires a gradient.
    """
    if target.is_leaf and target.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name!r} is a leaf Variable that requires grad, which a step that autograd records cannot write to; give "
            f"the optimizer the results of operations, such as `p.clone()`, or use differentiable=False."
        )


def check_kind(name: str, x: torch.Tensor, p: torch.Tensor) -> None:
    """Refuses a stored tensor that is complex where its parameter is real, or real where that is complex.

    Raises:
      ValueError: with the dtypes of both.
    """
    if x.is_complex() is not p.is_complex():
        raise ValueError(
            f"{name} has dtype {x.dtype}, but its parameter has {p.dtype}: both must be complex, or neither; remove "
            f"the state of a parameter that has been converted, so that it starts anew, or convert it, too."
        )


def check_slot(name: str, path: str, x: Any, u: torch.Tensor, slot: Slot) -> None:
    """Refuses a stored tensor that does not go with its leaf.

    Raises:
      TypeError, ValueError: with the slot's name, the path, and the expectation.
    """
    if slot.per_leaf and isinstance(x, torch.Tensor):
        if x.ndim:
            raise ValueError(f"{name}{at(path)} has shape {tuple(x.shape)}, expected one number.")
        u = u.new_empty(())
    if isinstance(x, torch.Tensor):
        check_kind(f"{name}{at(path)}", x, u)
    check_fit(name, "update", path, x, u)


def check_count(name: str, x: Any) -> None:
    """Refuses a counter that is not one integer.

    Raises:
      TypeError, ValueError: with the counter's name and value.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is {type(x).__name__} {x!r:.60}, expected a tensor that holds one integer.")
    check_memory(f"{name} is", x, x.device)
    narrow = x.itemsize < 4  # it would start again at 0, or below, after some steps
    if x.ndim or x.is_floating_point() or x.is_complex() or narrow:
        hint = f"; a state of {len(x)} members is stepped in a function that `torch.vmap` maps" if x.ndim == 1 else ""
        kind = "one integer of 32 or 64 bits" if narrow else "one integer"
        raise ValueError(f"{name} is {x.dtype} of shape {tuple(x.shape)}, expected {kind}{hint}.")


def as_number(subject: str, x: Any) -> float | torch.Tensor:
    """A value as a float, or the tensor that holds one number.

    Raises:
      ValueError: the object is neither; `subject` begins the message.
    """
    if isinstance(x, torch.Tensor):
        if other := other_than_a_number(x):
            raise ValueError(f"{subject} {other}, expected a number{hint_of_members(x)}.")
        return x
    try:
        return float(x if not isinstance(x, (str, bytes)) else None)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{subject} {x!r:.60}, expected a number.") from None


def schedule_value(name: str, x: Any) -> float | torch.Tensor:
    """The value that a schedule has returned, as `as_number`; True and False are no numbers.

    Raises:
      ValueError: with the name of the schedule.
    """
    subject = f"the schedule of {name} returned"
    if isinstance(x, bool):
        raise ValueError(f"{subject} {x}, expected a number.")
    check_memory(subject, x, getattr(x, "device", None))
    return as_number(subject, x)


def check_memory(subject: str, x: Any, device: torch.device | None) -> None:
    """Refuses a number on meta for leaves that are elsewhere, and one whose storage has been freed or cut.

    Args:
      subject: the beginning of the message.
      x: the number.
      device: the device of leaves; None if the host is to read it.

    Raises:
      ValueError: the number has no memory.
    """
    if not isinstance(x, torch.Tensor):
        return
    if x.is_meta and (device is None or device.type != "meta"):
        place = f"leaves are on {device}; move it to {device}" if device else "the host is to read it; move it to cpu"
        raise ValueError(f"{subject} a tensor on meta, which holds no number, but {place}.")
    if is_freed(x):
        raise ValueError(
            f"{subject} a tensor that holds no number: its storage has been freed or cut; give it memory and a number, "
            f"or pass another one."
        )
