"""Names: of options, of slots of state, and of parameters."""

import numbers
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch

import functional_optim as fo
from functional_optim import _walk
from functional_optim._chain import Chain
from functional_optim._compiler.arguments import plain_number
from functional_optim._compiler.rule import Bound, Option
from functional_optim._params.template import Template, prefixes_of
from functional_optim._reading import slot_names, unique
from functional_optim._transform import Path


# keys that schedulers and torch itself keep in a group
KNOWN = frozenset(
    {"params", "param_names", "initial_lr", "min_lr", "max_lr", "swa_lr", "base_momentum", "max_momentum"}
)
RESERVED = KNOWN | {"chain", "maximize", "fused", "differentiable", "foreach", "capturable"}
# flags of all classes: True, False or None
FLAGS = frozenset(
    {
        "amsgrad",
        "capturable",
        "centered",
        "decoupled_weight_decay",
        "differentiable",
        "foreach",
        "fused",
        "maximize",
        "nesterov",
    }
)
# names that torch's classes and optax have for hyper-parameters, by those of rules
SYNONYMS: Mapping[str, frozenset[tuple[str | None, str]]] = {  # by rule, or for any, and hyper-parameter
    "momentum": frozenset({("trace", "decay")}),
    "alpha": frozenset({("scale_by_rms", "decay"), ("scale_by_stddev", "decay")}),
    "betas": frozenset({(None, "b1"), (None, "b2")}),
    "learning_rate": frozenset({(None, "learning_rate")}),
}

ROUNDING = 1e-6  # a schedule of torch that ends at 0 may end as far below it, relative to the learning rate


def template(
    tx: fo.GradientTransformation, names: Mapping[str, str], prefixes: Mapping[Path, str] | None = None
) -> Template:
    """A transformation with a key for each slot of its state; `names` renames some slots."""
    keys = slot_names({path: rule._bound.rule for path, rule in _walk.rules(tx).items()}, names)
    return Template(tx, keys, prefixes_of(tx) if prefixes is None else prefixes)


