"""Programs in processes of their own, and checks that several processes do together, which are started once.

A check is a function of its process's rank and of a folder. All processes do the same checks in the same order, with
one process group. Its module must be importable in a new process.
"""

import atexit
import datetime
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


Check = Callable[[int, Path], None]
MARKS = [
    pytest.mark.integration,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
]
# Processes are forked from one that has imported what takes long; where there is none, each imports it.
START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
IMPORTED = [
    "torch._dynamo",  # optimizers of torch import it
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
]


def forks() -> Any:
    """The way to start processes, with the imports of the one that they are forked from."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    return multiprocessing.get_context(START)


def results(checks: Mapping[str, Check], world: int, make_folder: Callable[[str], Path]) -> dict[str, str]:
    """An error message per check, empty where none failed. Processes are started once, and again after each failure.

    Args:
      checks: the checks.
      world: the number of processes.
      make_folder: makes a new folder.
    """
    forks()
    found: dict[str, str] = {}
    while len(found) < len(checks):
        folder = make_folder("processes")
        remaining = {name: check for name, check in checks.items() if name not in found}
        message = ""
        try:
            mp.start_processes(  # type: ignore[no-untyped-call]
                _run, args=(world, remaining, folder), nprocs=world, start_method=START
            )
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            message = str(error)
        for name in remaining:
            texts = [p.read_text() for p in sorted((folder / name).glob("found_*.txt"))]
            failed = "\n".join(filter(None, texts))
            if failed or len(texts) < world:
                found[name] = failed or message or "a process ended without a word"
                break
            found[name] = ""
    return found


class Program:
    """Python code in a process of its own, which leads a group of processes; it has started when this has been made.

    Args:
      code: the code, or the file that it is in, in whose folder it runs.
      folder: where what it writes is kept.
      arguments: those of the command line.
      warnings: whether warnings are errors.
      environment: variables that the process has besides those of this one.
    """

    def __init__(
        self,
        code: str | Path,
        folder: Path,
        arguments: Sequence[str] = (),
        warnings: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._within = Path(tempfile.mkdtemp(dir=folder, prefix="program_"))
        variables = os.environ | dict(environment or {})
        self.process = forks().Process(
            target=_run_program, args=(code, self._within, list(arguments), warnings, dict(variables))
        )
        self.process.start()

    def ended(self) -> bool:
        return self.process.exitcode is not None

    def kill(self) -> None:
        """Kills the process and those that it has started."""
        os.killpg(self.process.pid or 0, signal.SIGKILL)

    def finish(self, timeout: float = 300) -> tuple[int, str, str]:
        """The exit code, and what the process wrote to stdout and stderr; it is killed if it does not end."""
        self.process.join(timeout)
        if not self.ended():
            self.kill()
            self.process.join()
        out, err = ((self._within / name).read_text() for name in ("out", "err"))
        return self.process.exitcode or 0, out, err


def run_program(code: str | Path, folder: Path, **options: Any) -> str:
    """The text that a program writes to stdout; it must not fail. For the arguments see `Program`."""
    exit_code, out, err = Program(code, folder, **options).finish()
    assert exit_code == 0, f"{err}\nexit code {exit_code}"
    return out


def _run_program(
    code: str | Path, within: Path, arguments: list[str], errors: bool, environment: dict[str, str]
) -> None:
    os.setsid()
    for number, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(within / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # found anew, in this environment
    sys.argv = ["program", *arguments]
    if errors:
        warnings.simplefilter("error")
    try:
        if isinstance(code, Path):
            os.chdir(code.parent)
            runpy.run_path(str(code), run_name="__main__")
        else:
            exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()  # which processes of `multiprocessing` leave out


def _run(rank: int, world: int, checks: Mapping[str, Check], folder: Path) -> None:
    """Does checks up to the first that fails, and writes what each found to a file.

    After a failure processes may be at different places, so that what follows would tell nothing.
    """
    torch.set_num_threads(1)  # sums are split up in the same way in all processes
    warnings.simplefilter("error")
    # torch's own: what gloo cannot do, and what it compiles and stores in deprecated ways
    for message in ("`torch.jit", "TypedStorage is deprecated", "FSDP will not all-gather", ".*barrier"):
        warnings.filterwarnings("ignore", message)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    for name, check in checks.items():
        place = folder / name
        place.mkdir(exist_ok=True)
        try:
            check(rank, place)
        except BaseException:
            (place / f"found_{rank}.txt").write_text(traceback.format_exc())
            raise
        (place / f"found_{rank}.txt").write_text("")
    dist.barrier()
    dist.destroy_process_group()
