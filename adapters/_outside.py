"""A step outside of a compiled graph. Imported while a compiler runs."""

from typing import Any

import torch


BREAK = (
    "a step of DTensors, of sparse gradients or with an extra argument that is no number is a graph break: operations "
    "are handed DTensors only if they can place their results, and sparse tensors and trees never"
)


def _run(optimizer: Any, extra: dict[str, Any], offered: frozenset[str]) -> None:
    optimizer._run(extra, offered)


run_outside = torch.compiler.disable(_run, reason=BREAK)  # type: ignore[no-untyped-call]
