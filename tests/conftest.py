"""Environment, threads and marks of all tests; the environment is set before Triton, JAX or torch is imported."""

import gc
import os


# kernels for a GPU, run by Triton's interpreter unless the environment says otherwise: see tests/cuda
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["JAX_ENABLE_X64"] = "1"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # programs of twenty steps take longer to compile than run
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait leave the cores to other workers

from collections.abc import Generator

import pytest
import torch
from hypothesis import settings


collect_ignore = ["_lib"]  # no doctests, and much to import

torch.set_num_threads(1)  # a core for each worker; tests of kernels set their own
settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.load_profile("tests")


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Collects without the garbage collector, which then leaves the tests themselves, a million objects, alone."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the cases that run in Triton's interpreter, by the backend that is their parameter; slow ones come first.

    A worker runs whole files, so a long one that comes last would run alone.
    """
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec and any(isinstance(x, str) and x == "triton" for x in callspec.params.values()):
            item.add_marker("triton")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
