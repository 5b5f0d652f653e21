"""Arguments of named chains: a name that is another library's is refused with the one that it has here."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar


Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")

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
    """A factory of chains that refuses an unknown argument with the name that it has here.

    Raises:
      TypeError: an argument is unknown.
    """
    signature = inspect.signature(make)
    names = list(signature.parameters)

    @functools.wraps(make)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Made:
        for name in kwargs:
            if name not in names:
                meant = [x for x in NAMES.get(name, ()) if x in names] or difflib.get_close_matches(name, names, 1)
                hint = f", which is called {' and '.join(map(repr, meant))} here" if meant else ""
                raise TypeError(
                    f"{make.__name__}() got an unexpected keyword argument {name!r}{hint}; it takes {', '.join(names)}."
                )
        return make(*args, **kwargs)

    return checked
