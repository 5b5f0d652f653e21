"""The certified table says what is so today."""

from pathlib import Path

import pytest
import torch

from _lib.certified import ROWS, Row, certified
from functional_optim import adapters


PAGE = (Path(__file__).parents[2] / "docs" / "certified.md").read_text()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_is_what_is_measured(row: Row) -> None:
    """Run `python docs/make_certified.py` if the table is out of date; a number beyond its bound is a fault."""
    if row.name == "LBFGS" and torch.__version__ >= (2, 14):
        pytest.skip("the table is made with torch 2.13, whose LBFGS has no switch")
    assert f"| {' | '.join(certified(row))} |" in PAGE.splitlines()


def test_every_class_of_torch_has_a_row() -> None:
    names = {name for name in adapters.__all__ if hasattr(torch.optim, name)}
    assert {row.name for row in ROWS} == names
