"""Groups: leaves that share a program, its dtypes and a device, and the columns that each of its arrays comes from."""

import functools
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from .._compiler.call import LeafTable
from .._compiler.fuse import Recipe, ScalarSource, extra_key
from .._compiler.passes import Signature
from .._compiler.program import Level
from .shard import MeshShard
from .spec import TensorSpec, compute_dtype, walk_together


# "params", "updates", "step", the name of a schedule, "updates@" and the position of a transformation that they enter;
# or a transformation's position and a slot; or the `extra_key` of an extra argument; or, in a derivative, the
# `cotangent` of another one
Key = str | tuple[int, str]
Columns = dict[Key, Sequence[Any]]  # a tensor per leaf in each, None where there is none
Cell = tuple[Key, int]  # a column, and the position of a leaf in it


class Leaf(NamedTuple):
    """A leaf as a program sees it.

    Args:
      position: its position in the tree.
      recipe: the program of the rules that see it.
      row: the key that leaves with the same numbers share: its kind, the options that it looks up and whether this is
        its first step.
      numel: number of elements, those of all parts if it is part of a tensor spread over processes.
      shard: the processes that have other parts of it, if there are any.
    """

    position: int
    recipe: Recipe
    row: tuple[Hashable, int, bool]
    numel: int
    shard: MeshShard | None


class Gather(NamedTuple):
    """The tensors of a group's leaves within the columns of the tree.

    Args:
      key: the column, if it is the same for all leaves.
      pick: takes them from the column, or from all columns if there is no `key`; None if they are the whole column.
      cells: each leaf's column and position.
      shared: whether all leaves have one tensor, which is taken once.
    """

    key: Key | None
    pick: Callable[[Any], Sequence[Any]] | None
    cells: tuple[Cell, ...]
    shared: bool

    @classmethod
    def of(cls, cells: Sequence[Cell], n_leaves: int, shared: Container[Key]) -> "Gather":
        """The gather of some cells of columns of `n_leaves` tensors; those in `shared` hold one tensor."""
        keys = {key for key, _ in cells}
        if len(keys) > 1:
            return cls(None, lambda columns: [columns[key][i] for key, i in cells], tuple(cells), False)
        positions, is_shared = [i for _, i in cells], cells[0][0] in shared
        if positions == list(range(n_leaves)) and not is_shared:
            return cls(cells[0][0], None, tuple(cells), False)
        # an itemgetter of one item returns no sequence
        one = len(positions) == 1 or is_shared
        pick = itemgetter(slice(positions[0], positions[0] + 1)) if one else itemgetter(*positions)
        return cls(cells[0][0], pick, tuple(cells), is_shared)

    @property
    def width(self) -> int:
        """Number of tensors."""
        return 1 if self.shared else len(self.cells)


class Group(NamedTuple):
    """Leaves that share a program, its dtypes and a device.

    Args:
      signature: the program and its dtypes.
      device: the device.
      leaves: positions of the leaves in the tree.
      gathers: the columns that the program reads or writes.
      updates: which of them are the updates, whose layout new tensors take.
      inputs: which of them each input is.
      outputs: which of them each output is written to; None for updates, which are always new tensors.
      targets: for each output, the cell of each leaf's result.
      table: the leaves' sizes and rows of the scalar table.
      sources: for each row, the scalar sources of its numbers.
      owners: for each row, the options that are looked up, and whether it is the first step.
      copied: positions within the group of leaves whose arrays a kernel cannot walk side by side.
      shard: the processes that have other parts of the leaves, if there are any.
    """

    signature: Signature
    device: torch.device
    leaves: tuple[int, ...]
    gathers: tuple[Gather, ...]
    updates: int
    inputs: tuple[int, ...]
    outputs: tuple[int | None, ...]
    targets: tuple[tuple[Cell, ...], ...]
    table: LeafTable
    sources: tuple[tuple[ScalarSource, ...], ...]
    owners: tuple[tuple[int, bool], ...]
    copied: tuple[int, ...]
    shard: MeshShard | None

    def name_of(self, gather: int) -> str:
        """The name of a column in messages: the first of the program's inputs or outputs that it is."""
        program = self.signature.program
        names = [*zip(self.inputs, (*program.arrays, *program.leaves), strict=True)]
        names += [(k, o.name) for k, o in zip(self.outputs, program.outputs, strict=True) if k is not None]
        name = next((name for k, name in names if k == gather), "updates")
        key = self.gathers[gather].cells[0][0]
        if key == extra_key(name):
            return f"the extra argument `{name}`"
        if "@" in name:  # kept for a rule that wraps others
            return "updates"
        return name if name in ("params", "updates") else f"state {name}"


