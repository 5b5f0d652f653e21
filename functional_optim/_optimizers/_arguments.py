"""Arguments of named chains: refused by the names that callers give them, or would know them by here."""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

from .._compiler.arguments import checked_switch
from .._compiler.rule import OptionalDtype


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
    """A factory of chains that refuses an unknown argument with the name that it has here, and other kinds of arguments.

    Raises:
      TypeError: an argument is unknown, None although it has no default, or no bool although it is a switch.
    """
    signature = inspect.signature(make)
    names = list(signature.parameters)
    dtypes = [name for name, parameter in signature.parameters.items() if parameter.annotation == OptionalDtype]
    switches = [name for name, parameter in signature.parameters.items() if parameter.annotation is bool]
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
        for name in filter(given.__contains__, switches):
            checked_switch(name, make.__name__, given[name])
        made = make(*args, **kwargs)
        for name in filter(given.__contains__, dtypes):  # dtypes that no rule has got, too
            if not isinstance(given[name], OptionalDtype):
                raise TypeError(
                    f"`{name}` of {make.__name__} must be a dtype of torch, such as torch.bfloat16, or None, "
                    f"got {given[name]!r:.60}."
                )
        return made

    return checked


def renaming(
    arguments: Mapping[str, str], owner: str = ""
) -> Callable[[Callable[Arguments, Made]], Callable[Arguments, Made]]:
    """Errors of a factory of chains begin with the name that its caller knows an argument by.

    Args:
      arguments: the argument, by the hyper-parameter that it becomes, such as `{"decay of trace": "momentum"}`, or by
        that of any rule, such as `{"learning_rate": "lr"}`.
      owner: the function that has these arguments; by default the factory.
    """
    subjects = {subject.partition(" of "): name for subject, name in arguments.items()}
    by_subject = {f"`{hyper}` of {rule}{rule and ' '}": name for (hyper, _, rule), name in subjects.items()}

    def decorate(make: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
        @functools.wraps(make)
        def renamed(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Made:
            try:
                return make(*args, **kwargs)
            except (TypeError, ValueError) as error:
                name = next((own for subject, own in by_subject.items() if str(error).startswith(subject)), None)
                if name is None or type(error) not in (TypeError, ValueError):
                    raise
                renamed_error = type(error)(f"`{name}` of {owner or make.__name__}: {error}")
                vars(renamed_error).update(vars(error))  # notes
                raise renamed_error from None

        return renamed

    return decorate
