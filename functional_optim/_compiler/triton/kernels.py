"""Kernels of a program: the functions of an emitted module, with all that a launch has to know of each."""

import functools
from typing import Any, NamedTuple

from ..passes import Signature, plan
from .build import load_triton
from .emit import emit_triton, leaves_per_program
from .tuning import TUNED, UNIFORM_WARPS, kind_of
from .uniforms import has_elements, has_uniform, uniform_words


# no contraction of a product and a sum, which torch rounds twice, and denormals are kept
ARITHMETIC = {"enable_fp_fusion": False, "enable_reflect_ftz": False}


class TritonKernel(NamedTuple):
    """One kernel.

    Args:
      source: the text of the module that it is in.
      name: its name there.
      block: elements of a block of a pass, or leaves of a program of a uniform kernel.
      warps: warps of a program.
    """

    source: str
    name: str
    block: int
    warps: int

    @property
    def function(self) -> Any:
        """The kernel as Triton has it, which is imported for it.

        Raises:
          BuildError: there is no Triton.
        """
        return getattr(load_triton(self.source), self.name)

    @property
    def options(self) -> dict[str, Any]:
        """The options of its compilation."""
        return {"num_warps": self.warps, **ARITHMETIC}


class Stage(NamedTuple):
    """The kernels of one stage of a program, in order of their launches.

    Args:
      uniform: computes what is the same for all elements of a leaf; None if there is nothing new.
      elements: the pass over elements; None if there is nothing to read or write.
      reduces: whether the pass leaves partial results, one for each chunk.
    """

    uniform: TritonKernel | None
    elements: TritonKernel | None
    reduces: bool


class Kernels(NamedTuple):
    """All kernels of a program.

    Args:
      stages: the kernels of each stage.
      uniform_words: the size of a leaf's uniform values, in words of 8 bytes.
    """

    stages: tuple[Stage, ...]
    uniform_words: int


@functools.lru_cache(maxsize=512)
def triton_kernels(signature: Signature) -> Kernels:
    """The kernels of a program in Triton, as text."""
    source = emit_triton(signature)
    stages = []
    for k, p in enumerate(plan(signature)):
        uniform = elements = None
        if has_uniform(signature, k):
            uniform = TritonKernel(source, f"uniform_{k}", leaves_per_program(signature, k), UNIFORM_WARPS)
        if has_elements(signature, k):
            tuning = TUNED[kind_of(signature, p)]
            elements = TritonKernel(source, f"pass_{k}", tuning.block, tuning.warps)
        stages.append(Stage(uniform, elements, bool(p.reductions)))
    return Kernels(tuple(stages), uniform_words(signature))
