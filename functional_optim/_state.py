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
      device: the device of all leaves that take part; None if there are several.
    """

    def __init__(self, region: Region, read: Reader, device: torch.device | None) -> None:
        self.region, self.reader, self.device = region, read, device
        self.expected = [(k, region.links[k].path, bound.state_type) for k, bound in region.bounds.items()]
        self.counted = [k for k, bound in region.bounds.items() if bound.counted]
        self.fields = [(k, name, False) for k, bound in region.bounds.items() for name in bound.rule.slots]
        self.fields += [(k, "count", True) for k in self.counted]

    def states(self, state: Any) -> dict[int, Any]:
        """The NamedTuple of each transformation.

        Raises:
          TypeError: the state was made by another transformation.
        """
        states = {}
        for k, path, expected in self.expected:
            found = state
            try:
                for key in path:
                    found = found[key]
            except (KeyError, IndexError, TypeError):
                found = None
            if type(found) is not expected:
                where = "".join(f"[{key!r}]" for key in path)
                name = self.region.bounds[k].rule.name
                raise TypeError(
                    f"state{where} is {type(found).__name__}, expected the {expected.__name__} of {name}; make the "
                    f"state with `init` of the same transformation."
                )
            states[k] = found
        return states

    def columns(self, states: Mapping[int, Any], columns: Columns) -> Columns:
        """The leaves and the slots of all transformations; a counter is in its column once per leaf, on its device.

        Args:
          states: the NamedTuple of each transformation.
          columns: the leaves.

        Raises:
          ValueError, TypeError: a slot does not have the structure of the parameters, or a counter is not one.
        """
        own = dict(columns)
        for k, name, is_counter in self.fields:
            value = getattr(states[k], name)
            if not is_counter:
                try:
                    own[k, name] = self.reader(value)
                except (ValueError, TypeError):
                    raise ValueError(
                        f"state {self.region.bounds[k].rule.name}.{name} does not have the structure of params: "
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
                check_count(f"state {self.region.bounds[k].rule.name}.count", value)
                own[k, name] = broadcast_count(value, columns["updates"])
        return own

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


def broadcast_count(count: torch.Tensor, leaves: Sequence[Any]) -> list[Any]:
    """A counter once per leaf, as 64-bit integers on the device of the leaf."""
    own: dict[torch.device, torch.Tensor] = {}
    column: list[Any] = []
    for x in leaves:
        if not isinstance(x, torch.Tensor):
            column.append(None)
            continue
        if count.is_meta and not x.is_meta:
            raise ValueError("a counter of the state is on meta and has no memory; make the state anew with `init`.")
        if x.device not in own:
            own[x.device] = count.to(device=x.device, dtype=torch.int64)
        column.append(own[x.device])
    return column
