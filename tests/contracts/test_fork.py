"""Processes that are forked while another thread builds a kernel, loads one, or has done so."""

import os
from pathlib import Path

import pytest

from _lib.processes import run_program


ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")]

# A thread is stopped within a function of the system that a build calls; then the process forks, and goes on. The
# child has a minute, in which it is to load the kernel that the thread was at, and another one.
PROGRAM = """
import ctypes, os, select, signal, subprocess, sys, tempfile, threading
sys.path.insert(0, ROOT)
from functional_optim._compiler.c.build import load_c
from functional_optim._compiler.triton.build import load_triton

parent = os.getpid()

def load(kind, k):
    if kind == "c":
        return load_c(f"int x = {k};").x is not None
    return load_triton(f"import triton, triton.language as tl\\nx = {k}\\n").x == k

def fork_within(kind, owner, name, first):
    started, go, loaded = threading.Event(), threading.Event(), []
    load(kind, first)
    if owner:
        module, thread = sys.modules[owner], threading.Thread(target=lambda: loaded.append(load(kind, first + 1)))
        function = getattr(module, name)
        def stopping(*args, **kwargs):
            if os.getpid() == parent and threading.current_thread() is thread:
                started.set()
                assert go.wait(60)
            return function(*args, **kwargs)
        setattr(module, name, stopping)
        thread.start()
        assert started.wait(60)
    child = os.fork()
    if not child:
        signal.alarm(60)
        assert all(load(kind, first + k) for k in range(3))
        sys.exit()
    status = os.waitpid(child, 0)[1]
    go.set()
    if owner:
        thread.join()
        assert loaded == [True]
        setattr(module, name, function)
    assert all(load(kind, first + k) for k in range(4))
    return status

for k, place in enumerate(sys.argv[1:]):
    print(place, fork_within(*place.split(","), 10 * k), flush=True)
"""


def run(program: str, folder: Path, *arguments: str, **environment: str) -> str:
    return run_program(program.replace("ROOT", repr(str(ROOT))), folder, arguments=arguments, environment=environment)


# places where a thread is: compiling, waiting for it, writing, renaming, loading; or nothing, when libraries are loaded
WITHIN = {
    "c": ["c,subprocess,Popen", "c,select,poll", "c,tempfile,mkstemp", "c,os,replace", "c,ctypes,CDLL", "c,,"],
    "triton": ["triton,tempfile,mkstemp", "triton,os,replace", "triton,,"],
}


@pytest.mark.parametrize("kind", WITHIN)
def test_a_child_does_not_wait_for_a_build_of_its_parent(kind: str, tmp_path: Path) -> None:
    out = run(PROGRAM, tmp_path, *WITHIN[kind], FUNCTIONAL_OPTIM_CACHE=str(tmp_path / "cache"))
    assert out.splitlines() == [f"{place} 0" for place in WITHIN[kind]]
    left = [x.name for x in (tmp_path / "cache").iterdir() if x.name.startswith(".")]
    assert left == []  # a child that ends does not remove what its parent is at, nor leaves something


HALF_IMPORTED = """
import os, signal, sys, threading
sys.path[:0] = [ROOT, sys.argv[1]]
from functional_optim._compiler.triton.build import load_triton

started, go = threading.Event(), threading.Event()
parent = os.getpid()

def wait():
    if os.getpid() == parent:
        started.set()
        assert go.wait(60)

sys.modules["pause"] = type(sys)("pause")
sys.modules["pause"].wait = wait
os.register_at_fork(before=go.set)  # the module goes on when the fork has begun
thread = threading.Thread(target=load_triton, args=("import slow\\nx = slow.x\\n",))
thread.start()
assert started.wait(60)
child = os.fork()
if not child:
    signal.alarm(60)
    assert load_triton("import slow\\nx = slow.x\\n").x == 1
    os._exit(0)
thread.join()
print(os.waitpid(child, 0)[1])
"""


def test_a_child_does_not_wait_for_a_module_that_its_parent_imports(tmp_path: Path) -> None:
    """Triton takes a second to be imported; what the module imports is locked until it is there."""
    (tmp_path / "slow.py").write_text("import pause\npause.wait()\nx = 1\n")

    assert run(HALF_IMPORTED, tmp_path, str(tmp_path), FUNCTIONAL_OPTIM_CACHE=str(tmp_path / "cache")) == "0\n"


TEMPORARY = """
import os, sys
sys.path.insert(0, ROOT)
import warnings
from pathlib import Path
from functional_optim._compiler.c.build import load_c

warnings.simplefilter("ignore")  # the cache cannot be used
load_c("int x = 1;")
child = os.fork()
if not child:
    warnings.simplefilter("error")
    load_c("int x = 2;")
    assert len(list(Path(sys.argv[1]).glob("functional_optim_*"))) == 2
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
warnings.simplefilter("error")
(own,) = Path(sys.argv[1]).glob("functional_optim_*")
load_c("int x = 3;")
print(len(list(own.glob("*.so"))))
"""


def test_a_child_has_a_temporary_folder_of_its_own(tmp_path: Path) -> None:
    """It removes that at its end, not its parent's; in the end there is none."""
    (tmp_path / "temporary").mkdir()
    variables = {"FUNCTIONAL_OPTIM_CACHE": "/dev/null/cache", "TMPDIR": str(tmp_path / "temporary")}

    assert run(TEMPORARY, tmp_path, str(tmp_path / "temporary"), **variables) == "2\n"
    assert list((tmp_path / "temporary").iterdir()) == []
