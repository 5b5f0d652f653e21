"""Kernels by the CUDA driver's public C interface: machine code is loaded, and launched with prepared arguments."""

import contextlib
import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch

from ..._compiler.cache import BuildError
from ..._compiler.triton.cubin import Cubin
from ..library import library


NAME = "libcuda.so.1"
WARP = 32  # threads
SHARED = 48 << 10  # bytes of shared memory that a program may have unless a kernel asks for more
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # of `CUfunction_attribute`
ADDRESS, UNSIGNED = ctypes.c_void_p, ctypes.c_uint
FUNCTIONS = {
    "cuGetErrorName": (ctypes.c_int, ADDRESS),
    "cuGetErrorString": (ctypes.c_int, ADDRESS),
    "cuCtxGetCurrent": (ADDRESS,),
    "cuCtxSetCurrent": (ADDRESS,),
    "cuDeviceGet": (ADDRESS, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ADDRESS, ctypes.c_int),
    "cuModuleLoadData": (ADDRESS, ctypes.c_char_p),
    "cuModuleGetFunction": (ADDRESS, ADDRESS, ctypes.c_char_p),
    "cuFuncSetAttribute": (ADDRESS, ctypes.c_int, ctypes.c_int),
    "cuLaunchKernel": (ADDRESS, *[UNSIGNED] * 7, ADDRESS, ADDRESS, ADDRESS),
}


class DriverFunctions(ctypes.Structure):
    """`driver_t` of `pointers.c`: the functions of the driver that launches call, and the context of their device."""

    _fields_ = [(name, ADDRESS) for name in ("get_context", "set_context", "launch", "context")]


class KernelLaunch(ctypes.Structure):
    """`kernel_launch_t` of `pointers.c`."""

    _fields_ = [
        ("function", ADDRESS),
        *((name, UNSIGNED) for name in ("programs", "threads", "shared")),
        ("arguments", ADDRESS),
    ]


@functools.lru_cache(maxsize=1)
def libcuda() -> Any:
    """The driver, whose functions have their arguments declared.

    Raises:
      BuildError: there is none.
    """
    try:
        found = ctypes.CDLL(NAME)
        for name, arguments in FUNCTIONS.items():
            getattr(found, name).argtypes = arguments
    except (OSError, AttributeError) as error:
        raise BuildError(f"the CUDA driver cannot be used ({error})") from None
    return found


def call(name: str, *arguments: Any) -> None:
    """Calls a function of the driver.

    Raises:
      RuntimeError: it fails; the message has the driver's name of the error.
    """
    check(name, getattr(libcuda(), name)(*arguments))


def check(name: str, code: int) -> None:
    """Raises an error for the number that a function of the driver has returned.

    Raises:
      RuntimeError: the number is not 0.
    """
    if code:
        found = []
        for ask in (libcuda().cuGetErrorName, libcuda().cuGetErrorString):
            text = ctypes.c_char_p()
            ask(code, ctypes.byref(text))
            found.append((text.value or b"unknown").decode())
        raise RuntimeError(f"{name} of the CUDA driver has failed: {found[0]} ({code}), {found[1]}")


@functools.lru_cache(maxsize=64)
def primary_context(index: int) -> int:
    """The context of a device that torch works in. It is held as long as the process, as torch holds it."""
    device, context = ctypes.c_int(), ADDRESS()
    call("cuDeviceGet", ctypes.byref(device), index)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context.value or 0


class CudaKernel:
    """A kernel that is loaded on a device.

    It stays there as long as the process, as those of torch do: graphs have its address, and the device may be at it.

    Args:
      cubin: its machine code.
      name: its name.
      warps: warps of a program.
      device: the device, which is the current one.

    Raises:
      BuildError: the driver does not load it.
    """

    def __init__(self, cubin: Cubin, name: str, warps: int, device: torch.device) -> None:
        module, function = ADDRESS(), ADDRESS()
        try:
            enter_context(primary_context(device.index))
            call("cuModuleLoadData", ctypes.byref(module), cubin.code)
            call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
            if cubin.shared > SHARED:
                call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_SIZE_BYTES, cubin.shared)
        except RuntimeError as error:
            raise BuildError(str(error)) from None
        self.function, self.threads, self.shared, self.spare = function, WARP * warps, cubin.shared, cubin.spare

    def bind(self, programs: int, arguments: Sequence[torch.Tensor | int]) -> "BoundKernel":
        """A launch of so many programs. Tensors among its arguments are for the caller to keep."""
        return BoundKernel(self, programs, arguments)


class BoundKernel:
    """A launch of a kernel with its arguments.

    Args:
      kernel: the kernel.
      programs: number of programs.
      arguments: addresses of tensors, and 32-bit integers.
    """

    def __init__(self, kernel: CudaKernel, programs: int, arguments: Sequence[torch.Tensor | int]) -> None:
        values = [ADDRESS(x.data_ptr()) if isinstance(x, torch.Tensor) else ctypes.c_int32(x) for x in arguments]
        values += [ADDRESS() for _ in range(kernel.spare)]
        self.kept = values, (ADDRESS * len(values))(*map(ctypes.addressof, values))
        place = ctypes.addressof(self.kept[1])
        self.struct = KernelLaunch(kernel.function, programs, kernel.threads, kernel.shared, place)


def enter_context(context: int) -> None:
    """Makes a context that of this thread, unless it has one, as after its first work on a device."""
    current = ADDRESS()
    call("cuCtxGetCurrent", ctypes.byref(current))
    if not current.value:
        call("cuCtxSetCurrent", context)


class KernelSequence:
    """Launches of kernels one after the other, each time that it is called.

    With a C compiler that is one call: no signal is handled by Python in between.

    Args:
      launches: the launches.
      device: their device, which is the current one where this is called.
      stream: the stream.
    """

    def __init__(self, launches: Sequence[BoundKernel], device: torch.device, stream: int) -> None:
        self.launches, self.stream, self.context = launches, stream, primary_context(device.index)
        cuda = libcuda()
        functions = [ctypes.cast(x, ADDRESS) for x in (cuda.cuCtxGetCurrent, cuda.cuCtxSetCurrent, cuda.cuLaunchKernel)]
        self.driver = DriverFunctions(*functions, self.context)
        self.structs = (KernelLaunch * len(launches))(*[x.struct for x in launches])
        self.arguments = ctypes.addressof(self.driver), stream, ctypes.addressof(self.structs), len(launches)
        self.run: Any = None
        with contextlib.suppress(BuildError):
            self.run = library().launch_kernels
            self.run.argtypes, self.run.restype = [ADDRESS, ADDRESS, ADDRESS, ctypes.c_int64], ctypes.c_int

    def __call__(self) -> None:
        if self.run is None:
            self._run_in_python()
            return
        code = self.run(*self.arguments)
        if code:
            check("a launch", code)

    def _run_in_python(self) -> None:
        enter_context(self.context)
        for s in self.structs:
            where = s.function, s.programs, 1, 1, s.threads, 1, 1, s.shared, self.stream
            call("cuLaunchKernel", *where, s.arguments, None)
