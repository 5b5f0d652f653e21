"""Steps of the pure API: what a transformation was bound to is found again."""

from typing import Any

import pytest
import torch

import functional_optim as fo
from _lib.trees import make_tree
from functional_optim import _step


@pytest.mark.parametrize("form", ["path", "tree"])
@pytest.mark.parametrize("combination", ["masked", "partition"])
def test_a_mask_is_asked_at_every_step_and_binds_once_for_each_answer(
    combination: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    class Counted(_step.TreeStep):
        def __init__(self, *args: Any) -> None:
            made.append(self)
            super().__init__(*args)

    monkeypatch.setattr(_step, "TreeStep", Counted)
    params, matched = make_tree(0), {"weight"}
    mask = {"path": lambda path, p: path in matched, "tree": lambda tree: {k: k in matched for k in tree}}[form]
    tx = {
        "masked": lambda: fo.masked(fo.scale(2.0), mask),
        "partition": lambda: fo.partition({True: fo.scale(2.0), False: fo.identity()}, mask),
    }[combination]()
    bound = []

    for name in ("weight", "weight", "bias", "weight", "bias", "bias"):
        matched.clear()
        matched.add(name)
        updates, _ = tx.update(params, tx.init(params), params)
        torch.testing.assert_close(updates, {k: p * (2 if k == name else 1) for k, p in params.items()})
        bound.append(len(made))

    assert bound == [1, 1, 2, 2, 2, 2]
