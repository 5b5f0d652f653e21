"""FSDP2, DDP, ZeRO and FSDP1 on two processes; the checks are in `_lib/processes.py`."""

import pytest

from _lib.process_checks import CHECKS, WORLD
from _lib.processes import MARKS, results


pytestmark = MARKS


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return results(CHECKS, WORLD, tmp_path_factory.mktemp)


@pytest.mark.parametrize("check", CHECKS)
def test_processes(check: str, found: dict[str, str]) -> None:
    assert not found[check], found[check]
