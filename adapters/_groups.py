"""Parameter groups as callers give them: an optimizer changes copies, never its arguments."""

from collections.abc import Callable, Iterator
from typing import Any

from functional_optim._warn import warn


def copied(group: Any, warn: Callable[[str], None] = warn) -> Any:
    """A copy of a parameter group, for torch's `Optimizer` to fill in.

    torch fills in its defaults in the dict that it is given, so a dict that is used again would bring the options of
    the first optimizer to the second.

    Args:
      group: the parameter group; anything but a dict is returned as it is, and torch refuses it.
      warn: gives a warning.

    Returns:
      The copy, which has the same tensors.

    Raises:
      KeyError: it has no parameters.
    """
    if not isinstance(group, dict):
        return group
    if "params" not in group:
        raise KeyError(f"a parameter group lacks 'params', its parameters; it has {list(group)!r:.60}.")
    group = dict(group)
    if isinstance(group.get("params"), Iterator):
        group["params"] = list(group["params"])
        if not group["params"]:
            warn(
                "`params` of a parameter group is an iterator that yields nothing, so the group is empty; if another "
                "optimizer has used it up, pass a list."
            )
    if isinstance(group.get("param_names"), list):
        group["param_names"] = list(group["param_names"])
    return group
