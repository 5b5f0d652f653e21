"""Programs: those of some leaves, with the cells of columns that their tensors are in. A step is bound to them.

Torch operations compute them wherever torch works, which a step of kernels falls back to.
"""

import itertools
from collections.abc import Mapping, Sequence
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import torch

from .._compiler.call import Column
from .evaluate import evaluate
from .groups import Cell, Columns, Key, Leaf, group_leaves
from .join import Joins
from .numbers import Number, Numbers, Table
from .packing import PackedColumn
from .spec import TensorSpec


REQUIRES_GRAD = attrgetter("requires_grad")
Specs = Mapping[Key, Sequence[TensorSpec | None]]


class NoKernels(Exception):
    """Kernels do not compute a step as it was to be bound; torch operations, or a step of another kind, do."""


class Programs:
    """The programs of some leaves, which torch operations can compute wherever torch works.

    Args:
      leaves: the leaves that programs compute.
      specs: the specs of their tensors, by column.
      joins: the reductions over processes, if there are any.
      shared: columns in which all leaves on a device have one tensor.
    """

    def __init__(
        self, leaves: Sequence[Leaf], specs: Specs, joins: Joins | None = None, shared: Sequence[Key] = ()
    ) -> None:
        self.joins = joins
        # parameters that no program reads, but that updates are as wide as: positions and dtypes
        self.unread_params = [
            (leaf.position, p.dtype)
            for leaf in leaves
            if (p := specs["params"][leaf.position] if "params" in specs else None) is not None
            and "params" not in leaf.recipe.column_keys()
            and any(o.name == "updates" for o in leaf.recipe.program.outputs)
        ]
        self.groups = group_leaves(leaves, specs, shared)
        self.tables = [Table(group) for group in self.groups]
        self.gathers = [(gather.key, gather.pick) for group in self.groups for gather in group.gathers]
        ends = itertools.accumulate([gather.width for group in self.groups for gather in group.gathers], initial=0)
        bounds = itertools.pairwise(ends)
        # for each group and gather, the bounds of its tensors among all that are gathered
        self.bounds = [list(itertools.islice(bounds, len(group.gathers))) for group in self.groups]
        n = max(map(len, specs.values()), default=0)
        self.targets = [[_by_column(cells, n) for cells in group.targets] for group in self.groups]

    def fits_unread_params(self, columns: Columns) -> bool:
        """Whether parameters that no program reads have the dtypes that they had."""
        params = columns["params"]
        if isinstance(params, PackedColumn):  # without views
            dtypes = params.dtypes()
            return all(dtypes[i] is dtype for i, dtype in self.unread_params)
        return all(params[i].dtype is dtype for i, dtype in self.unread_params)

    def numbers(
        self,
        options: Sequence[Mapping[str, Any]],
        extra: Mapping[str, Any],
        given: Mapping[int, torch.Tensor] = MappingProxyType({}),
    ) -> list[list[Number]]:
        """The scalar table of each group; see `Table.fill`.

        Args:
          options: mappings that options are looked up in, by owner.
          extra: the extra arguments, all that are needed among them.
          given: tensors in the place of those that hyper-parameters have, by identity.
        """
        found = [table.fill(options, extra) for table in self.tables]
        if given:
            found = [[given.get(id(x), x) if isinstance(x, torch.Tensor) else x for x in numbers] for numbers in found]
        for table, numbers in zip(self.tables, found, strict=True):
            if table.tensors:
                table.check_memory(numbers)
        return found

    def gather(self, columns: Columns) -> list[Any]:
        """The tensors of all groups: for each group and gather, one per leaf, or one that leaves share."""
        tensors: list[Any] = []
        for key, pick in self.gathers:
            source: Any = columns if key is None else columns[key]
            tensors += source if pick is None else pick(source)
        return tensors

    def split(self, tensors: Sequence[Any]) -> list[list[Column]]:
        """Gathered tensors by group and gather, one per leaf."""
        return [
            [
                list(tensors[start:stop]) * (len(group.leaves) if gather.shared else 1)
                for gather, (start, stop) in zip(group.gathers, bounds, strict=True)
            ]
            for group, bounds in zip(self.groups, self.bounds, strict=True)
        ]

    def evaluate_reference(self, columns: Columns, numbers: Numbers) -> Columns:
        """New values by the reference, which autograd and transformations follow. Nothing is written.

        Returns:
          The columns that change, complete.
        """
        gathered = self.split(self.gather(columns))
        return self.scatter(columns, evaluate("reference", self.groups, gathered, numbers, self.joins))

    def scatter(self, columns: Columns, outputs: Sequence[Sequence[Sequence[Any]]]) -> Columns:
        """The columns that change, with the outputs of all groups in their cells."""
        results: dict[Key, list[Any]] = {}
        for targets, computed in zip(self.targets, outputs, strict=True):
            for by_column, values in zip(targets, computed, strict=True):
                for key, places in by_column.items():
                    if places is None:
                        results[key] = list(values)
                        continue
                    if key not in results:
                        results[key] = list(columns[key])
                    column = results[key]
                    for i, k in places:
                        column[i] = values[k]
        return dict(results)


def _by_column(cells: Sequence[Cell], n: int) -> dict[Key, list[tuple[int, int]] | None]:
    """The columns of `n` leaves that values go to, with the position of each there and among the values.

    It has None in the place of all positions in order, as nearly all chains have them.
    """
    found: dict[Key, list[tuple[int, int]]] = {}
    for k, (key, i) in enumerate(cells):
        found.setdefault(key, []).append((i, k))
    whole = [(k, k) for k in range(n)]
    return {key: None if places == whole else places for key, places in found.items()}
