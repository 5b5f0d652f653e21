"""The uniform values of each leaf: which are kept for elements and for later stages, in which form, and where.

They are computed by a uniform kernel, once for a leaf, and written to memory that passes load them from.
"""

import functools
from typing import NamedTuple

from ..passes import Pass, Signature, plan, plan_prologues
from ..program import Level


# operations of an element and a number that follows from a reduction, which is out of the element's range or has more
# digits: two numbers in that range, by which two operations give as many digits as one in double precision
HALVES = {"mul": ("near", "far"), "div": ("near", "far"), "add": ("high", "low"), "sub": ("high", "low")}
# operations with the same result whether the number is rounded before or after
CHOICES = {"where", "maximum", "minimum", "copysign", "broadcast", "real"}


def has_uniform(signature: Signature, number: int) -> bool:
    """Whether a stage has a uniform kernel."""
    return bool(plan_prologues(signature)[number].new or numbers(signature, number))


def has_elements(signature: Signature, number: int) -> bool:
    """Whether a stage has a pass over elements."""
    p = plan(signature)[number]
    stores = [k for k in p.stores if signature.program.outputs[k].level is Level.ELEMENT]
    return bool(p.reductions or stores)


class Entry(NamedTuple):
    """A uniform value in one form.

    Args:
      kind: `"double"`, `"single"` (in the dtype of the elements), or a half of one (see `HALVES`).
      value: the uniform value.
    """

    kind: str
    value: int


@functools.lru_cache(maxsize=512)
def uniforms_of(signature: Signature) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """The entries of a leaf: those in double precision, which come first, and those in the dtype of the elements."""
    stages = range(len(plan(signature)))
    doubles = {i for k in stages if has_uniform(signature, k) for i in carried(signature, k)}
    singles: set[Entry] = set()
    for k in stages:
        own = entries_of(signature, plan(signature)[k])
        doubles |= {entry.value for entry in own if entry.kind == "double"}
        singles |= {entry for entry in own if entry.kind != "double"}
    return tuple(Entry("double", i) for i in sorted(doubles)), tuple(sorted(singles, key=lambda x: (x.value, x.kind)))


def uniform_words(signature: Signature) -> int:
    """The size of the entries of a leaf in words of 8 bytes."""
    doubles, singles = uniforms_of(signature)
    return len(doubles) + -(-len(singles) * signature.compute.itemsize // 8)


def carried(signature: Signature, number: int) -> list[int]:
    """Uniform values that a uniform kernel needs and an earlier one computes."""
    values, new = signature.program.values, plan_prologues(signature)[number].new
    needed = {a for i in new if not values[i].reduction for a in values[i].args}
    needed |= {signature.program.outputs[k].value for k in numbers(signature, number)}
    return [i for i in sorted(needed) if i not in new and values[i].op != "const"]


def numbers(signature: Signature, number: int) -> list[int]:
    """Indices of the numbers per leaf that a stage writes."""
    outputs = signature.program.outputs
    return [k for k in plan(signature)[number].stores if outputs[k].level is Level.LEAF]


def entries_of(signature: Signature, p: Pass) -> list[Entry]:
    """The entries that a pass loads."""
    values, found = signature.program.values, set[Entry]()
    for i in p.body:
        kinds = kinds_of(signature, i)
        found |= {Entry(x, a) for a in values[i].args if values[a].uniform and values[a].op != "const" for x in kinds}
    for i in p.wide:
        found |= {Entry("double", a) for a in values[i].args if values[a].uniform and values[a].op != "const"}
    for k in p.stores:
        i = signature.program.outputs[k].value
        if signature.program.outputs[k].level is Level.ELEMENT and values[i].uniform and values[i].op != "const":
            found.add(Entry("single", i))
    return sorted(found, key=lambda x: (x.value, x.kind))


def kinds_of(signature: Signature, i: int) -> tuple[str, ...]:
    """The kinds of entries in which an element's value takes uniform operands."""
    op = signature.program.values[i].op
    if i not in signature.rounded or op in CHOICES:
        return ("single",)
    return HALVES.get(op, ("double",))
