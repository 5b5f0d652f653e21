"""Common parts of the classes under names of their own, whose chain is no argument."""

import math
from collections.abc import Hashable, Mapping
from typing import Any

import functional_optim as fo
from functional_optim._compiler.rule import Option, Range
from functional_optim._params.template import Template
from functional_optim._transforms.decay import decay_then_add, l2_penalty

from ._groups import copied
from ._naming import FLAGS, template
from ._numbers import check_flags, check_number, check_pairs, naming_numbers
from .optimizer import ChainOptimizer


LR, DECAY, EPS = Option("lr"), Option("weight_decay"), Option("eps")
B1, B2 = Option("betas", 0), Option("betas", 1)
MOMENTUM = Option("momentum")

# bounds of torch's constructors that are bounds of groups here, in their words: beyond them most steps come to NaN or
# infinity, without an error in torch; the other bounds of constructors are about defaults alone, as in torch
UNIT, POSITIVE, CLOSED = Range.parse("[0, 1)"), Range.parse("[0, inf)"), Range.parse("[0, 1]")
BOUNDS: Mapping[str, tuple[str, Range]] = {
    "betas": ("beta parameter at index {k}", UNIT),
    "eps": ("epsilon value", POSITIVE),
    "rho": ("rho value", CLOSED),
}


def nonzero(group: Mapping[str, Any], name: str) -> bool:
    """Whether an option is not 0.

    Raises:
      TypeError: it is no number.
    """
    value = group[name]
    if type(value) is not float:
        check_number(name, value)
    return bool(value != 0)


def before(maximize: bool, l2: bool) -> list[fo.GradientTransformation]:
    """Transformations of every gradient that torch begins with."""
    return [*([fo.scale(-1.0)] if maximize else []), *([l2_penalty(DECAY)] if l2 else [])]


class NamedClass(ChainOptimizer):
    """Classes under a name of their own, whose chain is no argument."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        naming_numbers(cls)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group; see `torch.optim.Optimizer.add_param_group`."""
        own = copied(param_group)
        if isinstance(own, dict):
            check_flags(own, f" of parameter group {len(self.param_groups)}")
            check_flags({k: x for k, x in self.defaults.items() if k not in own})
        super().add_param_group(own)

    def hyperparams(self) -> list[dict[str, Any]]:
        """The hyper-parameters of each parameter group by name, as the next step will have them.

        Returns:
          A dict for each group: its options, but for the flags that torch's classes have.

        Example:
          >>> import torch
          >>> from functional_optim.adapters import SGD
          >>> SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1).hyperparams()
          [{'lr': 0.1, 'momentum': 0, 'dampening': 0, 'weight_decay': 0}]
        """
        names = [name for name in self.defaults if name not in FLAGS]
        return [{name: group[name] for name in names if name in group} for group in self.param_groups]

    def _check_options(self, g: int, group: Mapping[str, Any]) -> None:
        super()._check_options(g, group)
        check_flags(group, f" of parameter group {g}")
        check_pairs({name: group.get(name) for name in self.defaults}, f" of parameter group {g}")
        for name in self.defaults:
            value = group.get(name)
            parts = value if isinstance(value, (tuple, list)) else (value,)
            label, allowed = BOUNDS.get(name, (name, None))
            for k, x in enumerate(parts):
                if isinstance(x, (float, int)) and (math.isnan(x) or (allowed is not None and x not in allowed)):
                    expected = "a number" if allowed is None else f"a number in {allowed.text}"
                    raise ValueError(f"Invalid {label.format(k=k)}: {x} in parameter group {g}, expected {expected}.")


class PlainClass(NamedClass):
    """Classes whose only switches are the direction and the decay, which is an L2 penalty or decoupled."""

    def _steps(self) -> list[fo.GradientTransformation]:
        """The part of the chain between the transformations of the gradient and decoupled decay."""
        raise TypeError(f"{type(self).__name__} has no chain.")

    def _switches(self, group: Mapping[str, Any]) -> tuple[Hashable, ...]:
        # decoupled decay by 0 is exact, so groups without decay share the others' kernel; an L2 penalty by 0 is not
        decoupled = bool(group.get("decoupled_weight_decay"))
        l2 = not decoupled and "weight_decay" in self.defaults and nonzero(group, "weight_decay")
        return bool(group["maximize"]), l2, decoupled, self._counter_dtype()

    def _template(self, switches: tuple[Any, ...]) -> Template:
        maximize, l2, decoupled, _ = switches
        last = [decay_then_add(LR, DECAY)] if decoupled else []
        return template(fo.chain(*before(maximize, l2), *self._steps(), *last), self.SLOTS)
