"""Choice of one backend, and no other."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import functional_optim as fo
from functional_optim._runtime.backend import BACKENDS
from functional_optim._runtime.step import BoundStep


STEPS = 3
OTHERS = [name for name in BACKENDS if name != "reference"]


@contextlib.contextmanager
def only(backend: str) -> Iterator[None]:
    """Uses a backend and refuses to fall back to another."""
    build = BoundStep._build_backends

    def chosen(self: BoundStep) -> Any:
        parts = build(self)
        assert {name for name, _ in parts} <= {backend}, f"{backend} does not run"
        return parts

    with fo.use_backend(backend), mock.patch.object(BoundStep, "_build_backends", chosen):
        yield
