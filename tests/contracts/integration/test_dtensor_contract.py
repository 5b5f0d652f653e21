"""Promises about DTensors on two and four processes; what they check is in `dtensor_contract_checks.py`."""

import pytest

from _lib.dtensor_checks import CHECKS
from _lib.processes import MARKS, results


pytestmark = MARKS


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return results(CHECKS, request.param, tmp_path_factory.mktemp)


@pytest.mark.parametrize("check", CHECKS)
def test_contract(check: str, found: dict[str, str]) -> None:
    assert not found[check], found[check]
