"""Names: of options, of slots of state, and of parameters."""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

import functional_optim as fo
from functional_optim import leafwise
from functional_optim.leafwise import Option, Path, Template


RESERVED = frozenset({"params", "param_names", "chain", "maximize", "fused", "differentiable", "foreach", "capturable"})


def unique(names: Sequence[str], owners: Sequence[tuple[Path, str]], taken: frozenset[str]) -> list[str]:
    """Names that differ: a clash is qualified by the keys that lead to the owner, else by its name and a number.

    Args:
      names: the names wanted.
      owners: for each, the path and the name of the rule.
      taken: names that are not to be had.

    Returns:
      The names.
    """
    chosen: list[str] = []
    counts = Counter(names)
    for name, (path, rule) in zip(names, owners, strict=True):
        labels = "_".join(str(k) for k in path if isinstance(k, str))
        plain = [name] if counts[name] == 1 else []
        labelled = [f"{labels}_{name}"] if labels else []
        for candidate in (*plain, *labelled, *_numbered(f"{rule}_{name}")):
            if candidate not in taken and candidate not in chosen:
                chosen.append(candidate)
                break
    return chosen


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{k}" for k in range(2, 1000))


def outside() -> int:
    """The `stacklevel` of a warning that is about the line which called torch or this package."""
    files = (fo.__file__, torch.__file__, __file__)
    own = tuple(os.path.dirname(os.path.realpath(file or "")) for file in files)
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and os.path.realpath(frame.f_code.co_filename).startswith(own):
        level, frame = level + 1, frame.f_back
    return level


def template(tx: fo.GradientTransformation, names: Mapping[str, str]) -> Template:
    """A transformation with a key for each slot of its state; `names` says what some slots are called."""
    slots = [
        (path, slot, rule.bound.rule.name)
        for path, rule in leafwise.rules(tx).items()
        for slot in rule.bound.rule.slots
    ]
    keys = unique(
        [names.get(slot, slot) for _, slot, _ in slots], [(p, rule) for p, _, rule in slots], frozenset({"step"})
    )
    return Template(tx, {(path, slot): key for (path, slot, _), key in zip(slots, keys, strict=True)})


class Naming:
    """The options of a chain.

    Every hyper-parameter that is not a schedule is one: `learning_rate` as `lr`, others by their own names. A chain
    whose learning rate is a schedule, or that has none, or several, has an `lr` of 1.0 all the same, which multiplies
    its updates; so a scheduler works on every chain.

    Args:
      tx: the chain.
    """

    def __init__(self, tx: fo.GradientTransformation) -> None:
        rules = leafwise.rules(tx)
        rates = [path for path, rule in rules.items() if "learning_rate" in rule.bound.values]
        fixed = [path for path in rates if not rules[path].bound.is_schedule("learning_rate")]
        self.factor: Path | None = None  # where the factor goes; () is the end of the chain
        if len(rates) == 1 and not fixed:
            self.factor = rates[0]
        elif len(rates) != 1:
            self.factor = ()
        self.tx = tx
        entries = [
            (path, hyper, rule)
            for path, rule in rules.items()
            for hyper in rule.bound.values
            if not rule.bound.is_schedule(hyper)
        ]
        wanted = ["lr" if hyper == "learning_rate" else hyper for _, hyper, _ in entries]
        taken = RESERVED | ({"lr"} if self.factor is not None else frozenset())
        names = unique(wanted, [(path, rule.bound.rule.name) for path, _, rule in entries], taken)
        self.scalars: dict[str, tuple[Path, str]] = {}
        self.switches: dict[str, tuple[Path, str]] = {}
        self.defaults: dict[str, Any] = {} if self.factor is None else {"lr": 1.0}
        for name, (path, hyper, rule) in zip(names, entries, strict=True):
            value = rule.bound.values[hyper]
            if hyper == "learning_rate" and value is None:
                value = 1.0
            if value is None or isinstance(value, torch.dtype):
                continue  # how state is stored is no option
            scalar = (
                hyper not in rule.bound.rule.static
                and isinstance(value, (int, float, torch.Tensor))
                and not isinstance(value, bool)
            )
            (self.scalars if scalar else self.switches)[name] = (path, hyper)
            self.defaults[name] = value
        self.rules = rules

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuses an option that is out of the range of its hyper-parameter."""
        values = {path: dict(rule.bound.values) for path, rule in self.rules.items()}
        named = [(k, *place) for k, place in (*self.scalars.items(), *self.switches.items()) if k in options]
        for name, path, hyper in named:
            values[path][hyper] = options[name]
        for name, path, hyper in named:
            value = options[name]
            if not (isinstance(value, torch.Tensor) and value.numel() == 1):
                self.rules[path].bound.rule.check(hyper, value, values[path])

    def template(self, switches: Sequence[Any], maximize: bool, names: Mapping[str, str]) -> Template:
        """The chain with options for numbers, and with these values of its switches."""
        values: dict[Path, dict[str, Any]] = {}
        for name, (path, hyper) in self.scalars.items():
            values.setdefault(path, {})[hyper] = Option(name)
        for (path, hyper), value in zip(self.switches.values(), switches, strict=True):
            values.setdefault(path, {})[hyper] = value
        tx = leafwise.rewrite(self.tx, lambda path, rule: rule.replace(**values.get(path, {})))
        if self.factor == ():
            tx = _before_averages(tx, fo.scale(Option("lr")))
        elif self.factor is not None:
            factor = fo.scale(Option("lr"))
            tx = leafwise.rewrite(tx, lambda path, rule: fo.chain(rule, factor) if path == self.factor else rule)
        return template(fo.chain(fo.scale(-1.0), tx) if maximize else tx, names)


def _before_averages(tx: fo.GradientTransformation, last: fo.GradientTransformation) -> fo.GradientTransformation:
    """A chain with one more member, before those at its end that average the updated parameters."""
    members = leafwise.members(tx)
    end = len(members)
    while end and any(rule.bound.rule.name == "params_ema" for rule in leafwise.rules(members[end - 1]).values()):
        end -= 1
    return fo.chain(*members[:end], last, *members[end:])


def names_of(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """What messages and masks call the parameters of groups."""
    names: list[str] = []
    for g, group in enumerate(groups):
        given = group.get("param_names")
        names += given or [f"param_groups[{g}].params[{k}]" for k in range(len(group["params"]))]
    if len(set(names)) < len(names):
        owners = [g for g, group in enumerate(groups) for _ in group["params"]]
        names = [f"param_groups[{g}].{name}" for g, name in zip(owners, names, strict=True)]
    return names
