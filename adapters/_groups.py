"""Parameter groups as callers give them: an optimizer changes copies, never its arguments."""

from collections.abc import Iterator
from typing import Any


def copied(group: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A copy of a parameter group, for torch's `Optimizer` to fill in.

    torch fills in its defaults in the dict that it is given, so a dict that is used again would bring the options of
    the first optimizer to the second.

    Args:
      group: the parameter group.

    Returns:
      The copy, which has the same tensors, and the messages of warnings for the caller.
    """
    group, warnings = dict(group), []
    if isinstance(group.get("params"), Iterator):
        group["params"] = list(group["params"])
        if not group["params"]:
            warnings.append(
                "`params` of a parameter group is an iterator that yields nothing, so the group is empty; if another "
                "optimizer has used it up, pass a list."
            )
    if isinstance(group.get("param_names"), list):
        group["param_names"] = list(group["param_names"])
    return group, warnings
