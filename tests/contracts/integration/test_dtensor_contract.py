"""Promises about DTensors, which several processes check together; what they check is in `_lib/dtensor_checks.py`."""

import pytest

from _lib.dtensor_checks import CHECKS, COMPILED
from _lib.processes import MARKS, results


pytestmark = MARKS


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The findings of four processes, whose meshes have two and four, and of two."""
    return results(CHECKS, 4, tmp_path_factory.mktemp) | results(COMPILED, 2, tmp_path_factory.mktemp)


@pytest.mark.parametrize("check", CHECKS | COMPILED)
def test_contract(check: str, found: dict[str, str]) -> None:
    assert not found[check], found[check]
