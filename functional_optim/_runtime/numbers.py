"""The scalar table of a group: a row of numbers per set of hyper-parameters."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .._compiler.rule import Option
from .checks import as_number, check_memory
from .groups import Group


Number = float | torch.Tensor
Numbers = Sequence[Sequence[Number]]  # the scalar table of each group


class MemberNumbers(NamedTuple):
    """The numbers of all members of an ensemble on a device, in the place of the first one's in a scalar table.

    Args:
      tensor: a number for each member.
      distance: how many numbers further that of the next member stands.
    """

    tensor: torch.Tensor
    distance: int


class _Lookup(NamedTuple):
    """A number that is looked up in options: its position in the table, and whose options have it."""

    position: int
    owner: int
    option: Option
    label: str


class Table:
    """The scalar table of a group, row after row.

    Args:
      group: the group.
    """

    def __init__(self, group: Group) -> None:
        self.device = group.device
        self.tensors: dict[int, str] = {}  # positions of tensors in the template, and the beginnings of messages
        self.template: list[Any] = []  # numbers and tensors that stay the same objects, and those of the last options
        self.options: Sequence[Mapping[str, Any]] | None = None
        self.extras: dict[str, list[int]] = {}
        self.lookups: list[_Lookup] = []
        for row, (owner, first) in zip(group.sources, group.owners, strict=True):
            for source in row:
                position = len(self.template)
                self.template.append(source.value if source.kind == "value" else float(first))
                if source.kind == "value" and isinstance(source.value, torch.Tensor):
                    self.tensors[position] = f"the hyper-parameter {source.name} is"
                if source.kind == "extra":
                    self.extras.setdefault(source.name, []).append(position)
                elif source.kind == "option":
                    self.lookups.append(_Lookup(position, owner, source.value, source.name))

    def fill(self, options: Sequence[Mapping[str, Any]], extra: Mapping[str, Any]) -> list[Number]:
        """The scalar table of this step.

        Args:
          options: mappings that options are looked up in, by owner. They are looked up when this is another object
            than at the last step, so that a caller who knows that no option has changed gives the same one.
          extra: the extra arguments, all that are needed among them.

        Raises:
          KeyError: options lack a name.
          ValueError: something else than a number is found, or a tensor without memory.
        """
        if options is not self.options:
            self._look_up(options)
            self.options = options
        table = self.template.copy()
        for name, positions in self.extras.items():
            x = as_number(f"the extra argument `{name}` is", extra[name])
            if isinstance(x, torch.Tensor):
                check_memory(f"the extra argument `{name}` is", x, self.device)
            for k in positions:
                table[k] = x
        return table

    def check_memory(self, numbers: Sequence[Number]) -> None:
        """Refuses tensors of the template that have no memory.

        Args:
          numbers: the scalar table of this step.

        Raises:
          ValueError: with the name of the hyper-parameter.
        """
        for position, subject in self.tensors.items():
            check_memory(subject, numbers[position], self.device)

    def _look_up(self, options: Sequence[Mapping[str, Any]]) -> None:
        """Puts the numbers that options have into the template."""
        for position, owner, option, label in self.lookups:
            try:
                x = options[owner][option.name]
            except KeyError:
                raise option.missing(options[owner], label) from None
            try:
                if option.index is not None:
                    check_memory(f"{option.label} is in", x, self.device)
                    x = option.pick(x)
                self.template[position] = x if type(x) is float else _number(option, x, self.device)
                if isinstance(self.template[position], torch.Tensor):
                    self.tensors[position] = f"parameter group {owner}: {option.label} is"
                else:
                    self.tensors.pop(position, None)
            except ValueError as error:
                raise in_group(owner, error) from None


def number_of(option: Option, options: Sequence[Mapping[str, Any]], owner: int, label: str) -> Any:
    """The number that an option of a parameter group is, as it was given; a tensor of one element is 0-d.

    Args:
      option: the option.
      options: the options of each group.
      owner: the index of the group.
      label: the name of the hyper-parameter in messages.

    Raises:
      KeyError: there is no such option.
      ValueError: it is something else than a number.
    """
    try:
        whole = options[owner].get(option.name)
        check_memory(f"{option.label} is", whole, getattr(whole, "device", None))
        x = option.look_up(options[owner], label)
        if isinstance(x, torch.Tensor) and x.ndim and x.numel() == 1:
            x = x.reshape(())
        as_number(f"{option.label} is", x)
        check_memory(f"{option.label} is", x, getattr(x, "device", None))
    except ValueError as error:
        raise in_group(owner, error) from None
    return x


def in_group(owner: int, error: ValueError) -> ValueError:
    """The error of an option, with the parameter group that has it."""
    return ValueError(f"parameter group {owner}: {error}")


def _number(option: Option, x: Any, device: torch.device) -> Number:
    if isinstance(x, torch.Tensor) and x.numel() == 1:
        check_memory(f"{option.label} is", x, device)
        x = x.reshape(())
    return as_number(f"{option.label} is", x)
