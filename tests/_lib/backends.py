"""Choice of one backend, and no other."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import functional_optim as fo
from functional_optim.kernels import BACKENDS


STEPS = 3
OTHERS = [name for name in BACKENDS if name != "reference"]


@contextlib.contextmanager
def only(backend: str) -> Iterator[None]:
    """Uses a backend and refuses to fall back to another."""

    def refuse(calls: Any) -> Any:
        raise AssertionError(f"{backend} did not run")

    others = {name: refuse for name in BACKENDS if name != backend}
    with fo.use_backend(backend), mock.patch.dict(BACKENDS, others):
        yield
