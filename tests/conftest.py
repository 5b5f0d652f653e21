"""Set up before anything imports Triton or JAX."""

import os
from collections.abc import Iterator


os.environ["TRITON_INTERPRET"] = "1"  # kernels for a GPU, run by Triton's interpreter

import jax
import pytest
import torch

from functional_optim._compiler.c.build import BuildError, load_c
from functional_optim.kernels import native


jax.config.update("jax_enable_x64", True)
torch.set_num_threads(2)


@pytest.fixture
def in_python() -> Iterator[None]:
    """What can be asked in C is asked from Python, until a kernel is compiled."""
    before = list(native.loaded)
    native.loaded.clear()
    yield
    native.loaded[:] = before


@pytest.fixture
def in_c(in_python: None) -> None:
    """What can be asked in C is."""
    try:
        native.use(load_c(native.SOURCE))
    except BuildError:
        pytest.skip("no C compiler")
    assert native.loaded, "torch is not made as it is thought to be"


@pytest.fixture(params=["C", "Python"])
def either(request: pytest.FixtureRequest) -> None:
    """Each of both."""
    request.getfixturevalue("in_c" if request.param == "C" else "in_python")
