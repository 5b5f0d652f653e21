"""The scalar table of a group: a row of numbers per set of hyper-parameters, read anew at every step."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .._compiler.rule import Option
from .checks import check_number
from .plan import Group


Number = float | torch.Tensor


class _Lookup(NamedTuple):
    """Numbers that are looked up in options: where they go in the table, and whose options have them."""

    option: Option
    label: str
    places: slice | list[int]
    owners: list[int]


class Table:
    """The scalar table of a group, row after row.

    Args:
      group: the group.
    """

    def __init__(self, group: Group) -> None:
        self.width, self.n_rows = len(group.signature.program.scalars), len(group.sources)
        self.template: list[Any] = []  # numbers and tensors that stay the same objects
        self.extras: dict[str, list[int]] = {}
        lookups: dict[tuple[Option, str], list[tuple[int, int]]] = {}
        for row, (owner, first) in zip(group.sources, group.owners, strict=True):
            for source in row:
                place = len(self.template)
                self.template.append(source.value if source.kind == "value" else float(first))
                if source.kind == "extra":
                    self.extras.setdefault(source.name, []).append(place)
                elif source.kind == "option":
                    lookups.setdefault((source.value, source.name), []).append((place, owner))
        self.lookups = [
            _Lookup(option, label, self._places([place for place, _ in found]), [owner for _, owner in found])
            for (option, label), found in lookups.items()
        ]

    def _places(self, places: list[int]) -> slice | list[int]:
        """A column of the table as a slice."""
        column = slice(places[0], None, self.width)
        whole = places[0] < self.width and places == list(range(len(self.template)))[column]
        return column if whole else places

    def numbers(self, options: Sequence[Mapping[str, Any]], extra: Mapping[str, Any]) -> list[Number]:
        """The numbers of this step.

        Args:
          options: mappings that options are looked up in, by owner.
          extra: the extra arguments, all that are needed among them.

        Raises:
          KeyError: options lack a name.
          ValueError: something else than a number is found.
        """
        numbers = self.template.copy()
        for name, places in self.extras.items():
            x = check_number(f"the extra argument `{name}` is", extra[name])
            for k in places:
                numbers[k] = x
        for option, label, where, owners in self.lookups:
            values = _look_up(option, label, [options[owner] for owner in owners])
            if isinstance(where, slice):
                numbers[where] = values
            else:
                for k, value in zip(where, values, strict=True):
                    numbers[k] = value
        return numbers


def _look_up(option: Option, label: str, options: Sequence[Mapping[str, Any]]) -> list[Number]:
    """An option of each mapping; nearly always these are floats, and there may be hundreds."""
    try:
        values = [own[option.name] for own in options]
    except KeyError:
        lacking = next(own for own in options if option.name not in own)
        raise KeyError(
            f"the parameter group lacks {option.name!r}, which {label} is taken from; there are {sorted(lacking)}."
        ) from None
    if option.index is not None:
        values = [option.look_up({option.name: value}) for value in values]
    if set(map(type, values)) == {float}:
        return values
    return [_number(option, value) for value in values]


def _number(option: Option, x: Any) -> Number:
    if isinstance(x, torch.Tensor) and x.numel() == 1:
        return x.reshape(())
    return check_number(f"the option {option.name!r} is", x)
