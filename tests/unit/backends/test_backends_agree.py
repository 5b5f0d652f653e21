"""Every backend against the reference: drawn chains, dtypes and layouts; and what a step leaves alone."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import (
    given,
    settings,
    strategies as st,
)

import functional_optim as fo
from _lib.backends import OTHERS, only
from _lib.compare import assert_alike
from _lib.drawn import DRAWN, LAYOUTS, NAMES, RUNS, SHAPES, Leaf, Run, decays, laid_out, links, numbers, wrapped
from _lib.marks import INTERPRETER, OPTIMIZED
from _lib.trees import F64, tensors
from functional_optim._runtime.backend import BACKENDS


pytestmark = [INTERPRETER, OPTIMIZED]


def steps_of(run: Run, backend: str) -> Any:
    """Parameters and state after some steps."""
    params, grads = run.start()
    with only(backend):
        state = run.tx.init(params)
        for g in grads:
            if run.how == "update":
                updates, state = run.tx.update(g, state, params)
                params = fo.apply_updates(params, updates)
            else:
                params, state = fo.apply_gradients(run.tx, params, g, state, donate=run.how == "donate")
    return params, state


drawn = pytest.mark.filterwarnings("ignore:the mask:UserWarning")  # some match no leaf


@pytest.mark.slow
@drawn
@pytest.mark.parametrize("backend", OTHERS)
@given(run=RUNS)
@DRAWN
def test_drawn_chains_agree_with_the_reference(backend: str, run: Run) -> None:
    assert_alike(steps_of(run, backend), steps_of(run, "reference"))


# transformations that look at many leaves at once, where it matters who sees which of them
REDUCING = st.one_of(
    st.builds(fo.clip_by_global_norm, numbers(0.1, 3)),
    st.builds(fo.clip_by_block_rms, numbers(0.1, 2)),
    st.builds(fo.trace, decays),
    st.builds(fo.set_to_zero),
)


def one_by_one(
    txs: Sequence[fo.GradientTransformation], params: Any, grads: Sequence[Any], backend: str = "reference"
) -> tuple[Any, Any]:
    """Last updates, and states, of a chain, and of its members called one after another by the reference."""
    chain = fo.chain(*txs)
    state, states = chain.init(params), [tx.init(params) for tx in txs]
    for g in grads:
        with only(backend):
            fused, state = chain.update(g, state, params)
        with only("reference"):
            for k, tx in enumerate(txs):
                g, states[k] = tx.update(g, states[k], params)
    return (fused, state), (g, tuple(states))


@pytest.mark.slow
@drawn
@given(
    st.lists(st.one_of(links, wrapped(REDUCING)), min_size=2, max_size=4),
    st.lists(st.sampled_from(SHAPES), min_size=1, max_size=len(NAMES)),
)
@settings(DRAWN, max_examples=60)
def test_drawn_chains_are_their_members_one_by_one(
    txs: list[fo.GradientTransformation], shapes: list[tuple[int, ...]]
) -> None:
    """Whichever leaves each of them sees: fusing changes nothing but rounding, of which float64 shows little."""
    leaves = tuple(Leaf(x, F64, F64, "contiguous", "contiguous") for x in shapes)
    fused, apart = one_by_one(txs, *Run(fo.identity(), leaves, 0, False, "update").start())
    assert_alike(fused, apart)


ONLY_A, ONLY_B = {"a": True, "b": False}, {"a": False, "b": True}
ACROSS = {
    "a clip of some before a clip of all": [
        fo.masked(fo.clip_by_global_norm(1.0), ONLY_A),
        fo.clip_by_global_norm(2.0),
    ],
    "a leaf's norm for the first before a clip of all": [
        fo.masked(fo.clip_by_block_rms(0.5), ONLY_A),
        fo.clip_by_global_norm(2.0),
    ],
    "a leaf's norm for the last before a clip of all": [
        fo.masked(fo.clip_by_block_rms(0.5), ONLY_B),
        fo.clip_by_global_norm(2.0),
    ],
    "a clip of all before one of some": [
        fo.clip_by_global_norm(3.0),
        fo.masked(fo.clip_by_global_norm(1.0), ONLY_A),
        fo.scale(-0.1),
    ],
    "parts before a clip of all": [
        fo.partition(
            {"x": fo.chain(fo.clip_by_global_norm(1.0), fo.clip_by_block_rms(0.5)), "y": fo.scale(2.0)},
            {"a": "x", "b": "y"},
        ),
        fo.clip_by_global_norm(2.0),
        fo.trace(0.9),
    ],
    "a clip of all before some are frozen": [
        fo.clip_by_global_norm(1.0),
        fo.masked(fo.set_to_zero(), ONLY_B),
    ],
    "a clip of all after some are frozen": [
        fo.masked(fo.set_to_zero(), ONLY_B),
        fo.clip_by_global_norm(1.0),
    ],
    "a ratio of norms after all are frozen": [
        fo.set_to_zero(),
        fo.scale_by_trust_ratio(),
    ],
    "a clip in each part": [
        fo.partition(
            {"x": fo.clip_by_global_norm(1.0), "y": fo.chain(fo.scale(2.0), fo.clip_by_global_norm(0.5))},
            {"a": "x", "b": "y"},
        ),
        fo.scale(-0.1),
    ],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ACROSS)
def test_tree_reductions_across_leaves_with_other_rules_before(backend: str, name: str) -> None:
    """Every leaf that a clip sees counts, at the time when all that precedes the clip has happened to it."""
    params = {"a": torch.ones(3, dtype=F64), "b": torch.ones(2, dtype=F64)}
    grads = {"a": torch.tensor([3.0, 4.0, 0.0], dtype=F64), "b": torch.tensor([12.0, -1.0], dtype=F64)}
    fused, apart = one_by_one(ACROSS[name], params, [grads, grads], backend)
    assert_alike(fused, apart)


RULED = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-2), fo.params_ema(0.9))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pure_step_leaves_its_arguments_alone(backend: str) -> None:
    params = [laid_out(torch.randn(3, 4), layout) for layout in LAYOUTS]
    grads = [laid_out(torch.randn(3, 4), layout) for layout in [*LAYOUTS[1:], "expanded"]]
    state = RULED.init(params)
    before = [x.clone() for x in tensors((params, grads, state))]
    with only(backend):
        fo.apply_gradients(RULED, params, grads, state)
    torch.testing.assert_close(tensors((params, grads, state)), before, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_donated_step_writes_where_its_arguments_are(backend: str) -> None:
    """And nowhere else: not between the elements of a slice, nor before and after it."""
    params = [laid_out(torch.randn(3, 4), layout) for layout in LAYOUTS]
    grads = [laid_out(torch.randn(3, 4), layout) for layout in [*LAYOUTS[1:], "expanded"]]
    state = RULED.init(params)
    expected = fo.apply_gradients(RULED, params, grads, state)
    places = [x.data_ptr() for x in tensors((params, state))]
    with only(backend):
        result = fo.apply_gradients(RULED, params, grads, state, donate=True)
    assert [x.data_ptr() for x in tensors(result)] == places
    holes = params[LAYOUTS.index("sliced")].as_strided((3, 4), (8, 2), 1)
    torch.testing.assert_close(holes, torch.full((3, 4), 7.0), rtol=0, atol=0)
    assert_alike(result, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("per", ["leaf", "tree"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_that_are_stored_in_half_types_are_rounded_alike(backend: str, per: Any, dtype: torch.dtype) -> None:
    """As torch rounds a double, by way of float32: a little more than half a unit is half a unit there, and even."""
    half_a_unit = torch.finfo(dtype).eps / 2
    factors = [1 + half_a_unit + 2.0**-30, 1 + 1.25 * half_a_unit, 3.1, 1e-3]

    @fo.elementwise(state={"number": fo.slot(1.0, per=per, dtype=dtype)}, extra=("factor",))
    def scaled(u: Any, number: Any, *, factor: Any) -> Any:
        return u * number, number * factor

    tx, params = scaled(), {"a": torch.zeros(5), "b": torch.zeros(3)}
    state, expected = tx.init(params), torch.ones((), dtype=dtype)
    with only(backend):
        for factor in [*factors, 1.0]:  # a step shows the number of the one before
            updates, state = tx.update({k: torch.ones_like(p) for k, p in params.items()}, state, factor=factor)
            assert {float(x) for u in updates.values() for x in u} == {float(expected)}
            expected = (expected.double() * factor).to(torch.float32).to(dtype)
