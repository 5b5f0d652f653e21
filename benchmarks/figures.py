"""Figures of all benchmarks: times and their ratios, tables, and the files that they are written to."""

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any


def seconds(step: Callable[[], object], times: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(times):
        step()
    return (time.perf_counter() - start) / times


def ratio(samples: Mapping[str, Sequence[float]], a: str, b: str) -> float:
    """The time of contender `a` as a multiple of that of `b`: the median over rounds."""
    return median(x / y for x, y in zip(samples[a], samples[b], strict=True))


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Plain text; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(x.ljust(w) if k == 0 else x.rjust(w) for k, (x, w) in enumerate(zip(row, widths, strict=True)))
        for row in (header, tuple("-" * w for w in widths), *rows)
    ]
    return "\n".join(lines)


def write_figures(path: Path, report: Mapping[str, Any]) -> None:
    """Writes a report as JSON, and prints where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nfigures: {path}")
