"""The project's face: the README keeps to what it promises, and agrees with the other pages and the metadata."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import BartConfig, BartModel, BertConfig, BertForSequenceClassification, CLIPConfig, CLIPModel

import hf_freeze
from hf_freeze import BottleneckConfig, FreezeError, select

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCREEN = 40  # lines
ROW = re.compile(r"^\| (`.+?) \| (.+) \|$", re.M)


def selector_table(page: str) -> list[tuple[str, str]]:
    """Returns the rows of a page's table of selectors, from the heading to the next empty line."""
    return ROW.findall(page[page.index("| selector | what it names |") :].partition("\n\n")[0])


def selectors() -> list[str]:
    """Returns each selector in the README's table; ``a`` and ``b`` stand for any two."""
    cells = [cell for cell, _ in selector_table(README)]
    found = [selector for cell in cells for selector in re.findall(r"`(.+?)`", cell)]
    return [re.sub(r"\bb\b", "norm", re.sub(r"\ba\b", "layers", s)) if s in ("a, b", "a - b") else s for s in found]


@pytest.fixture(scope="module")
def models() -> list[torch.nn.Module]:
    """A classifier with a pooler, adapters and enough layers; an encoder with a decoder; two towers."""
    with torch.device("meta"):
        bert = BertForSequenceClassification(BertConfig(num_hidden_layers=9, hidden_size=12, vocab_size=9))
        bert.add_adapter(BottleneckConfig(bottleneck_size=2))
        bart = BartModel(BartConfig(encoder_layers=2, decoder_layers=2))
        return [bert, bart, CLIPModel(CLIPConfig())]


@pytest.mark.parametrize("selector", [s for s in selectors() if s != "other"])
def test_every_selector_in_the_table_names_something(selector, models):
    def names(model: torch.nn.Module) -> tuple[str, ...]:
        try:
            return select(model, selector)
        except FreezeError:
            return ()

    assert any(names(model) for model in models)


def test_the_table_of_selectors_is_the_same_everywhere():
    manual = (ROOT / "docs" / "selectors.md").read_text(encoding="utf-8")
    assert selector_table(README) == selector_table(manual)
    assert len(selector_table(README)) == 7


def test_the_first_code_has_run_within_two_screens():
    run = README.split("$ make demo", 1)[0]
    assert len(run.splitlines()) < 2 * SCREEN


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M).group(1)
    assert project["version"] == newest == hf_freeze.__version__


def test_every_direct_dependency_has_a_lower_bound_and_a_tested_pin():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    lines = [line for file in ROOT.glob("constraints*.txt") for line in file.read_text().splitlines()]
    pinned = {line.partition("==")[0].lower() for line in lines}
    for requirement in wanted:
        name, bound = re.match(r"([\w.-]+)(?:\[.*\])?(.*)", requirement).groups()
        if name != "hf-freeze":
            assert re.fullmatch(r">=[\w.]+", bound), requirement
            assert name.lower() in pinned, requirement
