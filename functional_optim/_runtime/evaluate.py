"""Programs computed by torch operations: the reference, and `torch._foreach_*`."""

from collections.abc import Sequence

from .._compiler.call import Call, Column
from .._compiler.foreach import run_foreach
from .._compiler.reference import run_reference
from .groups import Group
from .join import Joins
from .numbers import Number


RUN = {"reference": run_reference, "foreach": run_foreach}


def evaluate(
    backend: str,
    groups: Sequence[Group],
    gathered: Sequence[Sequence[Column]],
    numbers: Sequence[Sequence[Number]],
    joins: Joins | None,
    in_place: bool = False,
) -> list[list[Column]]:
    """Computes the programs of groups.

    Args:
      backend: `"reference"` or `"foreach"`.
      groups: the groups.
      gathered: for each, the tensors of each of its gathers.
      numbers: for each, its scalar table, row after row.
      joins: the reductions over processes, if there are any.
      in_place: whether results are written to the tensors that they follow, when all have been computed.

    Returns:
      For each group, a column for each output, new ones if it is not in place.
    """
    calls = []
    for group, arrays, table in zip(groups, gathered, numbers, strict=True):
        width = len(group.signature.program.scalars)
        rows = [table[k * width : (k + 1) * width] for k in range(len(group.sources))]
        calls.append(
            Call(
                group.signature,
                arrays[group.updates],
                [arrays[k] for k in group.inputs],
                [arrays[k] if in_place and k is not None else None for k in group.outputs],
                rows,
                group.table,
                group.leaves,
                group.shard,
            )
        )
    return RUN[backend](calls, joins)
