"""The certified table says what is so today."""

from pathlib import Path

import pytest
import torch

from _lib.certified import ROWS, Row, certified, flags
from functional_optim import adapters


PAGE = (Path(__file__).parents[2] / "docs" / "certified.md").read_text()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_is_what_is_measured(row: Row) -> None:
    """Run `python docs/make_certified.py` if the table is out of date; a number beyond its bound is a fault."""
    if row.name == "LBFGS" and torch.__version__ >= (2, 14):
        pytest.skip("the table is made with torch 2.13, whose LBFGS has no switch")
    assert f"| {' | '.join(certified(row))} |" in PAGE.splitlines()


@pytest.mark.parametrize("row", [row for row in ROWS if row.proofs], ids=lambda row: row.name)
def test_sentences_of_a_row_have_tests(row: Row) -> None:
    """They are in the page, they exist, and beside them stand the class and each of its switches."""
    texts: list[str] = []
    for proof in row.proofs:
        assert f"- `{row.name}`: `{proof}`" in PAGE.splitlines()
        file, _, name = proof.partition("::")
        texts += [(Path(__file__).parent / file).read_text()]
        assert f"def {name}(" in texts[-1]
    assert row.name.lower() in "".join(texts).lower()
    if isinstance(row.units, str):
        # torch 2.14 has a switch more of LBFGS, which its own `optim_db` tries
        forms = [(f'"{flag}"', f"{flag}=", f'"optim_db, {flag}"') for flag in flags(row.name)]
        assert all(any(form in "".join(texts) for form in own) for own in forms)


def test_rows_without_a_measurement_name_their_tests() -> None:
    for row in ROWS:
        unmeasured = isinstance(row.units, str) or (isinstance(row.optax, str) and row.optax != "optax has none")
        assert bool(row.proofs) == unmeasured, row.name


def test_every_class_of_torch_has_a_row() -> None:
    names = {name for name in adapters.__all__ if hasattr(torch.optim, name)}
    assert {row.name for row in ROWS} == names
