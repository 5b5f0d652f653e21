"""Drawn chains over groups with switches of their own, against the pure functions, which know no groups."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import (
    HealthCheck,
    given,
    settings,
    strategies as st,
)

import functional_optim as fo
from _lib.twins import by_norm, doubled, kept, momentum, opaque_by_norm, opaque_momentum
from functional_optim.adapters import TransformOptimizer


NAMES = ["a", "b", "c", "d", "e"]
GROUPS = ["ab", "cd", "e"]

LINKS = st.sampled_from(
    [
        lambda: momentum(),
        lambda: opaque_momentum(),
        lambda: by_norm(),
        lambda: opaque_by_norm(),
        lambda: doubled(),
        lambda: fo.clip_by_global_norm(0.5),
        lambda: fo.clip_by_block_rms(1.0),
        lambda: fo.trace(0.0, nesterov=False),  # of a switch without effect
        lambda: fo.scale(0.9),
    ]
)
MASKS = st.sampled_from(["a|c", "b|c|d", "e", "[a-d]"])


def chained(links: Sequence[Any]) -> Any:
    return lambda: fo.chain(*[make() for make in links])


def nested(links: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Chains, rules around others, masks and partitions of drawn links."""
    return (
        st.lists(links, min_size=1, max_size=3).map(chained)
        | links.map(lambda make: lambda: kept(make()))
        | st.tuples(links, MASKS).map(lambda x: lambda: fo.masked(x[0](), x[1]))
        | st.tuples(links, links).map(
            lambda x: (
                lambda: fo.partition(
                    {"x": x[0](), "y": x[1]()}, lambda path, p: "x" if path in ("a", "c", "e") else "y"
                )
            )
        )
    )


CHAINS = st.recursive(LINKS, nested, max_leaves=8)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    make=CHAINS,
    ascending=st.sets(st.sampled_from(range(3))),
    nesterov=st.sets(st.sampled_from(range(3))),
    absent=st.lists(st.sets(st.sampled_from(NAMES), max_size=2), min_size=5, max_size=5),
    loaded=st.integers(1, 4),
)
def test_drawn_chains_over_groups_are_those_over_the_tree(
    make: Any, ascending: set[int], nesterov: set[int], absent: list[set[str]], loaded: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(3, 2, generator=generator, dtype=torch.float64)  # noqa: E731
    params = {k: torch.nn.Parameter(draw()) for k in NAMES}
    pure = {k: p.detach().clone() for k, p in params.items()}
    tx = fo.chain(make(), fo.scale(-0.1))
    state = tx.init(pure)

    def optimizer() -> TransformOptimizer:
        made = TransformOptimizer([{"params": [(k, params[k]) for k in group]} for group in GROUPS], tx)
        for g, group in enumerate(made.param_groups):
            group["maximize"] = g in ascending
            group.update({k: g in nesterov for k in group if k == "nesterov"})
        return made

    opt = optimizer()
    for step, missing in enumerate(absent):
        grads = {k: None if k in missing else draw() for k in NAMES}
        for k, p in params.items():
            p.grad = grads[k]
        if step == loaded:
            file = copy.deepcopy(opt.state_dict())
            opt = optimizer()
            opt.load_state_dict(file)
        opt.step()
        signed = {
            k: None if g is None else -g if any(k in GROUPS[i] for i in ascending) else g for k, g in grads.items()
        }
        pure, state = fo.apply_gradients(tx, pure, signed, state)

    # a norm of opaque links adds up in another order
    torch.testing.assert_close({k: p.detach() for k, p in params.items()}, pure, rtol=1e-10, atol=1e-10)
