"""Builds the manual: `make docs`. The pages are plain markdown; what only Sphinx needs is added here."""

import inspect

import hf_freeze

project = "hf_freeze"
author = "the hf_freeze authors"
version = release = hf_freeze.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"hf_freeze {version}"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
default_role = "code"

PAGES = (
    "quickstart", "selectors", "freezing", "adapters", "adapterhub", "staged-unfreezing", "policies", "prefix-cache",
    "plan", "audit", "report", "recipes", "search", "command-line", "architectures", "demo", "benchmarks", "api",
)  # fmt: skip


def add_contents(app, docname, source):
    """Gives the index the tree of pages, which a reader of the plain markdown has as a table."""
    if docname == "index":
        pages = "\n".join(page for page in PAGES if page in app.env.found_docs)
        source[0] += f"\n```{{toctree}}\n:hidden:\n\n{pages}\n```\n"


def add_reference(app, docname, source):
    """Gives the API reference a section for each module and an entry for each public name."""
    if docname != "api":
        return
    for home, names in sorted(hf_freeze._HOMES.items()):
        source[0] += f"\n{home}\n{'-' * len(home)}\n\n"
        for name in names:
            kind = "class" if inspect.isclass(getattr(hf_freeze, name)) else "function"
            source[0] += f".. auto{kind}:: hf_freeze.{name}\n"
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


def setup(app):
    app.connect("autodoc-process-docstring", draw_tables)
    app.connect("source-read", add_contents)
    app.connect("source-read", add_reference)
