"""A device that is stood in for; backends that are tried anew."""

from collections.abc import Iterator

import pytest

import functional_optim as fo
from _lib.stand_in import StandIn, stand_in
from functional_optim._runtime import backend
from functional_optim._runtime.cuda import capture


@pytest.fixture
def device() -> Iterator[StandIn]:
    with stand_in() as device, fo.use_backend("triton"):
        yield device
    capture.PROCESS.clear()


@pytest.fixture
def all_enabled() -> Iterator[None]:
    backend.enable_backends()
    yield
    backend.enable_backends()
