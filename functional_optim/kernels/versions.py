"""Counting up the versions of tensors that kernels have written to, by which autograd notices writes."""

from collections.abc import Iterator, Sequence

import torch

from .call import Column


class Versions:
    """Counts up each version once: parts of one tensor share theirs, and with many of them that takes long."""

    def __init__(self) -> None:
        self.last: tuple[list[bytes], list[tuple[int, int]]] = ([], [])

    def count_up(self, columns: Sequence[Column], positions: Sequence[Sequence[int]]) -> None:
        """Counts up the versions of tensors.

        Args:
          columns: the tensors.
          positions: which of each column.
        """
        found = [column.found.versions for column in columns if column.found is not None]
        if len(found) < len(columns):
            chosen = [(k, i) for k, places in enumerate(positions) for i in places]
        else:
            known, chosen = self.last  # of this or another thread, so looked at once
            if known != found:
                chosen = list(_one_of_each(found, positions))
                self.last = found, chosen
        # tensors made in inference mode have no version, and are passed over
        torch.autograd.graph.increment_version([columns[k][i] for k, i in chosen])


def _one_of_each(versions: Sequence[bytes], positions: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """The first place of every version."""
    known = set()
    for k, (packed, places) in enumerate(zip(versions, positions, strict=True)):
        each = memoryview(packed).cast("q")
        for i in places:
            if each[i] not in known or not each[i]:
                known.add(each[i])
                yield k, i
