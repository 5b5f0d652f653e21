"""Steps of regions within transformations of `torch.func`, which follow them."""

from collections.abc import Mapping, Set
from typing import Any

import torch

from ._compiler.cache import BuildError
from ._runtime.autograd import can_record, record
from ._runtime.backend import KERNEL_BACKENDS, REQUESTED, disable_backend, refuse_replacement
from ._runtime.groups import Columns, Key
from ._runtime.internals import (
    followers,
    in_transformation,
    map_levels,
    may_have_tangents,
    outside_transformations,
    takes_gradients,
    without_wrappers,
)
from ._runtime.step import BoundStep
from ._segments import BoundRegion, Variant, packed_forms
from ._tree_leaves import TreeLeaves


def run_followed(
    segment: BoundRegion,
    tree: TreeLeaves,
    counters: Set[Key],
    own: Columns,
    extra: Mapping[str, Any],
    given: Mapping[int, torch.Tensor],
) -> Columns | None:
    """Runs a region where torch follows: by kernels where only `vmap`, or only `grad` does, else by operations.

    Args:
      segment: the region.
      tree: the leaves of the trees that it is over.
      counters: columns of counters that all leaves share.
      own: all tensors that the programs read.
      extra: the extra arguments that are numbers.
      given: tensors in the place of those that hyper-parameters have, by identity.

    Returns:
      The columns that change; None, and nothing is done, if other leaves are there than before.
    """
    if takes_gradients() and REQUESTED.get() in (None, *KERNEL_BACKENDS):
        recorded = _bound_to_plain(segment, tree, own)
        if recorded is not None and can_record(recorded):
            return record(recorded, own, recorded.numbers((), extra, given), plain=False)
    levels = map_levels() if REQUESTED.get() in (None, *KERNEL_BACKENDS) else ()
    variant = Variant(False, REQUESTED.get(), forms=packed_forms(own.values()))
    found = segment.find_members(own, variant, levels, extra, given) if levels else None
    if found is None:
        if not tree.has_its_leaves(own):
            return None
        tree.check_leaves(own)
        leaves = segment.leaves(own)
        tree.check_backend(own["updates"], leaves)
        if levels:
            found = segment.bind_members(own, variant, levels, leaves, counters, extra, given)
        if found is None:
            _refuse_replacement()
            segment.check_memory(own)
            programs = segment.programs(own, leaves)
            return programs.evaluate_reference(own, programs.numbers((), extra, given))
    bound, reading = found
    if torch.is_grad_enabled() and reading.requires_grad:
        bound.release(reading)
        refuse_replacement(REQUESTED.get(), f"autograd within {followers()}")
        return bound.evaluate_reference(own, bound.numbers((), extra, given))
    try:
        return bound.run(reading, own, levels)
    except BuildError as error:
        disable_backend(bound.backend, str(error))
        segment.forget_members(bound)
        return bound.evaluate_reference(own, bound.numbers((), extra, given))


def _refuse_replacement() -> None:
    """Refuses operations of torch that transformations follow, where another backend is asked for by name.

    Dispatch modes follow whatever computes a step.
    """
    if in_transformation() or may_have_tangents():
        refuse_replacement(REQUESTED.get(), followers())


def _bound_to_plain(segment: BoundRegion, tree: TreeLeaves, own: Columns) -> BoundStep | None:
    """The step that is bound to the tensors that wrappers of `grad` stand for; None if others are there now."""
    plain: Columns = {key: list(map(without_wrappers, column)) for key, column in own.items()}
    with outside_transformations():
        variant = Variant(False, REQUESTED.get())
        found = segment.find(plain, variant)
        if found is None:
            if not tree.has_its_leaves(plain):
                return None
            tree.check_leaves(plain)
            found = segment.bind(plain, variant, segment.leaves(plain))
        bound, reading = found
        bound.release(reading)
    return bound
