"""Passes over memory: which values are computed, reduced, loaded and stored in each.

A program with `n` reductions behind one another takes `n + 1` passes. A value that two passes need is computed
twice, unless it has been stored in the meantime: a stored value may be loaded again instead, and then the inputs
it came from need not be read twice. Whether stores move to the earliest pass or wait for the last is decided by
counting bytes.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from .program import Level, Program


@dataclass(frozen=True)
class Signature:
    """Signature of a kernel: a program, and how each of its arrays is stored.

    Args:
      program: the program.
      inputs: storage dtypes of `program.arrays` and `program.leaves`, in order.
      outputs: storage dtypes of `program.outputs`, in order.
      compute: dtype that elements are computed in, float32 or float64.
    """

    program: Program
    inputs: tuple[torch.dtype, ...]
    outputs: tuple[torch.dtype, ...]
    compute: torch.dtype

    @cached_property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Storage dtype of each input."""
        return dict(zip((*self.program.arrays, *self.program.leaves), self.inputs, strict=True))

    @cached_property
    def wide(self) -> frozenset[int]:
        """Elements that are computed in a wider dtype than the others; see `program`."""
        return self.program.wide if self.compute is torch.float32 else frozenset()

    @cached_property
    def rounded(self) -> frozenset[int]:
        """Elements that are computed in a wider dtype and rounded."""
        return self.program.rounded if self.compute is torch.float32 else frozenset()


@dataclass(frozen=True)
class Pass:
    """One pass over memory.

    Args:
      uniforms: uniform values that it needs, in order of computation.
      inputs: array values to load, by index.
      reloads: values to load from where an earlier pass stored them: (value, index of the output).
      body: values to compute per element, in order.
      wide: values to compute per element in double precision, in order; they may need those of the body.
      reductions: reductions to accumulate, by index.
      stores: indices of the outputs to write.
    """

    uniforms: tuple[int, ...]
    inputs: tuple[int, ...]
    reloads: tuple[tuple[int, int], ...]
    body: tuple[int, ...]
    wide: tuple[int, ...]
    reductions: tuple[int, ...]
    stores: tuple[int, ...]


@functools.lru_cache(maxsize=512)
def plan(signature: Signature) -> tuple[Pass, ...]:
    """Splits a program into the passes that move the fewest bytes."""
    program = signature.program
    last = program.stages - 1
    early = {
        program.outputs[k].value: k
        for k in reversed(range(len(program.outputs)))
        if program.outputs[k].level is Level.ELEMENT
        and not program.values[program.outputs[k].value].uniform
        and program.values[program.outputs[k].value].op != "array"
        and program.values[program.outputs[k].value].stage < last
    }
    # a narrower store rounds, and a later pass would read the rounded value
    exact = frozenset(k for k, dtype in enumerate(signature.outputs) if dtype == signature.compute)
    late = _schedule(signature, {}, exact)
    if not early:
        return late
    eager = _schedule(signature, early, exact)
    return min(late, eager, key=lambda passes: sum(_bytes(signature, passes)))


class Prologue(NamedTuple):
    """Uniform values of a pass, which are computed before its elements; constants are in none of these.

    Args:
      new: values that no earlier pass has computed, in order.
      used: values that its elements and stores need.
      carried: values that this pass or an earlier one computes and a later one needs.
    """

    new: tuple[int, ...]
    used: tuple[int, ...]
    carried: tuple[int, ...]


@functools.lru_cache(maxsize=512)
def plan_prologues(signature: Signature) -> tuple[Prologue, ...]:
    """The uniform values that each pass computes; each is computed in the first pass that needs it."""
    program = signature.program
    values = program.values
    new: list[list[int]] = []
    used: list[set[int]] = []
    known: set[int] = set()
    for p in plan(signature):
        new.append([i for i in p.uniforms if i not in known and values[i].op != "const"])
        needed = {a for i in (*p.body, *p.wide) for a in values[i].args} | {program.outputs[k].value for k in p.stores}
        used.append({i for i in needed if values[i].uniform and values[i].op != "const"})
        known.update(new[-1])
    prologues: list[Prologue] = []
    later: set[int] = set()
    for own, needed in zip(reversed(new), reversed(used), strict=True):
        known.difference_update(() if not prologues else prologues[-1].new)
        prologues.append(Prologue(tuple(own), tuple(sorted(needed)), tuple(sorted(known & later))))
        later |= needed | {a for i in own if not values[i].reduction for a in values[i].args}
    return tuple(reversed(prologues))


def read_bytes(signature: Signature) -> int:
    """Bytes read per element, over all passes."""
    return _bytes(signature, plan(signature))[0]


def written_bytes(signature: Signature) -> int:
    """Bytes written per element, over all passes."""
    return _bytes(signature, plan(signature))[1]


def _bytes(signature: Signature, passes: Iterable[Pass]) -> tuple[int, int]:
    """Bytes read and written per element."""
    values = signature.program.values
    read = written = 0
    for p in passes:
        read += sum(signature.dtypes[values[i].name].itemsize for i in p.inputs)
        read += sum(signature.outputs[k].itemsize for _, k in p.reloads)
        written += sum(
            signature.outputs[k].itemsize for k in p.stores if signature.program.outputs[k].level is Level.ELEMENT
        )
    return read, written


def _schedule(signature: Signature, early: Mapping[int, int], exact: frozenset[int]) -> tuple[Pass, ...]:
    """Lays out the passes with the outputs in `early` (value -> output) stored as soon as they are known.

    Those in `exact` may be loaded again.

    A store may overwrite the input of the same name, so an early store is given up if a later pass still needs
    that input.
    """
    program, wide = signature.program, signature.wide
    values, outputs, last = program.values, program.outputs, program.stages - 1
    stored_in = {k: (values[o.value].stage if early.get(o.value) == k else last) for k, o in enumerate(outputs)}
    passes = []
    for stage in range(last + 1):
        reductions = [i for i in program.reductions if values[i].stage == stage + 1]
        stores = [k for k in stored_in if stored_in[k] == stage]
        stack = [(values[i].args[0], values[i].args[0] in wide) for i in reductions]
        stack += [(outputs[k].value, False) for k in stores]
        seen: set[int] = set()
        widened: set[int] = set()
        reloads: dict[int, int] = {}
        while stack:
            i, as_wide = stack.pop()
            done = widened if as_wide else seen
            if i in done:
                continue
            done.add(i)
            if not as_wide and early.get(i) in exact and stored_in[early[i]] < stage:
                reloads[i] = early[i]
            elif not values[i].reduction:
                stack.extend((a, as_wide and a in wide) for a in values[i].args)
        lost = {outputs[k].name: outputs[k].value for k in stored_in if stored_in[k] < stage}
        hazards = {lost[values[i].name] for i in seen if values[i].op == "array" and values[i].name in lost}
        if hazards:
            return _schedule(signature, {v: k for v, k in early.items() if v not in hazards}, exact)
        order = sorted(seen - set(reloads))
        passes.append(
            Pass(
                uniforms=tuple(i for i in order if values[i].uniform),
                inputs=tuple(i for i in order if values[i].op == "array"),
                reloads=tuple(sorted(reloads.items())),
                body=tuple(i for i in order if not values[i].uniform and values[i].op != "array"),
                wide=tuple(sorted(widened)),
                reductions=tuple(reductions),
                stores=tuple(stores),
            )
        )
    return tuple(passes)
