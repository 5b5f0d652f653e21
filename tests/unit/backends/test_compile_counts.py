"""Counts of compiled programs: nothing that changes between steps is baked in."""

import math
from typing import Any

import optree
import pytest

import functional_optim as fo
from _lib.chains import RATES
from _lib.records import normal, use
from functional_optim._compiler.c import build
from functional_optim._runtime import cpu


@pytest.mark.parametrize(("kind", "rates"), RATES, ids=[kind for kind, _ in RATES])
def test_a_new_learning_rate_compiles_nothing(kind: str, rates: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[str] = []

    def load_c(source: str) -> Any:
        sources.append(source)
        return build.load_c(source)

    monkeypatch.setattr(cpu, "load_c", load_c)
    cpu.compile_c.cache_clear()
    params = normal(0)
    with use("c"):
        for rate in rates:
            tx = fo.adamw(rate, weight_decay=0.1)
            fo.apply_gradients(tx, params, normal(1), tx.init(params))
    assert len(sources) == 1


def test_steps_of_a_schedule_leave_the_source_as_it_is() -> None:
    tx = fo.adamw(fo.warmup_cosine_decay_schedule(0.0, 0.1, 2, 9))
    params = normal(0)
    state = tx.init(params)
    cpu.compile_c.cache_clear()
    with use("c"):
        for step in range(12):
            params, state = fo.apply_gradients(tx, params, normal(step), state)
    assert cpu.compile_c.cache_info().misses == 1
    assert all(math.isfinite(x.sum()) for x in optree.tree_leaves(params))
