"""Kernels on disk, their launches, and steps where Triton is missing or broken.

In processes of their own, for this one has Triton interpret kernels, with a stand-in for the CUDA driver.
"""

import importlib.metadata
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol
from unittest import mock

import pytest
import torch

import functional_optim as fo
from _lib.compilers import COMPILER
from _lib.forking import Forking
from _lib.marks import INTERPRETER
from functional_optim._compiler.cache import BuildError
from functional_optim._compiler.passes import Signature
from functional_optim._compiler.triton import build, cubin
from functional_optim._runtime import backend, kernels
from functional_optim._runtime.cuda import launch


IMPORTS = """
import ctypes
import sys
import threading
from pathlib import Path

import torch

import functional_optim as fo
from functional_optim._compiler.cache import BuildError
from functional_optim._compiler.triton import cubin
from functional_optim._compiler.triton.emit import PARAMETERS, PASS, UNIFORM
from functional_optim._runtime.cuda.streams import CUDA
from functional_optim._runtime.cuda.loaded import load_kernels
"""
START = """
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda device: (9, 0)
signature, gpu, calls = SIGNATURE, torch.device("cuda", 0), Path(CALLS)
setenv = ctypes.CDLL(None).setenv
calls.unlink(missing_ok=True)


def taken():
    found = calls.read_text().splitlines() if calls.exists() else []
    calls.write_text("")
    return found


def bound(kernel, names, tensor):
    setenv(b"CUDA_SIZES", "".join("48"[PARAMETERS[name][0] == "*"] for name in names).encode() + b"88", 1)
    arguments = [tensor if PARAMETERS[name][0] == "*" else -k for k, name in enumerate(names)]
    own = [tensor.data_ptr() if x is tensor else x for x in arguments]
    return kernel.bind(5, arguments), " ".join(map(str, [*own, 0, 0]))
"""
SIGNATURE = """
import functional_optim as fo, torch

tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-3))
(kernel,) = fo.explain(tx, torch.zeros(8)).kernels
"""
LAUNCHES = """
tensor, names = torch.zeros(2), []
for stage in load_kernels(signature, gpu, True):
    for kernel, own, threads in ((stage.uniform, UNIFORM, 128), (stage.elements, PASS, 256)):
        if kernel is not None:
            names += [x.removeprefix("function ") for x in taken() if x.startswith("function")]
            launch, arguments = bound(kernel, own, tensor)
            CUDA.sequence([launch, launch], gpu, 7)()
            line = f"launch 0x9 (5 1 1) ({threads} 1 1) {kernel.shared} 0x7 (nil) in 0x10: {arguments}"
            assert taken() == [line] * 2, line
thread = threading.Thread(target=CUDA.sequence([launch], gpu, 7))
thread.start()
thread.join()
assert taken() == ["context 0x10", line], "a thread that has not used the device yet"
assert load_kernels(signature, gpu, True) is load_kernels(signature, gpu, True), "loaded once"
assert load_kernels(signature, gpu, False) is not load_kernels(signature, gpu, True)
print(*names, "triton" in sys.modules)
"""


