"""The documents: their code runs, their links lead somewhere, their lines fit a window."""

import linecache
import re
from pathlib import Path
from typing import Any

import optax
import pytest
import torch

import functional_optim as fo
from _lib.processes import run_program
from functional_optim import adapters
from functional_optim._compiler.names import HIDDEN, NAMES, PUBLIC, names_of
from functional_optim._compiler.ops import OPS
from functional_optim._compiler.rewrites import REWRITES


ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *ROOT.glob("docs/*.md"))
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def code(page: str) -> str:
    """The Python of a page, from top to bottom."""
    return "\n".join(block for language, block in FENCE.findall(PAGES[page]) if language == "python")


# the names that a page says are the reader's
READERS = {"docs/rules.md": "import torch\nparams = {'w': torch.zeros(2, 2)}\n"}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if code(page)])
def test_the_code_of_a_page_runs(page: str, tmp_path: Path) -> None:
    """In a process of its own, because some of it starts `torch.distributed`."""
    script = tmp_path / "page.py"  # rules are read from their file when an error quotes them
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{READERS.get(page, '')}{code(page)}")

    run_program(script, tmp_path, warnings=False)


def test_the_explanation_in_the_readme() -> None:
    (shown,) = re.findall(r">>> print\(fo\.explain\(tx, params\)\)\n(.*?)```", PAGES["README.md"], re.DOTALL)
    names: dict[str, object] = {"fo": fo}
    (recipe,) = re.findall(r"^schedule = .*?^\)$", PAGES["README.md"], re.MULTILINE | re.DOTALL)
    exec(recipe, names)

    shapes = {"wte": (1000, 768), "w": (768, 768), "b": (768,)}
    params = {name: torch.zeros(shape) for name, shape in shapes.items()}

    assert str(fo.explain(names["tx"], params)) == shown.strip()  # type: ignore[arg-type]


def anchors(text: str) -> set[str]:
    """The anchors of headings, as GitHub makes them."""
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", PAGES[page]):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target


FOLDERS = ("adapters", "benchmarks", "docs", "examples", "functional_optim", "tests")
FILES = {str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*")} | set(FOLDERS)
FILES |= {path.name for path in ROOT.iterdir()}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page: str) -> None:
    named = re.findall(r"(?<![\w./])((?:\w+/)*\w+(?:/|\.py|\.c|\.h|\.md))(?![\w(])", PAGES[page])

    missing = [name for name in named if not any(f"/{path}/".endswith(f"/{name.rstrip('/')}/") for path in FILES)]

    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_lines_fit_a_window(page: str) -> None:
    """110 columns; the rows of a table cannot be broken."""
    long = [line for line in PAGES[page].splitlines() if len(line) > 110 and not line.startswith("|")]

    assert long == []


def test_the_table_of_operations() -> None:
    """Every name that a rule may use stands in docs/rules.md, and every row of the compiler's tables is one of them."""
    rows = re.findall(
        r"^\| ([a-z_ ]+) \| (`.*`\)?) \|$", PAGES["docs/rules.md"].partition("## Operations")[2], re.MULTILINE
    )
    table = {kind: [re.findall(r"`(\w+)`", entry) for entry in re.split(r", (?![^(]*\))", row)] for kind, row in rows}

    assert table == {kind: names_of(kind) for kind in NAMES}
    assert len(PUBLIC) == len(set(PUBLIC))
    assert {*PUBLIC} | HIDDEN == {*OPS, *REWRITES}
    assert not {*PUBLIC} & HIDDEN


def first_cells(page: str, heading: str) -> list[list[str]]:
    """The names in the first column of the tables of a section, row by row."""
    section = PAGES[page].partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [re.findall(r"`(\w+)`", cell) for cell in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)]


def test_every_class_of_torch_optim_has_a_row() -> None:
    classes = {
        name for name, x in vars(torch.optim).items() if isinstance(x, type) and issubclass(x, torch.optim.Optimizer)
    }
    rows = first_cells("docs/from_torch.md", "Classes")

    assert sorted(name for row in rows for name in row) == sorted(classes - {"Optimizer"})
    assert all(hasattr(adapters, name) for row in rows for name in row)


def test_every_function_of_optax_is_here_or_in_a_table() -> None:
    page = PAGES["docs/from_optax.md"]
    names = {name for of in (optax, optax.contrib) for name in dir(of) if callable(getattr(of, name))}
    functions = {name for name in names if name.islower() and not name.startswith("_")}
    told = {name for row in first_cells("docs/from_optax.md", "Names that are not here") for name in row}

    assert {name for name in functions if not hasattr(fo, name) and f"`{name}`" not in page} == set()
    assert {name for name in told if hasattr(fo, name)} == set()


def test_the_words_of_the_glossary_are_explained_once() -> None:
    words = re.findall(r"^- \*\*(.+?)\.\*\*", PAGES["docs/glossary.md"], re.MULTILINE)

    assert len(words) >= 20
    assert len({word.lower() for word in words}) == len(words)


def against_the_momentum(step: int) -> torch.Tensor:
    """Gradients of which few agree with those before them every other time, so that the bound of the mean counts."""
    generator = torch.Generator().manual_seed(step)
    g = torch.rand(4096, generator=generator)
    return g if step % 2 == 0 else torch.where(g < 2e-4, 1.0, -0.01 * g)


def test_the_rule_of_the_readme_is_that_of_the_example() -> None:
    """README.md shows the formula of examples/custom_rule.py in fewer lines."""
    (shown,) = re.findall(r"^@fo\.elementwise\(.*?\n\n", PAGES["README.md"], re.MULTILINE | re.DOTALL)
    example = (ROOT / "examples" / "custom_rule.py").read_text()
    (written,) = re.findall(r"^@fo\.elementwise\(.*?\n\n", example, re.MULTILINE | re.DOTALL)
    found = []
    for number, text in enumerate((shown, written)):
        name = f"<rule {number}>"
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        names: dict[str, Any] = {"fo": fo, "torch": torch}
        exec(compile(text, name, "exec"), names)
        tx = fo.chain(names["scale_by_cautious_lion"](b1=0.8), fo.scale(-0.1))
        params = torch.zeros(4096)
        state = tx.init(params)
        for step in range(20):
            params, state = fo.apply_gradients(tx, params, against_the_momentum(step), state)
        found.append(params)

    torch.testing.assert_close(*found, rtol=0, atol=0)
