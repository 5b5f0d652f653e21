"""Writes docs/api.md, every public name by family with the first line of its docstring, and the table of README.md.

    python docs/make_api.py

The families are those that the docstrings of the modules list.
"""

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import functional_optim
import functional_optim.adapters
import functional_optim.plot


MODULES: tuple[ModuleType, ...] = (functional_optim, functional_optim.adapters, functional_optim.plot)
HEAD = """# Public names

An index, written by `docs/make_api.py` from the docstrings; `help(fo.adamw)` shows a whole one.
"""


def families(module: ModuleType) -> dict[str, list[str]]:
    """The public names of a module, by family: indented lines of its docstring, each below a title."""
    found: dict[str, list[str]] = {}
    title = ""
    for line in (module.__doc__ or "").splitlines():
        if line.startswith("  "):
            found.setdefault(title, []).extend(line.split())
        else:
            title = line
    return found


def first_line(module: ModuleType, name: str) -> str:
    """The line of an index that says what a public name is."""
    x = getattr(module, name)
    if x is functional_optim.zeros:  # an object, not a function with a docstring
        return "A slot that starts at zero, `slot(0.0)`."
    if x.__name__ != name:
        return f"The same as `{x.__name__}`."
    return " ".join((inspect.getdoc(x) or "").partition("\n\n")[0].split())


def lines(module: ModuleType) -> Iterator[str]:
    """The part of the index that lists a module."""
    yield f"\n## {module.__name__}\n"
    yield (module.__doc__ or "").splitlines()[0]
    for title, names in families(module).items():
        yield f"\n### {title}\n"
        for name in names:
            entry = f"- `{name}`: {first_line(module, name)}"
            yield textwrap.fill(entry, 110, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def text() -> str:
    """The whole of docs/api.md."""
    return HEAD + "\n".join(line for module in MODULES for line in lines(module)) + "\n"


def with_table(readme: str) -> str:
    """README.md with the names of today in the rows of its table."""
    for title, names in table().items():
        row = f"| {title} | {' '.join(f'`{name}`' for name in names)} |"
        readme = re.sub(rf"^\| {re.escape(title)} \| .* \|$", row, readme, flags=re.MULTILINE)
    return readme


def table() -> dict[str, list[str]]:
    """The rows of the table of README.md: the names of each family, and those of each other module in one row."""
    whole = {f"`{m.__name__}`": [name for names in families(m).values() for name in names] for m in MODULES[1:]}
    return {**families(functional_optim), **whole}


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(text())
    README = Path(__file__).parents[1] / "README.md"
    README.write_text(with_table(README.read_text()))
