"""The state of transformations that are not made of rules, kept with the leaves."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .._transform import Link
from .._tree import View, flatten, leaves_like, paths, unflatten


class Barrier:
    """Keeps the state of a transformation that is not made of rules in the leaves' flat dicts.

    What has an entry for every parameter is split up between them; anything else, such as a counter, is written to
    all of them and read from the first.
    """

    def __init__(self, link: Link, position: int, view: View) -> None:
        self.link, self.view = link, view._replace(seen=link.seen)
        self.names = list(view.tree())
        state = link.tx.init(self.view.tree())
        self.values, self.spec = flatten(state, self.per_param)
        self.keys = [".".join((f"transformation_{position}", path)) for path in paths(self.spec)]
        for key, value in zip(self.keys, self.values, strict=True):
            if not self.per_param(value) and value is not None and not isinstance(value, (torch.Tensor, int, float)):
                raise TypeError(
                    f"the state of {link.tx!r:.60} holds {value!r:.60} ({key}), expected tensors and numbers, which is "
                    f"what the state of an optimizer can hold."
                )

    def per_param(self, x: Any) -> bool:
        return isinstance(x, Mapping) and list(x) == self.names

    def gather(self, states: Sequence[dict[str, Any]]) -> Any:
        """The transformation's state."""
        leaves = []
        for key, value in zip(self.keys, self.values, strict=True):
            if self.per_param(value):
                leaves.append(type(value)((n, s.get(key, value[n])) for n, s in zip(self.names, states, strict=True)))
            else:
                leaves.append(next((s[key] for s in states if key in s), value))
        return unflatten(self.spec, leaves)

    def scatter(self, state: Any, states: Sequence[dict[str, Any]], present: Sequence[int]) -> None:
        """Puts a new state away."""
        for key, value in zip(self.keys, leaves_like(self.spec, state), strict=True):
            split = self.per_param(value)
            # what belongs to all is kept by all, lest a parameter without a gradient should keep an old one
            holders = present if split else [i for i, s in enumerate(states) if i in present or key in s]
            for i in holders:
                x = value[self.names[i]] if split else value
                if isinstance(x, (torch.Tensor, int, float)):
                    states[i][key] = x.clone() if isinstance(x, torch.Tensor) and not split else x
