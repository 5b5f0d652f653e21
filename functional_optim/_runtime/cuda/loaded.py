"""Kernels that are compiled and loaded on a device, to be launched past the front door of Triton's JIT.

The front door looks at every argument at every call, which takes longer than the launch. There is nothing to be seen:
no kernel depends on an argument but `ALIGNED`. So each is compiled by `warmup`, once for a signature, a device and
that variant, and the launcher of what this returns is called from then on.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from ..._compiler.cache import BuildError
from ..._compiler.passes import Signature
from ..._compiler.triton.build import interprets
from ..._compiler.triton.kernels import TritonKernel, compile_triton
from .driver import driver_of


I32, I64, F64 = torch.int32, torch.int64, torch.float64
UNIFORM = (I64, I64, I64, I64, F64, F64, I64, 1, 1, 1)  # the dtypes and numbers of the arguments
ELEMENTS = (I32, I64, I64, F64, I64, I64, 1, 1, 1, 1)


Launch = Callable[[], object]


class LoadedKernel(Protocol):
    """A kernel on a device."""

    def bind(self, programs: int, arguments: Sequence[torch.Tensor | int], stream: int) -> Launch:
        """A launch of so many programs on a stream. Tensors among its arguments are for the caller to keep."""


class Loaded(NamedTuple):
    """The kernels of a stage.

    Args:
      uniform: the uniform kernel; None if there is none.
      elements: the pass over elements; None if there is none.
    """

    uniform: LoadedKernel | None
    elements: LoadedKernel | None


@functools.lru_cache(maxsize=1024)
def load_kernels(signature: Signature, device: torch.device, aligned: bool) -> tuple[Loaded, ...]:
    """The kernels of each stage on a device.

    Args:
      signature: the program and its dtypes.
      device: the device.
      aligned: the variant of passes over elements.

    Raises:
      BuildError: Triton is missing, or cannot compile, load or start a kernel.
    """
    with driver_of(device).guard(device):
        return tuple(
            Loaded(
                None if stage.uniform is None else _load(stage.uniform, UNIFORM, {}),
                None if stage.elements is None else _load(stage.elements, ELEMENTS, {"ALIGNED": aligned}),
            )
            for stage in compile_triton(signature).stages
        )


def _load(kernel: TritonKernel, arguments: tuple[Any, ...], constants: dict[str, Any]) -> LoadedKernel:
    """A kernel that is launched with its constants behind its other arguments."""
    if interprets():
        return _Interpreted(kernel, tuple(constants))
    try:
        compiled = kernel.function.warmup(*arguments, grid=(1,), **constants, **kernel.options)
        compiled[(1, 1, 1)]  # compiles the launcher and loads the kernel, so that a failure shows here
    except Exception as error:  # of a compiler, of a tool that is missing, of the driver
        first = next(iter(str(error).splitlines()), "")
        raise BuildError(f"Triton cannot build or load a kernel ({type(error).__name__}: {first:.200})") from error
    return _Compiled(compiled)


class _Compiled:
    """A kernel that Triton has compiled."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled

    def bind(self, programs: int, arguments: Sequence[torch.Tensor | int], stream: int) -> Launch:
        # addresses in place of tensors, each of which Triton would ask for its address, and the driver for its device
        plain = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]
        compiled, grid, no_hooks = self.compiled, (programs, 1, 1), (None, None, None)
        # as `compiled[grid]` does, but for hooks of Triton's own profiler, which cost half of a launch without any
        launch = (*grid, stream, compiled.function, compiled.packed_metadata, *no_hooks)
        return functools.partial(compiled.run, *launch, *plain)


class _Interpreted:
    """A kernel that Triton's interpreter runs."""

    def __init__(self, kernel: TritonKernel, names: tuple[str, ...]) -> None:
        self.kernel, self.names = kernel, names

    def bind(self, programs: int, arguments: Sequence[torch.Tensor | int], stream: int) -> Launch:
        n = len(arguments) - len(self.names)
        constants = dict(zip(self.names, arguments[n:], strict=True))
        launch = self.kernel.function[(programs, 1, 1)]
        return functools.partial(launch, *arguments[:n], **constants, **self.kernel.options)
