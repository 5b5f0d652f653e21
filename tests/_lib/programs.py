"""Programs bound to columns of tensors, without rules or trees around them."""

import contextlib
from collections.abc import Mapping, Sequence
from unittest import mock

import torch

from _lib.backends import only
from functional_optim._compiler.fuse import Recipe, ScalarSource
from functional_optim._compiler.program import Program
from functional_optim._compiler.rule import Option
from functional_optim._compiler.triton.build import interprets
from functional_optim._runtime import groups
from functional_optim._runtime.binding import Binding
from functional_optim._runtime.groups import Columns, Key, Leaf
from functional_optim._runtime.spec import specs_of
from functional_optim._runtime.step import BoundStep, Reading


def device_of(backend: str) -> torch.device:
    """The device of tensors that a backend computes: Triton's is a GPU, unless its interpreter runs kernels."""
    return torch.device("cuda" if backend == "triton" and not interprets() else "cpu")


def bind(program: Program, columns: Columns, in_place: bool = False, counters: Sequence[Key] = ()) -> BoundStep:
    """Binds a program to columns; each leaf has a row of the scalar table.

    Args:
      program: the program.
      columns: a tensor per leaf for `updates`, and for each input and output of the program.
      in_place: whether outputs are written to their columns.
      counters: columns of one counter, which a step in place moves on.
    """
    recipe = Recipe(program, tuple(ScalarSource("option", -1, name, Option(name)) for name in program.scalars), {}, {})
    leaves = [Leaf(k, recipe, ("leaf", k, False), x.numel(), None) for k, x in enumerate(columns["updates"])]
    specs = {key: specs_of(column) for key, column in columns.items()}
    paths = [f"p{k}" for k in range(len(leaves))]
    return BoundStep(Binding(leaves, specs, columns, paths, in_place, counters))


def run(step: BoundStep, columns: Columns, numbers: Mapping[str, Sequence[float]]) -> Columns:
    """Takes one step; returns the columns that change, none if it is in place.

    Args:
      step: the step.
      columns: its tensors.
      numbers: for each scalar of the program, a number per leaf.
    """
    reading = step.read(columns)
    assert isinstance(reading, Reading), reading
    options = [{name: x[k] for name, x in numbers.items()} for k in range(len(columns["updates"]))]
    return step.run(reading, columns, step.numbers(options, {}))


def run_program(
    backend: str,
    program: Program,
    columns: Columns,
    numbers: Mapping[str, Sequence[float]],
    compute: torch.dtype | None = None,
) -> Columns:
    """Binds a program and runs it once, on one backend.

    Args:
      backend: the backend.
      program: the program.
      columns: a tensor per leaf for `updates`, and for each input and output; outputs say their dtype and shape.
      numbers: for each scalar of the program, a number per leaf.
      compute: the dtype that elements are computed in. By default it follows from the columns; float32 shows numbers
        per leaf in double precision, stored as float64, beside elements that are not.
    """
    chosen = mock.patch.object(groups, "compute_dtype", return_value=compute)
    columns = {key: [x.to(device_of(backend)) for x in column] for key, column in columns.items()}
    with only(backend), chosen if compute else contextlib.nullcontext():
        step = bind(program, columns)
        assert compute in (None, *[group.signature.compute for group in step.groups])
        results = run(step, columns, numbers)
    return {key: [x.cpu() for x in column] for key, column in results.items()}