@pytest.fixture(scope="module")
def signature(processes: Forking) -> str:
    """A program with two stages, as text that Python evaluates."""
    done = processes.run(SIGNATURE + "import pickle; print(pickle.dumps(kernel.signature))")
    assert done.exit_code == 0, done.err
    return f"__import__('pickle').loads({done.out.strip()})"


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the stand-in for the CUDA driver writes its calls to."""
    return tmp_path_factory.mktemp("triton") / "calls"


@pytest.fixture(scope="module")
def processes(calls: Path) -> Iterator[Forking]:
    """Processes with a stand-in for the CUDA driver, where Triton compiles; torch is imported once, Triton by each."""
    folder = calls.parent
    if COMPILER is None:
        pytest.skip("no C compiler")
    source = Path(__file__).parents[2] / "_lib" / "libcuda.c"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-w", str(source), "-o", f"{folder}/libcuda.so.1"], check=True)
    own = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    own |= {"TRITON_CACHE_DIR": f"{folder}/triton", "FUNCTIONAL_OPTIM_CACHE": f"{folder}/kernels"}
    own |= {"PYTHONPATH": os.pathsep.join(sys.path), "LD_LIBRARY_PATH": str(folder)}
    forking = Forking(IMPORTS, own | {"CUDA_CALLS": str(calls)})
    yield forking
    forking.close()


class Run(Protocol):
    """The text that a program writes, which must not fail."""

    def __call__(self, text: str, **variables: str) -> str: ...


@pytest.fixture
def run(processes: Forking, signature: str, calls: Path) -> Run:
    start = IMPORTS + START.replace("SIGNATURE", signature).replace("CALLS", repr(str(calls)))

    def started(text: str, **variables: str) -> str:
        done = processes.run(start + text, **variables)
        assert done.exit_code == 0, done.err
        return done.out

    return started


NAMES = "pass_0 uniform_1 pass_1"


@pytest.mark.slow
def test_kernels_on_disk_are_launched_without_triton(run: Run, tmp_path: Path) -> None:
    """The process that compiles imports it, those after that do not, with a C compiler or without one."""
    own = {"FUNCTIONAL_OPTIM_CACHE": str(tmp_path / "kernels")}
    assert run(LAUNCHES, **own) == f"{NAMES} True\n"
    cubins = sorted((tmp_path / "kernels").glob("*.cubin"))
    assert len(cubins) == 5, "a uniform kernel has one variant, a pass two"
    assert run(LAUNCHES, **own) == f"{NAMES} False\n"
    without = "from functional_optim._runtime.cuda import libcuda\ndef no(): raise BuildError('no')\n"
    assert run(f"{without}libcuda.library = no\n{LAUNCHES}", **own) == f"{NAMES} False\n"
    cubins[0].write_bytes(cubins[0].read_bytes()[:-100])  # as of a disk that was full
    assert run(LAUNCHES, **own) == f"{NAMES} True\n"
    assert run(LAUNCHES, **own) == f"{NAMES} False\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "setenv(b'CUDA_FAILS', b'cuModuleLoadData', 1)",
            "cuModuleLoadData of the CUDA driver has failed: CUDA_ERROR_OF_A_TEST (718), an error of a test",
        ),
        (
            "import triton; triton.compile = lambda *_, **__: 1 / 0; cubin._version = lambda: 'none'",
            "Triton cannot build a kernel (ZeroDivisionError: division by zero)",
        ),
        (
            "cubin._version = lambda: '1'; cubin.compile_kernel = lambda wanted: object()",
            "Triton 1 describes kernels in another way than is known here ('object' object has no attribute 'asm')",
        ),
        (
            "cubin._parameters_of, cubin._version = lambda ptx: 3, lambda: '0'",
            "Triton 0 has compiled a kernel that wants more than it was given",
        ),
        (
            "from functional_optim._runtime.cuda import libcuda; libcuda.NAME = 'libcuda.so.0'",
            "the CUDA driver cannot be used (libcuda.so.0: cannot open shared object file: No such file or directory)",
        ),
    ],
)
def test_a_kernel_that_cannot_be_had_is_an_error_of_the_build(change: str, message: str, run: Run) -> None:
    """So that the step takes another backend when it is bound."""
    text = f"{change}\ntry:\n    load_kernels(signature, gpu, True)\nexcept BuildError as error:\n    print(error)"
    assert run(text) == f"{message}\n"


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [True, False])
def test_a_launch_that_fails_is_an_error(compiler: bool, run: Run) -> None:
    """No launch follows it."""
    text = """
from functional_optim._runtime.cuda import libcuda

def no():
    raise BuildError("no")

libcuda.library = libcuda.library if COMPILER else no
launch, _ = bound(load_kernels(signature, gpu, True)[0].elements, PASS, torch.zeros(2))
sequence = CUDA.sequence([launch, launch], gpu, 7)
setenv(b"CUDA_FAILS", b"cuLaunchKernel", 1)
taken()
try:
    sequence()
except RuntimeError as error:
    print(error, len(taken()))
""".replace("COMPILER", str(compiler))
    name = "a launch" if compiler else "cuLaunchKernel"
    message = f"{name} of the CUDA driver has failed: CUDA_ERROR_OF_A_TEST (718), an error of a test"
    assert run(text) == f"{message} 1\n"


@pytest.mark.slow
def test_a_program_with_more_shared_memory_asks_for_it(run: Run) -> None:
    text = """
from functional_optim._runtime.cuda.libcuda import CudaKernel

for shared in (48 << 10, 49 << 10):
    CudaKernel(cubin.Cubin(b"\\x7fELF", shared, 2), "f", 4, gpu)
print([x for x in taken() if "attribute" in x])
"""
    assert run(text) == "['attribute 8 of 0x9 is 50176']\n"


def test_triton_is_looked_for_and_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub in its place is none."""
    has_triton = backend._has_triton.__wrapped__
    assert has_triton()
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    assert not has_triton()


def test_a_module_that_is_not_triton_is_an_error_of_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    missing = mock.Mock(side_effect=importlib.metadata.PackageNotFoundError)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(BuildError, match=r"Triton cannot be imported .*__version__"):
        cubin._version.__wrapped__()


def test_settings_of_triton_are_part_of_the_name_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cubin._settings()
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert cubin._settings() == before
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    assert cubin._settings() == sorted([*before, ("DISABLE_PTXAS_OPT", "1")])


@pytest.mark.usefixtures("all_enabled")
def test_without_triton_a_gpu_has_foreach_and_one_warning() -> None:
    with mock.patch.object(backend, "_has_triton", return_value=False):
        with pytest.warns(UserWarning, match="without generated kernels, and slower: Triton is not installed"):
            assert backend.choose_backend(torch.device("cuda", 0)) == ("foreach", "Triton is not installed")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert backend.choose_backend(torch.device("cuda", 0)) == ("foreach", "Triton is not installed")


