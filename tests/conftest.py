"""Environment, threads and marks of all tests; the environment is set before Triton, JAX or torch is imported."""

import gc
import os
import shutil
from pathlib import Path


# kernels for a GPU, run by Triton's interpreter unless the environment says otherwise: see tests/cuda
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["JAX_ENABLE_X64"] = "1"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # programs of twenty steps take longer to compile than run
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes that import torch, each its own
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait leave the cores to other workers

from collections.abc import Generator, Iterator

import pytest
import torch
from hypothesis import settings

from _lib.compilers import restart
from _lib.interpreter import patch_once


collect_ignore = ["_lib"]  # no doctests, and much to import

torch.set_num_threads(1)  # a core for each worker; tests of kernels set their own
settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.load_profile("tests")
# kernels are compiled in less than half of the time; tests of numbers compile them as users do (fixture `optimized`)
QUICK_CC = Path(__file__).parent / "_lib" / "quick_cc"
if "CC" not in os.environ and shutil.which("cc") and os.access(QUICK_CC, os.X_OK):
    os.environ["CC"] = str(QUICK_CC)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Collects without the garbage collector, which then leaves the tests themselves, a million objects, alone."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="one case of each test, without the slow ones")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the cases that run in Triton's interpreter, by the backend that is their parameter; slow ones come first.

    A worker runs whole files, so a long one that comes last would run alone.
    """
    interpreted = False
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec and any(isinstance(x, str) and x == "triton" for x in callspec.params.values()):
            item.add_marker("triton")
            interpreted = True
    if interpreted:
        patch_once()
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if config.getoption("quick"):
        _keep_one_case_of_each(config, items)


def _keep_one_case_of_each(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out all cases of a test but the first, and tests with a mark."""
    functions: set[object] = set()
    kept, left_out = [], []
    for item in items:
        function = getattr(item, "function", item)
        quick = function not in functions and not any(map(item.get_closest_marker, ("slow", "triton", "integration")))
        (kept if quick else left_out).append(item)
        if quick:
            functions.add(function)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """Compiles kernels as users do: at the highest level of optimization."""
    if os.environ.get("CC") != str(QUICK_CC):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CC")
        restart()
        yield
    restart()
