"""Digests of formulas: a compiled graph may hold them, and a cache of graphs on disk outlives their code.

A description names rules. Where a compiler looks into the step, and where it is asked for derivatives, the graph holds
their formulas, too. So a description says by a digest which formulas they were: edited ones are another graph.
"""

import functools
import hashlib
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .._compiler.fuse import Part, fuse
from .._compiler.rule import Bound
from .._schedules.traced import has_fixed_key
from .._transform import Declared, GradientTransformation


PROCESS = uuid.uuid4().hex  # digest of code that only this process has
_PACKAGE = __name__.partition(".")[0]


def digest_of(parts: Iterable[GradientTransformation]) -> str:
    """The digest of the code of transformations.

    Of a rule that is computed element by element it is the traced program; of this package, its source. Other code
    refers to anything, so its digest is one of this process.
    """
    return hashlib.sha256("\n".join([_source(), *map(_text, parts)]).encode()).hexdigest()


def _text(part: GradientTransformation) -> str:
    bound = getattr(part, "bound", None)
    if not isinstance(bound, Bound):
        return "" if isinstance(part, Declared) and _is_own(part.factory, part.arguments) else PROCESS
    if _is_own(bound.rule.fn, bound.values):
        return ""
    if bound.rule.whole:
        return PROCESS
    recipe = fuse([Part(0, 0, bound, entered="entered" if bound.rule.wraps else None)], apply=False)
    numbers = [(x.name, x.value if isinstance(x.value, (int, float)) else None) for x in recipe.scalars]
    captured = any(x.name.startswith("captured.") for x in recipe.scalars)  # a tensor that the rule refers to
    return PROCESS if recipe.hosts or captured else f"{recipe.program}\n{numbers}"


def _is_own(fn: Callable[..., Any], arguments: Mapping[str, Any]) -> bool:
    """Whether a function and its callable arguments are of this package."""
    given = [x for x in arguments.values() if callable(x) and not isinstance(x, torch.Tensor)]
    return fn.__module__.partition(".")[0] == _PACKAGE and all(map(has_fixed_key, given))


@functools.cache
def _source() -> str:
    """The digest of the source of this package."""
    found = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        found.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return found.hexdigest() if Path(__file__).exists() else PROCESS  # installed without its source
