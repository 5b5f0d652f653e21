"""`TreeLeaves`: the leaves of trees of one structure, and checks of such trees."""

from collections.abc import Sequence
from typing import Any

import torch

from ._runtime.backend import KERNEL_BACKENDS, REPLACED, REQUESTED, check_backend
from ._runtime.checks import at, check_fit, check_leaf
from ._runtime.groups import Columns, Leaf
from ._tree import Reader, Tree, View, difference, flatten, paths, refuse_packed_inside


class TreeLeaves:
    """The leaves of trees of one structure, in which the same leaves are there.

    Args:
      updates: the updates.
      params: the parameters, if there are any.

    Attributes:
      with_params: whether there are parameters.
      spec: the structure of the trees.
      reader: their reader.
      paths: the path of each leaf.
      present: the leaves of which there is an update and a parameter.
      absent: the others.
      devices: the devices of the updates.

    Raises:
      ValueError, TypeError: the trees do not fit each other.
    """

    def __init__(self, updates: Tree, params: Tree | None) -> None:
        self.with_params = params is not None
        self.spec = flatten(updates if params is None else params)[1]
        self.reader, self.paths = Reader(self.spec), paths(self.spec)
        if params is not None and self.paths == [""]:  # a leaf would take the whole tree of updates for its own
            check_leaf("params", "", params)
        columns: Columns = {"updates": self.read_as("updates", updates)}
        if params is not None:
            columns["params"] = self.read_as("params", params)
        self.present = present_in(columns)
        self.absent = tuple(sorted({*range(len(self.paths))} - {*self.present}))
        self.check_leaves(columns)
        self.devices = {columns["updates"][i].device for i in self.present}

    def view_of(self, leaves: Sequence[Any]) -> View:
        """The tree of some leaves, as masks are asked about it."""
        return View(self.spec, tuple(leaves), tuple(x is not None for x in leaves))

    def read_as(self, name: str, tree: Tree) -> Sequence[Any]:
        """The leaves of a tree, which messages call by a name.

        Raises:
          ValueError: the tree has another structure.
        """
        refuse_packed_inside(name, tree)
        try:
            return self.reader(tree)
        except (ValueError, TypeError):
            raise ValueError(f"{name} does not have the structure of params: {difference(self.spec, tree)}.") from None

    def check_leaves(self, columns: Columns) -> None:
        """Refuses leaves that no rule can work on, or that do not fit each other.

        Raises:
          ValueError, TypeError: with the path of the leaf.
        """
        for i in self.present:
            u = check_leaf("updates", self.paths[i], columns["updates"][i])
            if "params" in columns:
                check_fit(
                    "updates", "parameter", self.paths[i], u, check_leaf("params", self.paths[i], columns["params"][i])
                )

    def has_containers(self, columns: Columns) -> bool:
        """Whether there is a container in the place of a leaf, so that a tree has another structure."""
        trees = [columns[name] for name in ("updates", "params") if name in columns]
        return any(not isinstance(tree[i], torch.Tensor) for tree in trees for i in self.present)

    def has_its_leaves(self, own: Columns) -> bool:
        """Whether the leaves are there that were there before."""
        return present_in(own) == self.present and not self.has_containers(own)

    def check_backend(self, updates: Sequence[torch.Tensor], leaves: Sequence[Leaf]) -> None:
        """Refuses a backend that is asked for and computes nothing on the device of a leaf of a program, here.

        Raises:
          RuntimeError: with the leaf.
        """
        asked = REPLACED.get() or REQUESTED.get() or ""
        for leaf in leaves:
            x = updates[leaf.position]
            if asked in KERNEL_BACKENDS and not x.is_meta:
                check_backend(asked, x.device, at(self.paths[leaf.position]))


def present_in(columns: Columns) -> tuple[int, ...]:
    """The leaves of which there is an update and a parameter."""
    pairs = zip(columns["updates"], columns.get("params", columns["updates"]), strict=True)
    return tuple([i for i, (u, p) in enumerate(pairs) if u is not None and p is not None])
