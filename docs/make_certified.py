"""Writes docs/certified.md: facts about every algorithm of torch.optim, measured.

    python docs/make_certified.py

The rows and the measurements are in `tests/_lib/certified.py`, because they are tests.
"""

import os
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]

if __name__ == "__main__":
    os.environ["JAX_ENABLE_X64"] = "1"
    sys.path.insert(0, str(ROOT / "tests"))
    from _lib.certified import page

    (ROOT / "docs" / "certified.md").write_text(page())
