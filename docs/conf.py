"""Builds the manual: `make docs`. The pages are plain markdown; what only Sphinx needs is added here."""

import inspect
import re
import shutil
from pathlib import Path

import hf_freeze

HERE = Path(__file__).parent

project = "hf_freeze"
author = "the hf_freeze authors"
version = release = hf_freeze.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"hf_freeze {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are kept with their outputs
nb_merge_streams = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
default_role = "code"

# What stands in the list of contents, in this order.
PAGES = {
    "Tutorial": (
        "quickstart", "notebooks/1_finetune_bert", "notebooks/2_adapters", "notebooks/3_diagnosing",
        "notebooks/4_vision_transfer", "notebooks/5_adaptive_and_search",
    ),
    "How-to guides": (
        "adapterhub", "howto/peft-lora", "howto/hand-written-loop", "howto/several-processes", "howto/trl",
        "howto/resume", "federated", "vision", "video", "speech", "language-models", "scripts",
    ),
    "Manual": (
        "selectors", "freezing", "adapters", "staged-unfreezing", "policies", "prefix-cache", "plan", "audit", "report",
        "recipes", "search",
    ),
    "Explanation": (
        "explanation/layer-map", "explanation/union-and-regroup", "explanation/eval-mode", "explanation/exact-cache",
        "architecture",
    ),
    "Reference": ("command-line", "api", "architectures"),
    "Measured": ("demo", "benchmarks", "claims"),
}  # fmt: skip

# Beside the public names: what they return, and what the pages take from elsewhere.
ALSO = {
    "auto": ["AutoFreezeModelForSequenceClassification"],
    "certify": ["Certificate"],
    "conditions": ["Plateau"],
    "data": ["compute_metrics", "embedded_model_path", "load_corpus", "tokenize"],
    "federated": [
        "travelling_tensors", "base_hash", "to_arrays", "load_arrays", "traffic", "train_round", "ProximalTerm",
    ],
    "policies.protocol": ["Part"],
    "recipes.parts": ["TextSource"],
    "summary": ["Summary"],
}  # fmt: skip


def add_contents(app, docname, source):
    """Gives the index the tree of pages, which a reader of the plain markdown has as tables."""
    if docname == "index":
        for caption, pages in PAGES.items():
            there = "\n".join(page for page in pages if page in app.env.found_docs)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{there}\n```\n"


def bring_notebooks(app, config):
    """Copies the notebooks here, from the folder beside this one: Sphinx reads pages from one folder alone."""
    shutil.rmtree(HERE / "notebooks", ignore_errors=True)
    (HERE / "notebooks").mkdir()
    for notebook in (HERE.parent / "notebooks").glob("*.ipynb"):
        shutil.copy(notebook, HERE / "notebooks")


def mend_links(app, docname, source):
    """Lets links that lead somewhere in a clone lead to pages of the manual; to what is none, there is no link."""
    text = re.sub(r"\[([^\]]+)\]\((?:\.\./)+[A-Z]+\.md[^)]*\)", r"\1", source[0])  # README, CONTRIBUTING, CHANGELOG
    if docname.startswith("notebooks/"):
        text = text.replace("](../docs/", "](../")
    else:
        text = re.sub(r"\]\((?:\.\./)+notebooks/", "](/notebooks/", text)
    source[0] = text


def add_reference(app, docname, source):
    """Gives the API reference a section for each module and an entry for each name."""
    if docname != "api":
        return
    for home in sorted({*hf_freeze._HOMES, *ALSO}):
        source[0] += f"\n{home}\n{'-' * len(home)}\n\n"
        entries = [("hf_freeze", name) for name in hf_freeze._HOMES.get(home, ())]
        for module, name in [*entries, *((f"hf_freeze.{home}", name) for name in ALSO.get(home, ()))]:
            value = getattr(__import__(module, fromlist=[name]), name)
            kind = "class" if inspect.isclass(value) else "function"
            source[0] += f".. auto{kind}:: {module}.{name}\n"
            source[0] += "   :members:\n   :special-members: __getitem__\n\n" if kind == "class" else "\n"


def draw_tables(app, what, name, obj, options, lines):
    """Turns the markdown tables of docstrings, which read well in a terminal, into reStructuredText."""
    drawn = []
    for line in lines:
        cells = line.strip().strip("|").split(" | ")
        if not line.startswith("|"):
            drawn.append(line)
        elif set(line) <= set("|-"):
            continue
        else:
            if not (drawn and drawn[-1].startswith("     -")):
                drawn += ["", ".. list-table::", "   :header-rows: 1", ""]
            drawn += [f"   * - {cells[0].strip()}", *(f"     - {cell.strip()}" for cell in cells[1:])]
    lines[:] = drawn


def set_equations(app, what, name, obj, options, lines):
    """Leaves equations and diagrams, which docstrings indent, as they are written, line by line."""
    text = "\n".join(lines)
    lines[:] = re.sub(r"(?m)^(?![ :*.|-])(.+)\n\n(?=    (?!>>>)\S)", r"\1\n\n::\n\n", text).split("\n")


def setup(app):
    app.connect("autodoc-process-docstring", set_equations)
    app.connect("autodoc-process-docstring", draw_tables)
    app.connect("config-inited", bring_notebooks)
    app.connect("source-read", add_contents)
    app.connect("source-read", mend_links)
    app.connect("source-read", add_reference)
