"""Stand-ins: chains that take the steps of all that are like them but for the tensors among their hyper-parameters.

A function that `vmap` maps makes its chain anew at every call, of the learning rate that each member is given; one that
is differentiated makes it of a learning rate that follows from others. A step that is bound to the chain would be bound
anew, too. So it is bound to a stand-in, and reads the tensors of the chain in the place of the stand-in's own.
"""

import functools
import re
import weakref
from collections.abc import Hashable, Mapping
from typing import Any

import torch

from ._runtime.internals import is_wrapper_of_a_transformation
from ._schedules.schedule import Identity, Schedule
from ._schedules.traced import has_fixed_key
from ._transform import GradientTransformation, parts


_VALUES = (type(None), bool, int, str, bytes, torch.dtype)


class ChainKey:
    """The key of a chain. Keys are equal if one chain computes as the other does once it has its tensors.

    Numbers and strings count by value; functions, and objects that may change, by identity.

    Args:
      tx: the chain.
    """

    def __init__(self, tx: GradientTransformation) -> None:
        self.chain = weakref.ref(tx)  # a key stays in a cache, and the tensors of the chain are not to
        self.key = _key(tx, {id(x): k for k, x in enumerate(tx._tensors)})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChainKey) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def _key(x: Any, holes: Mapping[int, int]) -> Hashable:
    """A key of an argument. Tensors that are hyper-parameters count by position."""
    if isinstance(x, torch.Tensor):
        return ("tensor", holes[id(x)]) if id(x) in holes else Identity(x)
    if type(x) in _VALUES:
        return type(x), x
    if isinstance(x, float):
        return "float", repr(x)  # zeros of both signs are equal
    if isinstance(x, re.Pattern):
        return "pattern", x.pattern, x.flags
    if type(x) in (tuple, list):
        return type(x), *[_key(y, holes) for y in x]
    if type(x) is dict:
        # most keys are names, which no key of anything else is equal to
        return dict, *[(k if type(k) is str else _key(k, holes), _key(y, holes)) for k, y in x.items()]
    if isinstance(x, (GradientTransformation, Schedule)) and type(x).__reduce__ is not object.__reduce__:
        made = x.__reduce__()
        if made[0] is type(x):  # the call that makes it
            return Identity(type(x)), *[_key(y, holes) for y in made[1]]
    return Identity(x)


@functools.lru_cache(maxsize=64)
def _stand_in(key: ChainKey) -> GradientTransformation | None:
    """The chain that takes the steps of all chains of a key; None if its parts keep their tensors to themselves."""
    tx = key.chain()
    assert tx is not None, "whoever asks for the stand-in of a chain holds that"
    if not all(map(_takes_tensors, parts(tx).values())):
        return None
    return tx._with_tensors([torch.zeros((), dtype=torch.float64) for _ in tx._tensors])


def _takes_tensors(part: GradientTransformation) -> bool:
    """Whether an innermost transformation is a rule whose kernels read all its tensors from a table."""
    bound = part._bound
    if bound is None or bound.rule.whole:
        return False
    return all(has_fixed_key(value) for name, value in bound.values.items() if bound.is_schedule(name))


def stand_in_of(tx: GradientTransformation) -> tuple[GradientTransformation, dict[int, torch.Tensor]]:
    """The chain that steps of one are bound to, and tensors in the place of its hyper-parameters, by identity.

    It is the chain itself, unless its hyper-parameters are made by a function that is mapped or differentiated, which
    makes the chain anew at every call.
    """
    if any(x.grad_fn is not None or is_wrapper_of_a_transformation(x) for x in tx._tensors):
        found = _stand_in(ChainKey(tx))
        if found is not None:
            return found, {id(own): x for own, x in zip(found._tensors, tx._tensors, strict=True)}
    return tx, {}
