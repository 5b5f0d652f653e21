"""From a kernel of Triton to machine code for a GPU, which stays on disk: a process that finds it imports no Triton.

A file `.cubin` is an ELF file, which NVIDIA's tools read, with two numbers that a launch needs behind it.
"""

import hashlib
import importlib.metadata
import os
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

from .. import cache
from ..cache import KernelCache, ToolError
from .emit import PARAMETERS, PASS, UNIFORM
from .kernels import TritonKernel


TRAILER = struct.Struct("=ii")  # behind the code in a file
SETTINGS = ("TRITON_", "PTXAS_", "DISABLE_", "LLVM_", "MLIR_")  # prefixes of variables that Triton compiles by
PLACES = ("TRITON_CACHE_", "TRITON_HOME", "TRITON_DUMP_")  # prefixes of its folders, which do not change the code


class Cubin(NamedTuple):
    """Machine code of a kernel.

    Args:
      code: an ELF file.
      shared: bytes of shared memory of a program.
      spare: number of pointers that a launch passes behind the arguments of the kernel, to memory that it does not use.
    """

    code: bytes
    shared: int
    spare: int


class Wanted(NamedTuple):
    """All that the machine code of a kernel depends on.

    Args:
      kernel: the kernel.
      aligned: the variant of a pass; None for a uniform kernel, which has one.
      architecture: the compute capability of the device, 90 for 9.0.
      version: the version of Triton.
    """

    kernel: TritonKernel
    aligned: bool | None
    architecture: int
    version: str


def compile_cubin(kernel: TritonKernel, aligned: bool | None, architecture: int) -> Cubin:
    """Compiles a kernel, or finds it compiled.

    Args:
      kernel: the kernel.
      aligned: the variant of a pass, by whether all addresses are multiples of 16 bytes; None for a uniform kernel.
      architecture: the compute capability of the device, 90 for 9.0.

    Raises:
      ToolError: Triton is missing, or does not compile it.
    """
    return _cubins.get(Wanted(kernel, aligned, architecture, _version()))


@cache.once
def _version() -> str:
    """The version of Triton, without importing it where it is an installed package."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # built in place, or from a package of another name
        try:
            import triton

            return str(triton.__version__)
        except Exception as error:  # it is broken, or another module of this name
            raise ToolError(f"Triton cannot be imported ({error})") from error


def _settings() -> list[tuple[str, str]]:
    """The variables of the environment that Triton may compile by."""
    return sorted((k, x) for k, x in os.environ.items() if k.startswith(SETTINGS) and not k.startswith(PLACES))


def _build(wanted: Wanted, folder: Path) -> Cubin:
    kernel = wanted.kernel
    of_kernel = (kernel.source, kernel.name, wanted.aligned, sorted(kernel.options.items()), sorted(PARAMETERS.items()))
    parts = (*of_kernel, *wanted[2:], _settings(), TRAILER.format)
    path = folder / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.cubin"
    content = cache.read_sealed(path)
    if content is None:
        made = _compile(wanted)
        cache.write_sealed(path, made.code + TRAILER.pack(made.shared, made.spare))
        return made
    return Cubin(content[: -TRAILER.size], *TRAILER.unpack(content[-TRAILER.size :]))


_cubins = KernelCache(_build)


def compile_kernel(wanted: Wanted) -> Any:
    """The kernel as Triton compiles it, with the text of each of its stages.

    Raises:
      ToolError: Triton is missing, or does not compile it.
    """
    function = wanted.kernel.function
    types = {name: PARAMETERS.get(name, "constexpr") for name in function.arg_names}
    constants = {} if wanted.aligned is None else {"ALIGNED": wanted.aligned}
    try:
        with cache.forks_wait():
            import triton
            from triton.backends.compiler import GPUTarget
            from triton.compiler import ASTSource
        source, target = ASTSource(function, types, constants), GPUTarget("cuda", wanted.architecture, 32)
        return triton.compile(source, target=target, options=wanted.kernel.options)
    except Exception as error:  # of a compiler, or of a tool that is missing
        first = next(iter(str(error).splitlines()), "")
        raise ToolError(f"Triton cannot build a kernel ({type(error).__name__}: {first:.200})") from error


def _compile(wanted: Wanted) -> Cubin:
    made = compile_kernel(wanted)
    try:
        code, ptx, metadata = made.asm["cubin"], made.asm["ptx"], made.metadata
        shared, scratch = metadata.shared, metadata.global_scratch_size or metadata.profile_scratch_size
    except (AttributeError, KeyError) as error:
        why = f"Triton {wanted.version} describes kernels in another way than is known here ({error})"
        raise ToolError(why) from None
    spare = _parameters_of(ptx) - len(UNIFORM if wanted.aligned is None else PASS)
    if spare < 0 or scratch:
        raise ToolError(f"Triton {wanted.version} has compiled a kernel that wants more than it was given")
    return Cubin(code, shared, spare)


def _parameters_of(ptx: str) -> int:
    """The number of parameters of the one kernel in a text of PTX."""
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    return entry[1].count(".param") if entry else -1
