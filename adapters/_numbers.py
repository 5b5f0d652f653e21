"""Numbers among the arguments of torch's classes: one of another type is refused by its name."""

import functools
import inspect
import numbers
from collections.abc import Iterable, Mapping, Sized
from typing import Any, TypeVar

import torch

from functional_optim._compiler.arguments import plain_number
from functional_optim._compiler.rule import other_than_a_number
from functional_optim._runtime.checks import check_memory

from ._naming import FLAGS


Own = TypeVar("Own", bound=torch.optim.Optimizer)
PAIRS = ("betas", "etas", "step_sizes")


def check_number(name: str, value: Any) -> None:
    """Refuses an argument that is no number.

    Raises:
      TypeError: with its name and value.
      ValueError: it is a tensor without memory.
    """
    value = plain_number(value)
    if not isinstance(value, (numbers.Real, torch.Tensor)):
        raise TypeError(f"`{name}` is {type(value).__name__} {value!r:.60}, expected a number.")
    if isinstance(value, torch.Tensor) and (value.numel() != 1 or value.is_complex()):
        raise TypeError(f"`{name}` is {other_than_a_number(value)}, expected a number.")
    check_memory(f"`{name}` is", value, None)


def check_flags(values: Mapping[str, Any], place: str = "") -> None:
    """Refuses flags of torch's classes that are neither true nor false.

    torch takes their truth value, which is that of a number or of a tensor of one, but of any text.

    Args:
      values: options by name, others among them.
      place: their place, for the message.

    Raises:
      TypeError: with the name and the value.
    """
    for name in FLAGS:
        value = values.get(name)
        if value is None or value is True or value is False:
            continue
        value = plain_number(value)
        one = isinstance(value, torch.Tensor) and value.numel() == 1
        if not (one or isinstance(value, (bool, int, float))):
            raise TypeError(f"`{name}`{place} is {type(value).__name__} {value!r:.60}, expected True or False.")


def check_pairs(values: Mapping[str, Any], place: str = "") -> None:
    """Refuses options that hold more than two numbers where two are read, and tensors of another length than two.

    Of fewer numbers in a sequence whoever reads them tells.

    Args:
      values: options by name, others among them.
      place: their place, for the message.

    Raises:
      ValueError: with the name and the value.
    """
    for name in PAIRS:
        value = values.get(name)
        if isinstance(value, torch.Tensor):
            found = "" if value.shape == (2,) else f"is a tensor of shape {tuple(value.shape)}"
        else:
            n = len(value) if isinstance(value, Sized) and not isinstance(value, (str, Mapping)) else 0
            found = f"holds {n} numbers" if n > 2 else ""
        if found:  # without the value: a number may have no memory
            raise ValueError(f"{name!r}{place} {found}, expected two numbers.")


def _check_like(name: str, value: Any, default: Any) -> None:
    """Refuses an argument whose default is one number or some, if it is not.

    Raises:
      TypeError: with its name and value.
    """
    if isinstance(default, numbers.Real) and not isinstance(default, bool):
        check_number(name, value)
    elif isinstance(default, tuple):
        if not isinstance(value, (tuple, list)) or len(value) != len(default):
            many = "a pair of" if len(default) == 2 else len(default)
            raise TypeError(f"`{name}` is {value!r:.60}, expected {many} numbers.")
        for k, (x, own) in enumerate(zip(value, default, strict=True)):
            if x is not None or own is not None:
                check_number(f"{name}[{k}]", x)


def check_params(owner: str, params: Any) -> None:
    """Refuses parameters of an optimizer that cannot be listed.

    Raises:
      TypeError: with the value and the expectation.
    """
    if not isinstance(params, Iterable):
        raise TypeError(
            f"`params` of {owner} is {params!r:.60}, expected parameters, such as `model.parameters()`, pairs of a "
            f"name and a parameter, or parameter groups."
        )


def naming_numbers(cls: type[Own]) -> type[Own]:
    """A class whose constructor is that of torch's class, but for errors of arguments that are to be numbers.

    torch compares numbers with their bounds, and where that fails, Python's error has neither name nor value. From 2.14
    on `Adam` does not see that `betas` holds a third number. A class that has a constructor of its own, or none of
    torch's, is left as it is.
    """
    theirs = next((base for base in cls.__bases__ if base.__module__.startswith(torch.optim.__name__)), None)
    if theirs is None or "__init__" in vars(cls):
        return cls
    signature = inspect.signature(theirs)

    @functools.wraps(theirs.__init__)  # type: ignore[misc]
    def __init__(self: Own, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            given = {}  # an argument is unknown
        check_pairs(given)
        try:
            super(cls, self).__init__(*args, **kwargs)
        except (TypeError, NotImplementedError, LookupError):
            check_params(cls.__name__, given.get("params", ()))
            check_flags(given)
            for name, value in given.items():
                _check_like(name, value, signature.parameters[name].default)
            raise

    cls.__init__ = __init__  # type: ignore[assignment]
    return cls
