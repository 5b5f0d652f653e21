"""Checks that several processes do together: starts the processes once, and returns what each check found.

A check is a function of its process's rank and of a folder. All processes do the same checks in the same order, with
one process group. Its module must be importable in a new process.
"""

import datetime
import multiprocessing
import os
import runpy
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

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
IMPORTED = ["torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch.distributed.tensor"]


def results(checks: Mapping[str, Check], world: int, make_folder: Callable[[str], Path]) -> dict[str, str]:
    """An error message per check, empty where none failed. Processes are started once, and again after each failure.

    Args:
      checks: the checks.
      world: the number of processes.
      make_folder: makes a new folder.
    """
    multiprocessing.set_forkserver_preload(IMPORTED)
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


def run_script(script: Path) -> str:
    """Runs a script in a new process, within its folder; returns what the process wrote to stderr if it failed."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    errors = script.with_suffix(".errors")
    process = multiprocessing.get_context(START).Process(target=_run_script, args=(script, errors))
    process.start()
    process.join(300)
    if process.exitcode is None:
        process.kill()
        process.join()
    return "" if process.exitcode == 0 else f"{errors.read_text()}\nexit code {process.exitcode}"


def _run_script(script: Path, errors: Path) -> None:
    with errors.open("w") as f:
        os.dup2(f.fileno(), 2)
    os.chdir(script.parent)
    runpy.run_path(str(script), run_name="__main__")


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
