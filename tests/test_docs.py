"""The manual is true: its code runs, its command lines are understood, its links lead somewhere, it builds."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import transformers
import typer

import hf_freeze
from hf_freeze.cli import app

ROOT = Path(__file__).parents[1]
DOCS = sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts)
PAGES = [ROOT / "README.md", *DOCS]
WITH_LINKS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
COMMANDS = typer.main.get_command(app).commands

# A comment such as <!-- not run: needs the hub --> right above a block says why it is compiled and not run.
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A block of code on a page: its language, its first line's number, and why it is not run, if it is not."""

    language: str
    code: str
    line: int
    reason: str | None


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [
        Block(match["language"], match["code"], text.count("\n", 0, match.start("code")), match["reason"])
        for match in BLOCK.finditer(text)
    ]
    return [block for block in found if block.language in languages]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def run(block: Block, page: Path, names: dict) -> None:
    """Runs a block as a reader would, in the names that the blocks above it have made."""
    if block.language == "pycon":
        test = doctest.DocTestParser().get_doctest(block.code, names, name(page), str(page), block.line)
        test.globs = names
        shown: list[str] = []
        doctest.DocTestRunner(verbose=False).run(test, out=shown.append, clear_globs=False)
        assert not shown, "".join(shown)
        return
    code = compile("\n" * block.line + block.code, str(page), "exec")  # so that a traceback has the page's line
    if block.reason is None:
        exec(code, names)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python", "pycon")], ids=name)
def test_the_code_on_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    transformers.set_seed(0)
    names: dict = {"__name__": "__main__"}
    for block in blocks(page, "python", "pycon"):
        run(block, page, names)


def command_lines() -> list[tuple[str, str]]:
    """Returns the page and the text of each `$ hf-freeze ...` line."""
    lines = [(page, line) for page in PAGES for block in blocks(page, "console") for line in block.code.splitlines()]
    return [(name(page), line.removeprefix("$ ")) for page, line in lines if line.startswith("$ hf-freeze")]


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_a_command_line_on_a_page_is_understood(page, line):
    command, *arguments = shlex.split(re.split(r" [<>|] ", line)[0], comments=True)[1:]
    if not command.startswith("--"):
        found = COMMANDS[command]
        while hasattr(found, "commands"):  # a group, as `recipe`
            found = found.commands[arguments.pop(0)]
        assert found.make_context(command, arguments).params  # reads the arguments, and runs nothing


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_on_the_command_line_has_every_option(command):
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    section = re.search(rf"^## `hf-freeze {command}.*?(?=^## |\Z)", text, re.M | re.S).group()
    leaves = getattr(COMMANDS[command], "commands", {command: COMMANDS[command]}).values()
    options = {option for leaf in leaves for own in leaf.params for option in own.opts if option[:2] == "--"}
    described = set(re.findall(r"^\| `(--[a-z-]+)", section, re.M))
    assert described == options - {"--help"}


@pytest.mark.parametrize("page", WITH_LINKS, ids=name)
def test_the_links_on_a_page_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("https://", "http://"))]
    for target in targets:
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in {slug(heading) for heading in re.findall(r"^#+ (.+)$", file.read_text(), re.M)}, target


def slug(heading: str) -> str:
    """Returns the anchor that a heading gets on a code host and in the built manual."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_page_and_notebook_is_in_the_contents_and_on_the_first_page():
    listed = [page for pages in runpy.run_path(str(ROOT / "docs" / "conf.py"))["PAGES"].values() for page in pages]
    written = {name(page).removeprefix("docs/").removesuffix(".md") for page in DOCS} - {"index"}
    notebooks = {f"notebooks/{notebook.stem}" for notebook in (ROOT / "notebooks").glob("*.ipynb")}
    assert len(listed) == len(set(listed))
    assert written | notebooks | {"api"} <= set(listed)

    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    first_page = {link.removeprefix("../").removesuffix(".md").removesuffix(".ipynb") for link in links}
    assert written | notebooks <= first_page


# The reference


PUBLIC = [*hf_freeze.__all__, "AutoFreezeModelForSequenceClassification"]


def own_classes(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base.__module__.startswith("hf_freeze")]


def members(cls: type) -> dict[str, Any]:
    """Returns the public methods and properties of a class that it has from this package."""
    kinds = (staticmethod, classmethod, property, cached_property)
    return {
        attribute: value
        for base in reversed(own_classes(cls))
        for attribute, value in vars(base).items()
        if not attribute.startswith("_") and (inspect.isfunction(value) or isinstance(value, kinds))
    }


def attributes(cls: type) -> Iterator[str]:
    """Yields the names of a class's public fields, and of what its ``__init__`` sets."""
    for base in own_classes(cls):
        yield from (own for own, kind in inspect.get_annotations(base).items() if "ClassVar" not in str(kind))
        if "__init__" in vars(base) and not hasattr(base, "__dataclass_fields__"):
            tree = ast.parse(textwrap.dedent(inspect.getsource(base.__init__)))
            stored = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
            yield from (n.attr for n in stored if isinstance(n.ctx, ast.Store) and ast.unparse(n.value) == "self")


@pytest.mark.parametrize("public", PUBLIC)
def test_a_public_name_is_documented_with_all_that_is_public_in_it(public):
    value = getattr(hf_freeze, public)
    text = inspect.getdoc(value) or ""
    assert text and not text.startswith(f"{public}("), "a dataclass without a docstring is given its signature"
    if not inspect.isclass(value):
        asked = inspect.signature(value).parameters
        assert [name for name in asked if not re.search(rf"^ *{name}: |`{name}`", text, re.M)] == []
        return
    assert [name for name, member in members(value).items() if not (member.__doc__ or "").strip()] == []
    told = "\n".join(base.__doc__ or "" for base in own_classes(value))
    named = [name for name in attributes(value) if not name.startswith("_")]
    assert [name for name in named if not re.search(rf"^ *{name}: ", told, re.M)] == []


@pytest.mark.slow
def test_the_manual_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", "-d", tmp_path / "doctrees", ROOT / "docs", tmp_path / "html"],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "html" / "api.html").read_text(encoding="utf-8")
    for public in hf_freeze.__all__:
        assert f'id="hf_freeze.{public}"' in page
        value = getattr(hf_freeze, public)
        if inspect.isclass(value):
            homes = (f"hf_freeze.{public}", f"{value.__module__}.{value.__qualname__}")  # `on_plateau` is a second name
            own = [member for member in members(value) if member in vars(value)]
            assert [name for name in own if not any(f'id="{home}.{name}"' in page for home in homes)] == []
    notebooks = [notebook.stem for notebook in (ROOT / "notebooks").glob("*.ipynb")]
    for notebook in notebooks:
        shown = (tmp_path / "html" / "notebooks" / f"{notebook}.html").read_text(encoding="utf-8")
        assert "<img" in shown, "the pictures of a notebook are shown"
