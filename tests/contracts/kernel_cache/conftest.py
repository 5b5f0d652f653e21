"""A kernel cache of its own for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from _lib.compilers import Compiler, restart


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This process as if it had just started, with a cache that does not exist yet."""
    monkeypatch.setenv("FUNCTIONAL_OPTIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("CC", raising=False)
    restart()
    yield tmp_path / "cache"
    restart()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """A compiler that works, and notes its calls."""
    made = Compiler(tmp_path)
    monkeypatch.setenv("CC", str(made.path))
    return made
