"""Chains of torch's classes as pure transformations."""

from collections.abc import Mapping
from typing import Any

import torch

import functional_optim as fo
from functional_optim import _walk
from functional_optim._compiler.rule import Option

from ._named import NamedClass
from ._naming import FLAGS
from .adaptive import Adadelta, Adagrad, Adamax, NAdam, RAdam
from .classes import SGD, Adam, AdamW, RMSprop, check_no_bool
from .matrices import Adafactor, Muon
from .rates import ASGD, Rprop
from .sparse import SparseAdam


CLASSES: Mapping[str, type[NamedClass]] = {
    cls.__name__: cls
    for cls in (
        Adadelta,
        Adafactor,
        Adagrad,
        Adam,
        AdamW,
        Adamax,
        ASGD,
        Muon,
        NAdam,
        RAdam,
        RMSprop,
        Rprop,
        SGD,
        SparseAdam,
    )
}
# classes whose state starts at the learning rate, and the way to one that changes
KEEPS_RATE = {
    "ASGD": "use `functional_optim.asgd`, which takes a schedule",
    "Rprop": "its step sizes follow the signs of gradients from there",
}
IMPLEMENTATIONS = ("foreach", "fused", "capturable", "differentiable")


def from_torch_optimizer(name: str, **keywords: Any) -> fo.GradientTransformation:
    """The transformation that a class of torch.optim steps by, with torch's conventions, defaults and rounding.

    It is the chain of the class of this package of that name, with numbers in the place of the options of parameter
    groups. Named optimizers such as `functional_optim.adamw` have optax's conventions instead.

    A step of `SparseAdam` is that of gradients that touch every row.

    Args:
      name: the class of `torch.optim`.
      **keywords: its arguments by name, without `params` and the flags that choose an implementation. `lr` may be a
        schedule, but for the two that keep it in their state, `ASGD` and `Rprop`.

    Returns:
      The transformation.

    Raises:
      TypeError: a keyword is unknown, or a value of the wrong kind, such as a schedule where it has to be a number.
      ValueError: the name is unknown, a value out of its range, or the class no transformation of gradients alone
        (`LBFGS`, whose step evaluates a closure, and which is `functional_optim.lbfgs`).

    Example:
      >>> import functional_optim as fo, torch
      >>> tx = from_torch_optimizer("SGD", lr=0.5, momentum=0.9, dampening=0.5, maximize=True)
      >>> params = {"w": torch.ones(1)}
      >>> params, state = fo.apply_gradients(tx, params, {"w": torch.ones(1)}, tx.init(params))
      >>> params
      {'w': tensor([1.5000])}

    Source: torch.optim.
    """
    if name == "LBFGS":
        raise ValueError("a step of LBFGS evaluates a closure; use functional_optim.lbfgs, whose line search does.")
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"`name` of from_torch_optimizer is {name!r:.60}, expected one of {', '.join(CLASSES)}.")
    for given in ("params", *IMPLEMENTATIONS):
        if given in keywords:
            raise TypeError(
                f"{given!r} is an argument of an optimizer, and {name} is made as a transformation here, which has "
                f"none: leave it out."
            )
    _check_numbers(keywords)
    schedules = {k: x for k, x in keywords.items() if k == "lr" and callable(x) and not isinstance(x, torch.Tensor)}
    if schedules and name in KEEPS_RATE:
        raise TypeError(
            f"`lr` of from_torch_optimizer({name!r}, ...) is a schedule, but {name} keeps its rate in its state, which "
            f"starts with a number; {KEEPS_RATE[name]}."
        )
    optimizer = CLASSES[name](
        [torch.nn.Parameter(torch.zeros(1, 1))], **{k: x for k, x in keywords.items() if k not in schedules}
    )
    optimizer._check_options(0, optimizer.param_groups[0])
    # parameters left out, since their dtype would decide an epsilon of Adafactor
    group = {**optimizer.param_groups[0], "params": [], **schedules}
    template = optimizer._template(optimizer._switches(group))
    return _walk.rewrite(template.tx, lambda path, rule: rule.replace(**_numbers(rule._bound.values, group)))


def _check_numbers(keywords: Mapping[str, Any]) -> None:
    """Refuses bools in the place of numbers, which torch's classes compute with.

    Raises:
      TypeError: with the keyword and the value.
    """
    for name, value in keywords.items():
        if name not in FLAGS:
            for x in value if isinstance(value, (tuple, list)) else (value,):
                check_no_bool(name, x)


def _numbers(values: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of a rule that are options, as the numbers that a parameter group has for them."""
    return {k: x.look_up(group, k) for k, x in values.items() if isinstance(x, Option)}