class Naming:
    """The options of a chain.

    Every hyper-parameter that is not a schedule is one: `learning_rate` as `lr`, others by their own names. Where no
    rule has a `learning_rate`, a hyper-parameter called `lr` is the learning rate. A chain whose learning rate is a
    schedule, or that has none, or several, has an `lr` of 1.0 all the same, which multiplies its updates; so a
    scheduler works on every chain.

    Args:
      tx: the chain.
    """

    def __init__(self, tx: fo.GradientTransformation) -> None:
        rules = self.rules = _walk.rules(tx)
        rate = "learning_rate" if any("learning_rate" in rule._bound.values for rule in rules.values()) else "lr"
        rates = [
            path
            for path, rule in rules.items()
            if rate in rule._bound.values and (rate == "learning_rate" or _varies(rule._bound, rate))
        ]
        fixed = [path for path in rates if not rules[path]._bound.is_schedule(rate)]
        self.factor: Path | None = None  # the path of the factor; () is the end of the chain
        if len(rates) == 1 and not fixed:
            self.factor = rates[0]
        elif len(rates) != 1:
            self.factor = ()
        self.tx = tx
        hypers = [(path, hyper) for path, rule in rules.items() for hyper in rule._bound.values]
        schedules = [(path, hyper) for path, hyper in hypers if rules[path]._bound.is_schedule(hyper)]
        entries = [x for x in hypers if x not in schedules]
        lr = (rates[0], rate) if self.factor is None else None
        others = [x for x in entries if x != lr]
        names = dict(zip(others, self._names(others, RESERVED | {"lr"}, {"learning_rate": "lr"}), strict=True))
        self.scalars: dict[str, tuple[Path, str]] = {}
        self.switches: dict[str, tuple[Path, str]] = {}
        self.defaults: dict[str, Any] = {} if self.factor is None else {"lr": 1.0}
        for path, hyper in entries:
            name, bound = names.get((path, hyper), "lr"), rules[path]._bound
            value = bound.values[hyper]
            if hyper == "learning_rate" and value is None:
                value = 1.0
            if value is None or isinstance(value, torch.dtype):
                continue  # how state is stored is no option
            scalar = hyper not in bound.rule.static and is_number(value)
            (self.scalars if scalar else self.switches)[name] = (path, hyper)
            self.defaults[name] = value
        self.places = {**self.scalars, **self.switches}
        chosen = self._names(schedules, RESERVED | self.defaults.keys())
        self.schedules: dict[str, tuple[Path, str]] = dict(zip(chosen, schedules, strict=True))

    def _names(
        self, places: Sequence[tuple[Path, str]], taken: frozenset[str], renamed: Mapping[str, str] | None = None
    ) -> list[str]:
        """Names that differ for hyper-parameters of rules; see `unique`."""
        wanted = [(renamed or {}).get(hyper, hyper) for _, hyper in places]
        return unique(wanted, [(path, self.rules[path]._bound.rule.name) for path, _ in places], taken)

    def check(
        self, options: Mapping[str, Any], group: int | None = None, changed: Collection[str] | None = None
    ) -> None:
        """Refuses an option that is out of the range of its hyper-parameter, and a negative learning rate.

        A chain that is made with a negative learning rate may have others.

        Args:
          options: options by name; others may stand among them.
          group: the index of their parameter group, for messages, if it has one.
          changed: the options that have changed since all were in their ranges; by default any may have.

        Raises:
          ValueError, TypeError: an option is out of its range, or no number.
        """
        if changed is None or not self.switches.keys().isdisjoint(changed):  # a range may hold where a switch is on
            changed = self.places
        named = [(name, *self.places[name]) for name in changed if name in options and name in self.places]
        values = {path: dict(self.rules[path]._bound.values) for _, path, _ in named}
        for name, (path, hyper) in self.switches.items():
            if name in options and path in values:
                values[path][hyper] = options[name]
        name = "lr"
        try:
            if name in options:
                self._check_rate(plain_number(options[name]))
            for name, path, hyper in named:
                rule, value = self.rules[path]._bound.rule, plain_number(options[name])
                if name in self.switches and not isinstance(value, (Hashable, torch.Tensor)):
                    raise TypeError(
                        f"`{hyper}` of {rule.name} decides what is computed, so it must be a bool, a number or a "
                        f"string, got {value!r:.60}."
                    )
                if name in self.scalars and isinstance(value, torch.Tensor) and value.numel() == 1:
                    value = value.reshape(())  # a number of any shape, as torch's classes take it
                    if value.dtype is not torch.bool and not value.is_complex():
                        continue
                rule.check(hyper, value, values[path])
        except (ValueError, TypeError) as error:
            if group is None:
                raise
            raise type(error)(f"{name!r} of parameter group {group}: {error}") from None

    def _check_rate(self, lr: Any) -> None:
        usual: Any = self.defaults.get("lr")
        if self.factor is not None and not is_number(lr):
            raise TypeError(f"the learning rate `lr` must be a number, got {lr!r:.60}.")
        if any(isinstance(x, torch.Tensor) or not is_number(x) for x in (lr, usual)) or usual < 0:
            return
        if lr < -ROUNDING * usual:
            raise ValueError(
                f"the learning rate `lr` must be in [0, inf), got {lr!r:.60}; pass `maximize=True` to ascend."
            )

    def check_names(self, options: Iterable[str]) -> None:
        """Refuses a name that stands for a hyper-parameter of this chain, which is another option here."""
        for name in options:
            if name in self.defaults or name in RESERVED:
                continue
            known = SYNONYMS.get(name, frozenset())
            meant = [
                option
                for option, (path, hyper) in self.places.items()
                if hyper == name or {(self.rules[path]._bound.rule.name, hyper), (None, hyper)} & known
            ]
            if meant:
                raise ValueError(
                    f"{name!r} is no option of this chain and would do nothing; its parameter groups call it "
                    f"{' or '.join(map(repr, meant))}."
                )

    def template(self, switches: Sequence[Any], maximize: bool, names: Mapping[str, str]) -> Template:
        """The chain with options for numbers, and with these values of its switches."""
        values: dict[Path, dict[str, Any]] = {}
        for name, (path, hyper) in self.scalars.items():
            values.setdefault(path, {})[hyper] = Option(name)
        for (path, hyper), value in zip(self.switches.values(), switches, strict=True):
            values.setdefault(path, {})[hyper] = value
        tx = _walk.rewrite(self.tx, lambda path, rule: rule.replace(**values.get(path, {})))
        if self.factor == ():
            tx = _before_averages(tx, fo.scale(Option("lr")))
        elif self.factor is not None:
            factor = fo.scale(Option("lr"))
            tx = _walk.rewrite(tx, lambda path, rule: fo.chain(rule, factor) if path == self.factor else rule)
        # one path for each transformation under all switches: reductions of all groups meet by it
        return template(fo.chain(fo.scale(-1.0) if maximize else fo.identity(), tx), names, prefixes_of(tx, (1,)))


def is_number(x: Any) -> bool:
    """Whether an option is a number that a kernel can be given, as opposed to a switch."""
    if isinstance(x, torch.Tensor):
        return x.dtype is not torch.bool
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def _varies(bound: Bound, hyper: str) -> bool:
    """Whether a hyper-parameter is a number or a schedule."""
    return bound.is_scalar(hyper) or bound.is_schedule(hyper)


def _before_averages(tx: fo.GradientTransformation, last: fo.GradientTransformation) -> fo.GradientTransformation:
    """A chain with one more member, before those at its end that need updates as they are added to parameters."""
    members, names = (tx.members, tx.names) if isinstance(tx, Chain) else ((tx,), None)
    end = len(members)
    while end and any(rule._bound.rule.final for rule in _walk.rules(members[end - 1]).values()):
        end -= 1
    # the names of members are part of the names of their slots
    return Chain((*members[:end], last, *members[end:]), None if names is None else (*names[:end], "", *names[end:]))


def names_of(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the parameters of groups, for messages and masks."""
    names: list[str] = []
    for g, group in enumerate(groups):
        given = group.get("param_names")
        names += given or [f"param_groups[{g}].params[{k}]" for k in range(len(group["params"]))]
    if len(set(names)) < len(names):
        owners = [g for g, group in enumerate(groups) for _ in group["params"]]
        names = [f"param_groups[{g}].{name}" for g, name in zip(owners, names, strict=True)]
    return names
