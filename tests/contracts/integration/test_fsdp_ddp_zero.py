"""FSDP2, DDP, ZeRO and FSDP1 on two processes; the checks are in `_lib/processes.py`."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from _lib.processes import CHECKS, WORLD, run


pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What processes found, by check: nothing, or what went wrong. They are started once, and after each failure."""
    results: dict[str, str] = {}
    while len(results) < len(CHECKS):
        folder: Path = tmp_path_factory.mktemp("processes")
        remaining = [name for name in CHECKS if name not in results]
        message = ""
        try:
            mp.spawn(run, args=(remaining, folder), nprocs=WORLD)  # type: ignore[no-untyped-call]
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            message = str(error)
        for name in remaining:
            texts = [p.read_text() for p in sorted((folder / name).glob("found_*.txt"))]
            failed = "\n".join(filter(None, texts))
            if failed or len(texts) < WORLD:
                results[name] = failed or message or "a process ended without a word"
                break
            results[name] = ""
    return results


@pytest.mark.parametrize("check", CHECKS)
def test_processes(check: str, found: dict[str, str]) -> None:
    assert not found[check], found[check]
