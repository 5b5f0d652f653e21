"""FSDP2, DDP, ZeRO and FSDP1 on two processes; what they check is in `process_checks.py`."""

import pytest
from process_checks import CHECKS, WORLD
from processes import MARKS, results


pytestmark = MARKS


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return results(CHECKS, WORLD, tmp_path_factory.mktemp)


@pytest.mark.parametrize("check", CHECKS)
def test_processes(check: str, found: dict[str, str]) -> None:
    assert not found[check], found[check]
