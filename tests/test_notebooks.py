"""The notebooks: each is kept with its outputs, shows nothing of the machine it ran on, and runs from scratch."""

from __future__ import annotations

import re
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
ABSOLUTE_PATH = re.compile(r"(?<![<\w:/.])/[\w.-]+/[\w./-]+|site-packages")


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: nbformat.NotebookNode) -> str:
    """Returns all text that a cell shows, its HTML included."""
    data = [output.get("data", {"text/plain": output.get("text", "")}) for output in cell.outputs]
    return "\n".join(text for part in data for kind, text in part.items() if kind.startswith("text/"))


def pictures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_as_it_ran(path):
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(notebook)

    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert pictures(notebook) > 0
    for cell in cells:
        assert not ABSOLUTE_PATH.search(shown(cell)), shown(cell)
        assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_says_how_to_use_what_is_on_the_hub_and_its_links_lead_somewhere(path):
    told = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    assert any(re.search(r"\bhub\b", text) and "```python" in text for text in told)
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(told)):
        if not target.startswith("https://"):
            assert (path.parent / target.partition("#")[0]).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_scratch(path, tmp_path):
    kept = nbformat.read(path, as_version=4)
    notebook = nbformat.from_dict({**kept, "cells": [{**cell} for cell in kept.cells]})

    begun = time.perf_counter()
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()

    assert pictures(notebook) == pictures(kept)
    assert time.perf_counter() - begun < 300
