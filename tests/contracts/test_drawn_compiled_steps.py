"""Drawn chains over drawn trees: a compiled step is a step of eager mode, and a packed one that of its tree."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import (
    given,
    settings,
    strategies as st,
)
from torch.utils._pytree import tree_map

import functional_optim as fo
from _lib.compare import assert_alike
from _lib.drawn import DRAWN, RUNS, Params, Run
from _lib.trees import tensors


pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the compiler's own
    pytest.mark.filterwarnings("ignore:the mask:UserWarning"),  # some match no leaf
]


@pytest.fixture(autouse=True, scope="module")
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


# the containers of a tree, by the name of its leaves; paths end with the name
TREES: dict[str, Callable[[Params], Any]] = {
    "dict": dict,
    "backwards": lambda leaves: dict(reversed(leaves.items())),
    "list": lambda leaves: [{name: x} for name, x in leaves.items()],
    "absent": lambda leaves: {"some": leaves, "none": [None, (None,)]},
    "nested": lambda leaves: ({"a": leaves.get("a")}, [{k: x for k, x in leaves.items() if k != "a"}], ()),
}


def step_of(run: Run) -> Callable[[Any, Any, Any], Any]:
    def step(params: Any, grads: Any, state: Any) -> Any:
        if run.how != "update":
            return fo.apply_gradients(run.tx, params, grads, state, donate=run.how == "donate")
        updates, state = run.tx.update(grads, state, params)
        return fo.apply_updates(params, updates), state

    return step


def steps_of(run: Run, tree: str, absent: bool, packed: bool, backend: str | None) -> Any:
    """Parameters and state after some steps, in eager mode without a backend of the compiler."""
    params, grads = run.start()
    if absent and len(params) > 1:
        grads = [{**each, "a": None} for each in grads]  # type: ignore[dict-item]
    params, given = TREES[tree](params), list(map(TREES[tree], grads))
    if packed:
        packs = [fo.pack(each) for each in given]
        alike = all(each.form is fo.pack(params).form for each in packs)
        given = packs if alike else given
        params = fo.pack(params) if alike or run.how != "update" else params  # `update` takes what is packed alike
    state = run.tx.init(params)
    step = step_of(run)
    if backend is not None:
        torch.compiler.reset()
        step = torch.compile(step, fullgraph=True, backend=backend)
    for each in given:
        params, state = step(params, each, state)
    return fo.unpack(params), tree_map(fo.unpack, state, is_leaf=lambda x: isinstance(x, fo.Packed))


def assert_same_bits(actual: Any, expected: Any) -> None:
    for x, y in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@given(run=RUNS, tree=st.sampled_from(list(TREES)), absent=st.booleans(), packed=st.booleans())
@settings(DRAWN, max_examples=10)
def test_drawn_steps_compile_to_the_bits_of_eager_mode(run: Run, tree: str, absent: bool, packed: bool) -> None:
    compiled = steps_of(run, tree, absent, packed, "aot_eager")
    assert_same_bits(compiled, steps_of(run, tree, absent, packed, None))
    assert_same_bits(compiled, steps_of(run, tree, absent, not packed, None))


@pytest.mark.slow
@given(run=RUNS, tree=st.sampled_from(list(TREES)), packed=st.booleans())
@settings(DRAWN, max_examples=3)
def test_drawn_steps_that_are_traced_agree_within_rounding(run: Run, tree: str, packed: bool) -> None:
    with fo.use_backend("reference"):
        compiled = steps_of(run, tree, False, packed, "aot_eager")
    assert_alike(compiled, steps_of(run, tree, False, packed, None))


@pytest.mark.slow
@given(run=RUNS, packed=st.booleans())
@settings(DRAWN, max_examples=1)
def test_drawn_steps_compile_with_inductor(run: Run, packed: bool) -> None:
    """An operation keeps its bits; `apply_updates` is the compiler's, and rounds as `x + y` does."""
    assert_alike(steps_of(run, "nested", False, packed, "inductor"), steps_of(run, "nested", False, packed, None))
