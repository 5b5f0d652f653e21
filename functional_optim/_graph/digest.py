"""Digests of formulas: a compiled graph may hold them, and a cache of graphs on disk outlives their code.

A description names rules. Where a compiler looks into the step, and where it is asked for derivatives, the graph holds
their formulas, too. So a description says by digests which formulas they were: edited ones are another graph, and no
step is made of them in the place of others. Formulas of this package are an exception: another version of it is another
graph, but a description of a step that one version has exported is read by the next, with the formulas that it has.
"""

import functools
import hashlib
import itertools
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .._compiler.fuse import FusedRule, fuse
from .._compiler.rule import Rule
from .._schedules.traced import has_fixed_key
from .._transform import Declared, GradientTransformation


PROCESS_ID = uuid.uuid4().hex  # digest of code that only this process has
_PACKAGE = __name__.partition(".")[0]
_SERIALS: "WeakKeyDictionary[Rule, int]" = WeakKeyDictionary()  # of rules whose code only this process has
_COUNTER = itertools.count()


def digest_of(part: GradientTransformation) -> str:
    """The digest of the code of a transformation, empty for one of this package; see `digest_of_package`.

    Of a rule that is computed element by element it is one of the traced program. Other code refers to anything, so
    its digest is one of this process.

    Args:
      part: a rule, or a transformation that can only be called.
    """
    bound = part._bound
    if bound is None:
        return "" if isinstance(part, Declared) and _is_own(part.factory, part.arguments) else PROCESS_ID
    if _is_own(bound.rule.fn, bound.values):
        return ""
    here = f"{PROCESS_ID} {_SERIALS.setdefault(bound.rule, next(_COUNTER))}"
    if bound.rule.whole:
        return here
    recipe = fuse([FusedRule(0, 0, bound, entered="entered" if bound.rule.wraps else None)], apply=False)
    numbers = [(x.name, x.value if isinstance(x.value, (int, float)) else None) for x in recipe.scalars]
    captured = any(x.name.startswith("captured.") for x in recipe.scalars)  # a tensor that the rule refers to
    text = f"{recipe.program}\n{numbers}"
    return here if recipe.host_schedules or captured else f"program {hashlib.sha256(text.encode()).hexdigest()}"


def is_edited(part: GradientTransformation, digest: str) -> bool:
    """Whether the code of a transformation is not that of a digest, as far as one can tell.

    A digest of another process cannot be compared.
    """
    comparable = not digest or digest.startswith(("program ", PROCESS_ID))
    return comparable and digest_of(part) != digest


def _is_own(fn: Callable[..., Any], arguments: Mapping[str, Any]) -> bool:
    """Whether a function and its callable arguments are of this package."""
    given = [x for x in arguments.values() if callable(x) and not isinstance(x, torch.Tensor)]
    return fn.__module__.partition(".")[0] == _PACKAGE and all(map(has_fixed_key, given))


@functools.cache
def digest_of_package() -> str:
    """The digest of the source of this package."""
    found = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        found.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return found.hexdigest() if Path(__file__).exists() else PROCESS_ID  # installed without its source
