"""Kernels past the front door of Triton's JIT, and what happens where Triton is missing or broken.

In a process of its own, for this one has Triton interpret kernels; with a stand-in for Triton's driver of the GPU.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import functional_optim as fo
from _lib.marks import INTERPRETER
from functional_optim._compiler.cache import BuildError
from functional_optim._compiler.passes import Signature
from functional_optim._compiler.triton import build
from functional_optim._runtime import backend, kernels
from functional_optim._runtime.cuda import launch


STAND_IN = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
import functional_optim as fo
from functional_optim._compiler.cache import BuildError
from functional_optim._runtime.cuda.loaded import ELEMENTS, UNIFORM, load_kernels
from functional_optim._runtime.cuda import driver as own

launched = []


class Utils:
    def load_binary(self, *arguments):
        return 1, 2, 40, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 200000}


class Launcher:
    def __init__(self, source, metadata):
        if "broken" in sys.argv:
            raise RuntimeError("Failed to find C compiler.\\nPlease specify via CC environment variable")
        self.name = metadata.name

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        launched.append((self.name, (x, y, z), stream, arguments, (launch_metadata, enter, leave)))


class Driver:
    utils, launcher_cls = Utils(), Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


driver.set_active(Driver())
tx, x = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-3)), torch.zeros(8)
(kernel,) = fo.explain(tx, x).kernels
"""
LAUNCHES = """
cpu = torch.device("cpu")
stages = load_kernels(kernel.signature, cpu, True)
assert load_kernels(kernel.signature, cpu, True) is stages, "one for each signature, device and variant"
assert load_kernels(kernel.signature, cpu, False) is not stages
front_door, JITFunction.run = JITFunction.run, None  # not to be called again
for stage in stages:
    for own, width, constants in ((stage.uniform, len(UNIFORM), ()), (stage.elements, len(ELEMENTS), (True,))):
        if own is not None:
            tensor = torch.zeros(2)  # by its address: Triton would ask for it, and the driver whose it is
            arguments = (tensor.data_ptr(), *range(1, width))
            own.bind(5, (tensor, *arguments[1:], *constants), 8)()
            name, grid, stream, given, hooks = launched.pop()
            assert hooks == (None, None, None), "each costs a call, and there are none"
            assert (grid, stream, given) == ((5, 1, 1), 8, arguments + constants), (name, grid, stream, given)
            print(name)
"""
BROKEN = """
try:
    load_kernels(kernel.signature, torch.device("cpu"), True)
except BuildError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("triton")
    own = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    own["PYTHONPATH"] = os.pathsep.join(sys.path)
    return own | {"TRITON_CACHE_DIR": f"{folder}/triton", "FUNCTIONAL_OPTIM_CACHE": f"{folder}/kernels"}


def run(text: str, environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-c", STAND_IN + text, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_kernels_are_launched_past_the_front_door(environment: dict[str, str]) -> None:
    assert run(LAUNCHES, environment).split() == ["pass_0", "uniform_1", "pass_1"]


@pytest.mark.slow
def test_a_launcher_that_cannot_be_compiled_is_an_error_of_the_build(environment: dict[str, str]) -> None:
    """So that the step takes another backend when it is bound."""
    message = run(BROKEN, environment, "broken")
    assert message == "Triton cannot build or load a kernel (RuntimeError: Failed to find C compiler.)\n"


@pytest.mark.usefixtures("nothing_given_up")
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


@pytest.mark.usefixtures("nothing_given_up")
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
def test_a_triton_that_is_broken_gives_way_to_foreach(environment: dict[str, str], tmp_path: Path) -> None:
    """It is there, but its import fails in another way than that of a package that is not."""
    (tmp_path / "triton.py").write_text("raise OSError('libtriton.so: cannot open shared object file')")
    own = {**environment, "PYTHONPATH": f"{tmp_path}{os.pathsep}{environment['PYTHONPATH']}", "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", STEP], env=own, capture_output=True, text=True, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if "UserWarning" in line]
    assert "and slower: Triton cannot be imported (libtriton.so: cannot open shared object file)." in warning


@pytest.mark.usefixtures("nothing_given_up")
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
@pytest.mark.usefixtures("nothing_given_up")
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