class _Fit(NamedTuple):
    """The meaning of the specs of a leaf's tensors for its program.

    Args:
      signature: the program and its dtypes.
      device: the device.
      size: number of elements.
      copied: whether a kernel cannot walk the leaf's arrays side by side.
    """

    signature: Signature
    device: torch.device
    size: int
    copied: bool


def group_leaves(
    leaves: Sequence[Leaf], specs: Mapping[Key, Sequence[TensorSpec | None]], shared: Container[Key] = ()
) -> list[Group]:
    """Sorts leaves into groups.

    Args:
      leaves: the leaves that a program computes.
      specs: the spec of each tensor, by column.
      shared: columns in which all leaves on a device have one tensor.

    Returns:
      The groups, in the order of their first leaves.
    """
    fits: dict[Hashable, _Fit] = {}
    members: dict[tuple[Signature, torch.device, MeshShard | None], list[tuple[Leaf, _Fit]]] = {}
    with_params = ["params"] if "params" in specs else []
    keys = {id(leaf.recipe): [*with_params, *leaf.recipe.column_keys()] for leaf in leaves}
    for leaf in leaves:
        given = [(key, specs[key][leaf.position]) for key in keys[id(leaf.recipe)]]
        known = (id(leaf.recipe), *given)
        if known not in fits:
            fits[known] = _fit(leaf.recipe, dict(given))
        fit = fits[known]
        members.setdefault((fit.signature, fit.device, leaf.shard), []).append((leaf, fit))
    return [_group(some, len(specs["updates"]), shared) for some in members.values()]


def _fit(recipe: Recipe, specs: Mapping[Key, TensorSpec | None]) -> _Fit:
    """The fit of a program and the specs of a leaf's tensors."""
    program = recipe.program

    def spec(name: str) -> TensorSpec:
        found = specs[recipe.key_of(name)]
        assert found is not None
        return found

    u, p = spec("updates"), specs.get("params")
    ins = tuple(spec(name).dtype for name in (*program.arrays, *program.leaves))
    new = u.dtype if p is None else torch.promote_types(u.dtype, p.dtype)
    outs = tuple(new if o.name == "updates" else spec(o.name).dtype for o in program.outputs)
    # a tensor that is written in place counts too, whether or not the program reads it
    written = [o.name for o in program.outputs if o.level is Level.ELEMENT and o.name != "updates"]
    together = walk_together([u, *map(spec, (*program.arrays, *written))])
    # numbers per leaf are computed in float64 for elements of any dtype
    elements = [spec(name).dtype for name in program.arrays]
    elements += [dtype for o, dtype in zip(program.outputs, outs, strict=True) if o.level is Level.ELEMENT]
    return _Fit(Signature(program, ins, outs, compute_dtype(elements)), u.device, u.numel, not together)


def _group(members: Sequence[tuple[Leaf, _Fit]], n_leaves: int, shared: Container[Key]) -> Group:
    """The group of some leaves that fit alike."""
    (first, fit), leaves = members[0], [leaf for leaf, _ in members]
    program = fit.signature.program
    rows = {leaf.row: k for k, leaf in enumerate({leaf.row: leaf for leaf in leaves}.values())}
    sources = {leaf.row: leaf.recipe.scalars for leaf in leaves}
    gathers: dict[tuple[Cell, ...], int] = {}

    @functools.cache
    def position(name: str) -> int:
        """The position of a column among the gathers; one that is both read and written has one position."""
        cells = tuple((leaf.recipe.key_of(name), leaf.position) for leaf in leaves)
        return gathers.setdefault(cells, len(gathers))

    updates = position("updates")
    inputs = tuple(map(position, (*program.arrays, *program.leaves)))
    outputs = tuple(None if o.name == "updates" else position(o.name) for o in program.outputs)
    all_cells = tuple(gathers)
    return Group(
        fit.signature,
        fit.device,
        tuple(leaf.position for leaf in leaves),
        tuple(Gather.of(cells, n_leaves, shared) for cells in all_cells),
        updates,
        inputs,
        outputs,
        tuple(all_cells[updates if k is None else k] for k in outputs),
        LeafTable(
            tuple(each.size for _, each in members),
            tuple(leaf.numel for leaf in leaves),
            tuple(rows[leaf.row] for leaf in leaves),
        ),
        tuple(sources.values()),
        tuple((owner, is_first) for _, owner, is_first in rows),
        tuple(k for k, (_, each) in enumerate(members) if each.copied),
        first.shard,
    )
