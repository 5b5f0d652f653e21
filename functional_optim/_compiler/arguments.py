"""Arguments of public functions: numbers of other libraries, switches and functions, refused by name."""

import inspect
import numbers
from collections.abc import Callable
from typing import Any, cast

import torch


def plain_number(value: Any) -> Any:
    """A real number that is not of Python's own types, such as a scalar of NumPy or JAX, as one that is.

    Anything else is returned as it is.
    """
    if isinstance(value, torch.Tensor):
        return value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, (int, float)) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def checked_switch(name: str, owner: str, value: Any) -> bool:
    """A switch, which is True or False; a bool of NumPy as Python's.

    Args:
      name: the argument.
      owner: the function that takes it.
      value: its value.

    Raises:
      TypeError: it is something else, of which Python would take the truth value.
    """
    value = plain_number(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, torch.Tensor):
        raise tensor_refused(name, owner, "a switch")
    reason = ", and a function would always count as True" if callable(value) else ""
    raise TypeError(f"`{name}` of {owner} is a switch{reason}: pass True or False, got {value!r:.60}.")


def whole_number(name: str, owner: str, value: Any) -> int:
    """A number that Python counts with; one of NumPy as Python's.

    Args:
      name: the argument.
      owner: the function that takes it.
      value: its value.

    Raises:
      TypeError: it is something else, a float among them.
    """
    value = plain_number(value)
    if isinstance(value, torch.Tensor):
        raise tensor_refused(name, owner, "a count")
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` of {owner} must be a whole number, got {value!r:.60}.")
    return value


def tensor_refused(name: str, owner: str, kind: str) -> TypeError:
    """The error of an argument that Python reads, a switch or another one, that is a tensor."""
    return TypeError(
        f"`{name}` of {owner} is {kind}, which Python reads, so it must be no tensor: pass {name}.item(). It has no "
        f"derivative, and members of `torch.vmap` share it."
    )


def checked_function(name: str, owner: str, value: Any, expected: str) -> Callable[..., Any]:
    """An argument that is a function, as it was given.

    Args:
      name: the argument.
      owner: the function that takes it.
      value: its value.
      expected: its arguments and its result, for the message.

    Raises:
      TypeError: it cannot be called.
    """
    if not callable(value):
        raise TypeError(f"`{name}` of {owner} is {value!r:.60}, expected a function, {expected}.")
    return cast(Callable[..., Any], value)


def checked_schedule(subject: str, value: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is to be called as a schedule, as it was given.

    Args:
      subject: the argument that it is, for the message.
      value: the function.

    Raises:
      TypeError: it cannot be called with one argument.
    """
    try:
        signature = inspect.signature(value, follow_wrapped=False)  # its own, not that of a wrapped function
    except (TypeError, ValueError):  # a function of C that does not tell
        return value
    try:
        signature.bind(0)
    except TypeError as error:
        raise TypeError(
            f"{subject} is {value!r:.60}, expected a schedule, a function of the number of the step alone: {error}."
        ) from None
    return value
