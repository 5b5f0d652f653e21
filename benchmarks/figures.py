"""Figures of all benchmarks: ratios of times, and the files that they are written to."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any


def ratio(samples: Mapping[str, Sequence[float]], a: str, b: str) -> float:
    """The time of contender `a` as a multiple of that of `b`: the median over rounds."""
    return median(x / y for x, y in zip(samples[a], samples[b], strict=True))


def write_figures(path: Path, report: Mapping[str, Any]) -> None:
    """Writes a report as JSON, and prints where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nfigures: {path}")
