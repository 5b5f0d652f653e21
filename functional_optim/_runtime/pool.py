"""Pool: workspaces, one for each thread that steps at a time."""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch

from .._compiler.c.threads import parallel_address


class _ForThreads(Protocol):
    n_threads: int


StepT = TypeVar("StepT")
WorkspaceT = TypeVar("WorkspaceT", bound=_ForThreads)


class Pool(list[WorkspaceT], Generic[StepT, WorkspaceT]):
    """The workspaces of a step that no thread uses at the moment.

    Args:
      make: makes a workspace of the step for a number of threads.
    """

    def __init__(self, make: Callable[[StepT, int], WorkspaceT]) -> None:
        super().__init__()
        self.make = make

    def take(self, step: StepT) -> WorkspaceT:
        """A workspace that no other thread uses."""
        n_threads = usable_threads()
        try:
            workspace = self.pop()
        except IndexError:  # the first step, or other threads have them
            return self.make(step, n_threads)
        return workspace if workspace.n_threads == n_threads else self.make(step, n_threads)

    def give_back(self, workspace: WorkspaceT) -> None:
        """Takes back a workspace that has been used."""
        self.append(workspace)


def usable_threads() -> int:
    """Number of threads that a launch may use: torch's, and one in a forked child, which has none to wake."""
    return 1 if parallel_address() is None else torch.get_num_threads()
