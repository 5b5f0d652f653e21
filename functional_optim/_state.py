"""Where state lives: a nest of NamedTuples of trees in the pure API, a flat dict per parameter in optimizers.

Both are read as columns, a tensor per leaf, which is all that a step knows of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ._regions import Region
from ._runtime.checks import check_count
from ._runtime.plan import Columns
from ._tree import Reader, Tree, difference


Path = Sequence[int | str]


def get_state(state: Any, path: Path) -> Any:
    """The state at a path of indices and keys."""
    for k in path:
        state = state[k]
    return state


def set_states(state: Any, new: Mapping[tuple[int | str, ...], Any]) -> Any:
    """The same nest of states with some of them replaced."""
    if not new:
        return state
    if () in new:
        return new[()]
    by_key: dict[int | str, dict[tuple[int | str, ...], Any]] = {}
    for path, value in new.items():
        by_key.setdefault(path[0], {})[path[1:]] = value
    if isinstance(state, Mapping):
        return type(state)({k: set_states(v, by_key.get(k, {})) for k, v in state.items()})  # type: ignore[call-arg]
    items = [set_states(v, by_key.get(k, {})) for k, v in enumerate(state)]
    return type(state)(*items) if hasattr(state, "_fields") else type(state)(items)


class TreeState:
    """The state of a region in the pure API: a NamedTuple per transformation, with a tree per slot and one counter.

    Args:
      region: the region.
      read: reads trees of the structure of the parameters.
    """

    def __init__(self, region: Region, read: Reader) -> None:
        self.region, self.reader = region, read
        self.counted = [k for k, bound in region.bounds.items() if bound.counted]

    def states(self, state: Any) -> dict[int, Any]:
        """The NamedTuple of each transformation.

        Raises:
          TypeError: the state was made by another transformation.
        """
        states = {}
        for k, bound in self.region.bounds.items():
            path = self.region.links[k].path
            try:
                found = get_state(state, path)
            except (KeyError, IndexError, TypeError):
                found = None
            if type(found) is not bound.state_type:
                where = "".join(f"[{key!r}]" for key in path)
                raise TypeError(
                    f"state{where} is {type(found).__name__}, expected the {bound.state_type.__name__} of "
                    f"{bound.rule.name}; make the state with `init` of the same transformation."
                )
            states[k] = found
        return states

    def columns(self, states: Mapping[int, Any], devices: Sequence[torch.device | None]) -> Columns:
        """The slots of all transformations; a counter is in its column once per leaf, on the device of the leaf.

        Args:
          states: the NamedTuple of each transformation.
          devices: the device of each leaf, None for one that takes no part.

        Raises:
          ValueError, TypeError: a slot does not have the structure of the parameters, or a counter is not one.
        """
        columns: Columns = {}
        for k, bound in self.region.bounds.items():
            for name in bound.rule.slots:
                columns[k, name] = self._slot(bound.rule.name, name, getattr(states[k], name))
            if bound.counted:
                count = states[k].count
                check_count(f"state {bound.rule.name}.count", count)
                columns[k, "count"] = spread_count(count, devices)
        return columns

    def _slot(self, rule: str, name: str, tree: Tree) -> list[Any]:
        try:
            return self.reader(tree)
        except (ValueError, TypeError):
            raise ValueError(
                f"state {rule}.{name} does not have the structure of params: {difference(self.reader.spec, tree)}."
            ) from None

    def replaced(
        self, states: Mapping[int, Any], columns: Columns, like: Tree, moving: Sequence[int]
    ) -> dict[tuple[int | str, ...], Any]:
        """New states, by path.

        Args:
          states: the old ones.
          columns: the slots, old or new.
          like: a tree whose containers slots have.
          moving: the transformations whose counter moves on.
        """
        new = {}
        for k, bound in self.region.bounds.items():
            fields = {name: self.reader.rebuild(like, columns[k, name]) for name in bound.rule.slots}
            if k in moving:
                fields["count"] = states[k].count + 1
            if fields:
                new[tuple(self.region.links[k].path)] = states[k]._replace(**fields)
        return new


def spread_count(count: torch.Tensor, devices: Sequence[torch.device | None]) -> list[torch.Tensor]:
    """A counter once per leaf, as 64-bit integers on the device of the leaf."""
    if count.dtype is torch.int64 and all(device is None or device == count.device for device in set(devices)):
        return [count] * len(devices)
    if count.is_meta and any(device is not None and device.type != "meta" for device in set(devices)):
        raise ValueError("a counter of the state is on meta and has no memory; make the state anew with `init`.")
    own = {device: count.to(device=device, dtype=torch.int64) for device in set(devices)}
    return [own[device] for device in devices]
