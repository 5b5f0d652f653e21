"""The check of tensors in C, and in Python."""

from collections.abc import Iterator

import pytest
from functional_optim.kernels import native

from functional_optim._compiler.build import BuildError, load_c


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
