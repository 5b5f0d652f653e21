"""State: a nest of NamedTuples of trees in the pure API, a flat dict per parameter in optimizers.

Both are read as columns, a tensor per leaf, which is all that a step knows of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ._compiler.states import state_type
from ._packed import Packed
from ._regions import Region
from ._runtime.checks import check_count
from ._runtime.cuda.capture import is_capturing, refuse_counter
from ._runtime.groups import Columns
from ._state_nodes import (
    Path,
    StateNode,
    get_state as get_state,
    wrong_state,
)
from ._tree import Reader, Tree, difference, unpacked


def set_states(state: Any, new: Mapping[Path, Any]) -> Any:
    """The same nest of states with some of them replaced."""
    if not new:
        return state
    if () in new:
        return new[()]
    by_key: dict[int | str, dict[Path, Any]] = {}
    for path, value in new.items():
        by_key.setdefault(path[0], {})[path[1:]] = value
    if isinstance(state, Mapping):
        return type(state)({k: set_states(v, by_key.get(k, {})) for k, v in state.items()})  # type: ignore[call-arg]
    items = [set_states(v, by_key.get(k, {})) for k, v in enumerate(state)]
    return type(state)(*items) if hasattr(state, "_fields") else type(state)(items)


class StateReader:
    """The state of a region in the pure API: a NamedTuple per transformation, with a tree per slot and one counter.

    Args:
      region: the region.
      read: reads trees of the structure of the parameters.
      device: the device of all leaves that take part; None if there are several.
      present: the leaves that take part.
    """

    def __init__(
        self,
        region: Region,
        read: Reader,
        device: torch.device | None,
        present: Sequence[int],
    ) -> None:
        self.region, self.reader, self.device = region, read, device
        self.expected = [
            (k, StateNode(region.links[k].tx, region.links[k].path, state_type(bound.rule, bound.counted)))
            for k, bound in region.bound_rules.items()
        ]
        self.counted = [k for k, bound in region.bound_rules.items() if bound.counted]
        slots = [(k, *slot) for k, bound in region.bound_rules.items() for slot in bound.rule.slots.items()]
        self.fields = [(k, name, False) for k, name, slot in slots if not slot.per_tree]
        self.fields += [(k, "count", True) for k in self.counted]
        self.shared = {
            (k, name): [i for i in present if region.links[k].seen[i]] for k, name, slot in slots if slot.per_tree
        }

    def states(self, state: Any) -> dict[int, Any]:
        """The NamedTuple of each transformation.

        Raises:
          TypeError: the state was made by another transformation.
        """
        states = {}
        for k, node in self.expected:
            found = state
            for key in node.path:  # `get_state` would be a call for each part of a chain, at every step
                found = found[key]
            if type(found) is not node.kind:
                if not node.is_like(found):
                    raise wrong_state(node, found)
                found = node.kind(*found)
            states[k] = found
        return states

    def columns(self, states: Mapping[int, Any], columns: Columns, in_place: bool = False) -> Columns:
        """The leaves and the slots of all transformations; a counter is in its column once per leaf, on its device.

        Args:
          states: the NamedTuple of each transformation.
          columns: the leaves.
          in_place: whether slots are written in place.

        Raises:
          ValueError, TypeError: a slot does not have the structure of the parameters, or a counter is not one.
          CaptureError: a CUDA graph is being captured, and a counter is elsewhere.
        """
        own = dict(columns)
        for k, name, is_counter in self.fields:
            value = getattr(states[k], name)
            if not is_counter:
                try:
                    own[k, name] = self.reader(value)
                except (ValueError, TypeError):
                    raise ValueError(
                        f"state {self.region.bound_rules[k].rule.name}.{name} does not have the structure of params: "
                        f"{difference(self.reader.spec, value)}."
                    ) from None
            elif (
                type(value) is torch.Tensor
                and value.dtype is torch.int64
                and not value.ndim
                and value.device == self.device
            ):
                own[k, name] = [value] * len(columns["updates"])
            else:
                label = f"state {self.region.bound_rules[k].rule.name}.count"
                check_count(label, value)
                places = {x.device for x in columns["updates"] if isinstance(x, torch.Tensor)}
                if value.device not in places and is_capturing(places):
                    refuse_counter(label, value, next(iter(places)))
                own[k, name] = broadcast_count(value, columns["updates"], in_place)
        for (k, name), takers in self.shared.items():
            label = f"state {self.region.bound_rules[k].rule.name}.{name}"
            devices = [getattr(u, "device", None) for u in columns["updates"]]
            own[k, name] = shared_column(label, getattr(states[k], name), devices, takers, in_place)
        return own

    def replaced(
        self, states: Mapping[int, Any], columns: Columns, like: Tree, moving: Sequence[int]
    ) -> dict[Path, Any]:
        """New states, by path.

        Args:
          states: the old ones.
          columns: the slots, old or new.
          like: a tree whose containers slots have; a slot that is packed stays so.
          moving: the transformations whose counter moves on.
        """
        new = {}
        for k, bound in self.region.bound_rules.items():
            fields = {
                name: self._rebuild(getattr(states[k], name), like, columns[k, name])
                for name in bound.rule.slots
                if (k, name) not in self.shared
            }
            for name in bound.rule.slots:
                takers = self.shared.get((k, name))
                if takers:  # all have computed the same
                    fields[name] = columns[k, name][takers[0]]
            if k in moving:
                fields["count"] = states[k].count + 1
            if fields:
                new[self.region.links[k].path] = states[k]._replace(**fields)
        return new

    def _rebuild(self, slot: Tree, like: Tree, leaves: Sequence[Any]) -> Tree:
        return self.reader.rebuild(slot if isinstance(slot, Packed) else unpacked(like), leaves)


def broadcast_count(count: torch.Tensor, leaves: Sequence[Any], in_place: bool) -> list[Any]:
    """A counter once per leaf, as 64-bit integers on the device of the leaf.

    Args:
      count: the counter.
      leaves: the leaves.
      in_place: whether it is moved on in place, which may happen before some kernels read it: all read copies.
    """
    copies: dict[torch.device, torch.Tensor] = {}
    column: list[Any] = []
    for x in leaves:
        if not isinstance(x, torch.Tensor):
            column.append(None)
            continue
        if count.is_meta and not x.is_meta:
            raise ValueError("a counter of the state is on meta and has no memory; make the state anew with `init`.")
        if x.device not in copies:
            copies[x.device] = count.to(device=x.device, dtype=torch.int64, copy=in_place)
        column.append(copies[x.device])
    return column


class Copies:
    """Copies of a number that leaves share, in memory of earlier ones: kernels find them where they were.

    There are as many at each step.
    """

    def __init__(self) -> None:
        # by device and dtype: the memory, and a view of each copy
        self.known: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, Sequence[torch.Tensor]]] = {}

    def of(self, value: torch.Tensor, n: int) -> Sequence[torch.Tensor]:
        """`n` copies of a number."""
        memory, views = self.known.get((value.device, value.dtype), (None, ()))
        # inference tensors are not written to outside of inference mode
        if memory is not None and (torch.is_inference_mode_enabled() or not memory.is_inference()):
            memory.copy_(value)
            return views
        memory = value.expand(n).clone()
        views = memory.unbind()
        self.known[value.device, value.dtype] = memory, views
        return views


def shared_column(
    name: str,
    value: Any,
    devices: Sequence[torch.device | None],
    takers: Sequence[int],
    in_place: bool,
    copies: Copies | None = None,
) -> list[Any]:
    """A number that leaves share, once per leaf and on its device.

    A kernel may read the number of one leaf after it has written that of another. So in place, one leaf writes the
    number itself, and the others copies of it.

    Args:
      name: its name in messages.
      value: the number.
      devices: the device of each leaf.
      takers: positions of the leaves that share it; the first one on its device writes it.
      in_place: whether it is written in place.
      copies: copies of earlier steps, whose memory is written anew.

    Raises:
      ValueError: the value is not one number, or in place on a device where no leaf is.
    """
    if not isinstance(value, torch.Tensor) or value.ndim or not value.is_floating_point():
        shown = type(value).__name__
        if isinstance(value, torch.Tensor):
            shown = f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
        raise ValueError(f"{name} is {shown}, expected a tensor that holds one floating number for all leaves.")
    column: list[Any] = [None] * len(devices)
    takers = [i for i in takers if devices[i] is not None]  # a leaf that is gone is found when tensors are read
    for device in dict.fromkeys(devices[i] for i in takers):
        sharing = [i for i in takers if devices[i] == device]
        one = value if value.is_meta else value.to(device)
        found = (copies or Copies()).of(one, len(sharing)) if in_place else [one] * len(sharing)
        for i, copy in zip(sharing, found, strict=True):
            column[i] = copy
    if in_place and takers and not value.is_meta:
        writer = next((i for i in takers if devices[i] == value.device), None)
        if writer is None:
            raise ValueError(
                f"{name} is on {value.device}, where no leaf that takes part is; move it to {devices[takers[0]]}."
            )
        column[writer] = value
    return column
