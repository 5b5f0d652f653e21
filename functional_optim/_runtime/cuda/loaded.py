"""Kernels of a group: machine code that is loaded on a device, or functions that Triton's interpreter runs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from ..._compiler.passes import Signature
from ..._compiler.triton.build import interprets
from ..._compiler.triton.cubin import compile_cubin
from ..._compiler.triton.kernels import TritonKernel, triton_kernels
from .libcuda import CudaKernel
from .streams import streams_of


class LoadedKernel(Protocol):
    """A kernel on a device."""

    def bind(self, programs: int, arguments: Sequence[torch.Tensor | int]) -> Any:
        """A launch of so many programs, for `Streams.sequence`. Tensors among its arguments are for the caller to keep.

        Args:
          programs: number of programs.
          arguments: its arguments but for `ALIGNED`.
        """


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
      BuildError: Triton is missing, or does not compile a kernel; or the driver does not load it.
    """
    with streams_of(device).guard(device):
        return tuple(
            Loaded(
                None if stage.uniform is None else _load(stage.uniform, device, None),
                None if stage.elements is None else _load(stage.elements, device, aligned),
            )
            for stage in triton_kernels(signature).stages
        )


def _load(kernel: TritonKernel, device: torch.device, aligned: bool | None) -> LoadedKernel:
    if interprets():
        return _Interpreted(kernel, {} if aligned is None else {"ALIGNED": aligned})
    major, minor = torch.cuda.get_device_capability(device)
    return CudaKernel(compile_cubin(kernel, aligned, 10 * major + minor), kernel.name, kernel.warps, device)


class _Interpreted:
    """A kernel that Triton's interpreter runs."""

    def __init__(self, kernel: TritonKernel, constants: dict[str, bool]) -> None:
        self.function, self.constants = kernel.function, constants

    def bind(self, programs: int, arguments: Sequence[torch.Tensor | int]) -> Callable[[], object]:
        return functools.partial(self.function[(programs, 1, 1)], *arguments, **self.constants)
