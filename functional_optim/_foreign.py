"""Code of callers within a step: transformations that can only be called, and schedules that Python evaluates.

It may return anything, and do anything to the tensors of the step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ._compiler.fuse import HostSchedule
from ._runtime.checks import check_fit, check_stored, is_freed, refuse_freed, schedule_value
from ._runtime.pointers import PointerReader
from ._runtime.spec import TensorSpec
from ._transform import Link
from ._tree import MaskedNode, Reader, View, difference, flatten, paths


def call_opaque(
    link: Link, view: View, before: Sequence[Any], state: Any, with_params: bool, extra: Mapping[str, Any], read: Reader
) -> tuple[list[Any], Any]:
    """Calls `update` of a transformation that is not made of rules.

    Args:
      link: the transformation.
      view: the parameters.
      before: the updates.
      state: its state.
      with_params: whether it is given the parameters.
      extra: the extra arguments.
      read: reads trees of the structure of the parameters.

    Returns:
      The updates: where it does not see a leaf, or there is no gradient, those before. And the new state.

    Raises:
      TypeError: the transformation returned something else than updates and a state.
      ValueError: the updates have another structure than the parameters, or the storage of an entry of state has been
        freed or cut.
    """
    _check_state_stored(link, state)
    result = link.tx.update(view.tree(before), state, view.tree() if with_params else None, **extra)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"{link.tx!r:.60} returned {result!r:.60} from `update`, expected (updates, state).")
    tree, new_state = result
    try:
        found = read(tree)
    except (ValueError, TypeError):
        raise ValueError(
            f"the update that {link.tx!r:.60} returned does not have the structure of params: "
            f"{difference(read.spec, tree)}."
        ) from None
    updates = [
        x if seen and u is not None and not isinstance(x, MaskedNode) else u
        for x, u, seen in zip(found, before, link.seen, strict=True)
    ]
    return updates, new_state


def _check_state_stored(link: Link, state: Any) -> None:
    """Refuses a state with an entry whose storage has been freed or cut, which operations of torch would read."""
    leaves, spec = flatten(state)
    for k, x in enumerate(leaves):
        if isinstance(x, torch.Tensor) and x.layout is torch.strided and is_freed(x):
            refuse_freed(f"the state of {link.tx!r:.60}", paths(spec)[k], x.shape)


def check_updates(
    link: Link, updates: Sequence[Any], params: Sequence[Any], paths: Sequence[str], present: Sequence[int]
) -> None:
    """Refuses updates of a transformation that do not fit the parameters.

    Raises:
      TypeError, ValueError: with the transformation, the path and both shapes.
    """
    for i in present:
        u, p = updates[i], params[i]
        if type(u) is not torch.Tensor or u.shape != p.shape or u.dtype != p.dtype or u.device != p.device:
            check_fit(f"the update that {link.tx!r:.60} returned", "parameter", paths[i], u, p)


def host_column(
    host: HostSchedule, counts: Sequence[int | None], devices: Sequence[torch.device | None]
) -> list[torch.Tensor | None]:
    """The value of a schedule that only Python can evaluate, for each leaf.

    Args:
      host: the schedule.
      counts: the count of each leaf.
      devices: the device of each leaf, None for one that takes no part.

    Raises:
      ValueError: the schedule returned something else than a number.
    """
    values = {
        count: schedule_value(host.name, host.schedule(count)) for count in dict.fromkeys(counts) if count is not None
    }
    known: dict[Any, torch.Tensor] = {}
    column: list[torch.Tensor | None] = []
    for count, device in zip(counts, devices, strict=True):
        if count is None or device is None:
            column.append(None)
            continue
        if (count, device) not in known:
            known[count, device] = torch.as_tensor(values[count], dtype=torch.float64, device=device)
        column.append(known[count, device])
    return column


def value_of_members(host: HostSchedule, count: torch.Tensor, counts: Sequence[float]) -> torch.Tensor:
    """The value of a schedule that only Python can evaluate, for members of `vmap`, which have counts of their own.

    Args:
      host: the schedule, which is called once for each count.
      count: the count within `vmap`.
      counts: all counts that there are.

    Raises:
      ValueError: the schedule returned something else than a number.
    """
    found: torch.Tensor | None = None
    for k in counts:
        value = torch.as_tensor(
            schedule_value(host.name, host.schedule(int(k))), dtype=torch.float64, device=count.device
        )
        found = value if found is None else torch.where(count == k, value, found)
    return torch.zeros((), dtype=torch.float64) if found is None else found


CHANGED_MESSAGE = (
    "params changed while the step was computed: a transformation or a schedule that runs in Python made something "
    "else of a tensor (another shape, dtype, layout, device, or no memory). Change tensors between steps."
)


class SpecWatch:
    """The specs of tensors that code of a caller may make something else of: parameters, or its updates.

    Args:
      tensors: the tensors of all leaves.
      present: the leaves that take part.
      name: what messages call them.
      paths: the paths of all leaves; without them tensors may lack memory, of which a later look tells.

    Raises:
      ValueError: the storage of one has been freed or cut.
    """

    def __init__(
        self, tensors: Sequence[Any], present: Sequence[int], name: str = "", paths: Sequence[str] | None = None
    ) -> None:
        self.present = present
        if paths is not None:
            for i in present:
                check_stored(name, paths[i], tensors[i])
        own = [tensors[i] for i in present]
        self.reader = PointerReader(own, list(map(TensorSpec.of, own)))

    @classmethod
    def of(
        cls, last: "SpecWatch", tensors: Sequence[Any], present: Sequence[int], name: str, paths: Sequence[str]
    ) -> "SpecWatch":
        """The watch of the last step, if it holds for these tensors; else a new one. See the class."""
        return last if last.present == present and last.holds(tensors) else cls(tensors, present, name, paths)

    def holds(self, tensors: Sequence[Any]) -> bool:
        """Whether tensors are as they were."""
        return self.reader.fits([tensors[i] for i in self.present])