@pytest.mark.parametrize("spelling", ["1", "true", "TRUE", "On", "yes", "y", "0", "", "off", "no", "t", "2", " 1"])
def test_the_interpreter_is_chosen_where_triton_chooses_it(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setenv("TRITON_INTERPRET", spelling)
    assert build.interprets() == triton.knobs.runtime.interpret


@pytest.mark.usefixtures("all_enabled")
def test_the_interpreter_reads_no_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses in a kernel's tables are those of the device; the CPU still has the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.warns(UserWarning, match="slower: TRITON_INTERPRET is set, and the interpreter reads no memory of"):
        assert backend.choose_backend(torch.device("cuda", 0))[0] == "foreach"
    with fo.use_backend("triton"):
        assert backend.choose_backend(torch.device("cpu")) == ("triton", "")
        with pytest.raises(RuntimeError, match="cannot compute the leaf on cuda:0: TRITON_INTERPRET is set"):
            backend.choose_backend(torch.device("cuda", 0))


STEP = """
import torch
import functional_optim as fo

tx, params = fo.adamw(0.1), {"w": torch.ones(3)}
with fo.use_backend("triton"):
    for _ in range(2):
        fo.apply_gradients(tx, params, params, tx.init(params))
"""


@pytest.mark.slow
def test_a_triton_that_is_broken_gives_way_to_foreach(processes: Forking, tmp_path: Path) -> None:
    """It is there, but its import fails in another way than that of a package that is not."""
    (tmp_path / "triton.py").write_text("raise OSError('libtriton.so: cannot open shared object file')")
    found_first = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    done = processes.run(found_first + STEP, TRITON_INTERPRET="1")
    assert done.exit_code == 0, done.err
    (warning,) = [line for line in done.err.splitlines() if "UserWarning" in line]
    assert "and slower: Triton cannot be imported (libtriton.so: cannot open shared object file)." in warning


@pytest.mark.usefixtures("all_enabled")
def test_kernels_that_cannot_be_loaded_give_way_to_foreach() -> None:
    """The step is taken nevertheless, and the next one does not try again."""
    tx, params, grads = fo.adamw(0.1), {"w": torch.ones(3)}, {"w": torch.full((3,), 0.5)}
    with fo.use_backend("reference"):
        expected, _ = fo.apply_gradients(tx, params, grads, tx.init(params))
    broken = mock.Mock(side_effect=BuildError("Triton cannot build or load a kernel"))
    with mock.patch.object(kernels, "load_kernels", broken), fo.use_backend("triton"):
        with pytest.warns(UserWarning, match="and slower: Triton cannot build or load a kernel"):
            actual, _ = fo.apply_gradients(tx, params, grads, tx.init(params))
        torch.testing.assert_close(actual, expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fo.apply_gradients(fo.adamw(0.1), params, grads, tx.init(params))
    assert broken.call_count == 1


def shifted(x: torch.Tensor) -> torch.Tensor:
    """The same values, one element behind a multiple of 16 bytes."""
    return x.new_empty(x.numel() + 1).as_strided(x.shape, x.stride(), 1).copy_(x)


@INTERPRETER
@pytest.mark.usefixtures("all_enabled")
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("packs", [False, True])
def test_a_variant_that_cannot_be_built_gives_way_to_foreach(packs: bool, donate: bool) -> None:
    """The one for addresses that are not aligned is built when such come; that step is taken by foreach, all later."""
    load, tries = launch.load_kernels, list[Signature]()

    def loads(signature: Signature, device: torch.device, aligned: bool) -> Any:
        if not aligned:
            tries.append(signature)
            raise BuildError("Triton cannot build or load a kernel")
        return load(signature, device, aligned)

    def run(name: str) -> Any:
        tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1))
        tree = {"w": torch.linspace(-1, 1, 12).reshape(4, 3).t(), "b": torch.ones(5)}
        params = fo.pack(tree) if packs else tree
        state = tx.init(params)
        with fo.use_backend(name):
            for step in range(3):
                values = {k: (step + 1) * x.square() + 0.5 for k, x in tree.items()}
                grads = fo.pack(values) if packs else values
                if step:
                    grads = grads.map(shifted) if packs else {k: shifted(x) for k, x in grads.items()}
                params, state = fo.apply_gradients(tx, params, grads, state, donate=donate)
        return fo.unpack(params) if packs else params

    expected = run("foreach")
    with mock.patch.object(launch, "load_kernels", loads), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", UserWarning)
        actual = run("triton")
    assert len(tries) == 1
    assert ["cannot build or load" in str(x.message) for x in seen if x.category is UserWarning] == [True]
    torch.testing.assert_close(actual, expected)
