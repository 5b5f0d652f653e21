"""Warnings at the caller's own line, however deep in the package they are given."""

import os
import sys
import warnings

import torch


# adapters are a folder of the package, wherever their files lie
_OWN = tuple(os.path.dirname(x) + os.sep for x in (__file__, os.path.realpath(__file__), torch.__file__))


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Gives a warning at the innermost line outside of this package and torch."""
    frame, level = sys._getframe(1), 2  # the function that warns, as `warnings` counts
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
