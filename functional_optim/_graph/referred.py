"""Tensors that rules refer to. A compiler that looks into a step cannot follow them: they are no arguments of it."""

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from .._compiler.errors import RuleError
from .._transform import GradientTransformation, parts


def referred_tensors(fn: Callable[..., Any]) -> list[str]:
    """The names of tensors that the code of a function refers to, and that of functions that it calls.

    Example:
      >>> factor = torch.tensor(2.0)
      >>> referred_tensors(lambda u: u * factor)
      ['factor']
    """
    found: dict[str, None] = {}
    functions: list[Any] = [fn]
    for one in functions:
        try:
            variables = inspect.getclosurevars(one)
        except (TypeError, ValueError):  # no Python function, or one with a variable that has no value yet
            continue
        for name, x in (*variables.nonlocals.items(), *variables.globals.items()):
            if isinstance(x, torch.Tensor):
                found[name] = None
            elif isinstance(x, FunctionType) and x not in functions:
                functions.append(x)
    return list(found)


def refuse_referred_tensors(tx: GradientTransformation) -> None:
    """Refuses a chain that a compiler could not trace, if its rules refer to tensors.

    Raises:
      RuleError: with the rule and the names of the tensors.
    """
    for part in parts(tx).values():
        bound = part._bound
        if bound is not None and (names := referred_tensors(bound.rule.fn)):
            shown = ", ".join(f"`{name}`" for name in names)
            raise RuleError(
                f"{bound.rule.name} refers to {shown}, a tensor that is no argument of the step, so a compiler that "
                f"looks into the step (for a derivative, or as `use_backend('reference')` asks for) cannot follow it. "
                f"Make it an argument: a 0-d tensor a hyper-parameter of the rule, `*, {names[0]}`, a tree of larger "
                f"ones an extra argument."
            )
