"""The public names: `__all__`, `dir`, the docstrings, docs/api.md and the README say the same."""

import pkgutil
import re
import types
from pathlib import Path
from typing import Any

import pytest

import functional_optim as fo
import functional_optim.adapters
import functional_optim.plot
from _lib.scripts import load_script


ROOT = Path(__file__).parents[2]
MODULES = {module.__name__: module for module in (fo, functional_optim.adapters, functional_optim.plot)}
README = (ROOT / "README.md").read_text()
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}


API = load_script("docs/make_api.py")


def listed(module: types.ModuleType) -> list[str]:
    """The names that a docstring lists, by family."""
    return [name for names in API.families(module).values() for name in names]


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_the_docstring_lists_every_public_name_once(module: Any) -> None:
    assert sorted(listed(module)) == sorted(module.__all__)


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_dir_shows_public_names_only(module: Any) -> None:
    assert set(dir(module)) - {"__version__", "adapters", "plot"} == set(module.__all__)
    assert all(hasattr(module, name) for name in dir(module))


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_what_is_exported_is_public(module: Any) -> None:
    """No name without an underscore but those of `__all__`, and submodules."""
    found = {k for k, x in vars(module).items() if k[0] != "_" and not isinstance(x, types.ModuleType)}

    assert found == set(module.__all__)


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_a_star_imports_the_public_names(module: Any) -> None:
    names: dict[str, Any] = {}

    exec(f"from {module.__name__} import *", names)

    assert names.keys() - {"__builtins__"} == set(module.__all__)


def test_modules_are_private_but_two() -> None:
    public = [module.name for module in pkgutil.iter_modules(fo.__path__) if not module.name.startswith("_")]

    assert public == ["adapters", "plot"]


def test_public_things_know_where_they_are_found() -> None:
    """A class or function is public under its own name; `multi_transform` is optax's name of `partition`."""
    names = {name: getattr(x, "__name__", name) for name, x in vars(fo).items() if name in fo.__all__}

    assert {k: x for k, x in names.items() if k != x} == {"multi_transform": "partition"}


def test_the_index_is_up_to_date() -> None:
    """Run `python docs/make_api.py` if this fails."""
    assert (ROOT / "docs" / "api.md").read_text() == API.text()


def rows(title: str) -> list[str]:
    """The names in a row of the table of README.md."""
    (row,) = re.findall(rf"^\| {re.escape(title)} \| (.*) \|$", README, re.MULTILINE)
    return re.findall(r"`(\w+)`", row)


@pytest.mark.parametrize("family", API.families(fo))
def test_the_table_of_the_readme(family: str) -> None:
    assert rows(family) == API.families(fo)[family]


@pytest.mark.parametrize("module", [functional_optim.adapters, functional_optim.plot], ids=lambda m: m.__name__)
def test_the_table_of_the_readme_has_the_modules(module: types.ModuleType) -> None:
    assert rows(f"`{module.__name__}`") == listed(module)


@pytest.mark.parametrize("page", PAGES)
def test_documents_use_names_that_exist(page: str) -> None:
    used = set(re.findall(r"\bfo\.(\w+)", PAGES[page]))
    imported = re.findall(r"from functional_optim\.adapters import ([\w, ]+)", PAGES[page])

    assert used <= {*fo.__all__, "plot"}
    assert {name.strip() for names in imported for name in names.split(",")} <= set(functional_optim.adapters.__all__)


def test_a_class_of_transformations_may_have_attributes_of_any_name() -> None:
    assert {name for name in dir(fo.GradientTransformation) if not name.startswith("_")} == {"init", "update"}
