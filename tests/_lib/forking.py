"""Programs that are forked from a process with an environment of its own, after the imports of all of them."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


# lines are requests: a program, variables, and the files for its output; the answer is the exit code
SERVER = """
import json, os, sys, traceback

exec(sys.argv[1])
for line in sys.stdin:
    code, variables, files = json.loads(line)
    child = os.fork()
    if not child:
        for number, name in enumerate(files, 1):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT, 0o600), number)
        os.environ.update(variables)
        failed = 1
        try:
            exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
            failed = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(failed)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Done(NamedTuple):
    """The end of a program."""

    exit_code: int
    out: str
    err: str


class Forking:
    """A process that forks one for each program.

    Args:
      imports: code that runs before any program.
      environment: all variables of the process.
    """

    def __init__(self, imports: str, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, imports],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str, **variables: str) -> Done:
        """Runs a program, with variables besides those of the environment, until its end."""
        assert self._process.stdin
        assert self._process.stdout
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("out", "err")]
            self._process.stdin.write(json.dumps([code, variables, list(map(str, files))]) + "\n")
            self._process.stdin.flush()
            exit_code = int(self._process.stdout.readline())
            return Done(exit_code, *(file.read_text() for file in files))

    def close(self) -> None:
        self._process.communicate()
