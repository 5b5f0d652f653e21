"""Arguments of named chains: a name of another library is refused with the one here, and None where a number is due."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar


Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")
MISSING = inspect.Parameter.empty

# names of torch and other libraries for arguments, by ours
NAMES = {
    "lr": ("learning_rate",),
    "betas": ("b1", "b2"),
    "beta1": ("b1",),
    "beta2": ("b2",),
    "beta_1": ("b1",),
    "beta_2": ("b2",),
    "momentum": ("decay", "beta", "b1"),
    "alpha": ("decay",),
    "epsilon": ("eps",),
    "decay_rate": ("decay",),
}


def named_arguments(make: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """A factory of chains that refuses an unknown argument with the name that it has here, and None for a number.

    Raises:
      TypeError: an argument is unknown, or None although it has no default.
    """
    signature = inspect.signature(make)
    names = list(signature.parameters)
    needed = [name for name, parameter in signature.parameters.items() if parameter.default is MISSING]  # numbers

    @functools.wraps(make)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Made:
        for name in kwargs:
            if name not in names:
                meant = [x for x in NAMES.get(name, ()) if x in names] or difflib.get_close_matches(name, names, 1)
                hint = f", which is called {' and '.join(map(repr, meant))} here" if meant else ""
                raise TypeError(
                    f"{make.__name__}() got an unexpected keyword argument {name!r}{hint}; it takes {', '.join(names)}."
                )
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for name in needed:
            if given.get(name, MISSING) is None:
                raise TypeError(f"`{name}` of {make.__name__} must be a number, a 0-d tensor or a schedule, got None.")
        return make(*args, **kwargs)

    return checked
