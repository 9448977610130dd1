"""The package as a whole: its public names, what importing it costs, and which file may import which."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_freeze

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_freeze"
SCREEN = 50  # lines
HEAVY = {"torch", "peft", "transformers", "accelerate", "datasets", "rich", "yaml"}


def in_a_fresh_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


# The public names.


@pytest.mark.parametrize("name", hf_freeze.__all__)
def test_a_public_name_has_a_docstring_that_fits_a_screen(name):
    text = inspect.getdoc(getattr(hf_freeze, name))

    assert text and len(text.splitlines()) <= SCREEN
    assert name in dir(hf_freeze)


@pytest.mark.parametrize("name", hf_freeze.__all__)
def test_a_public_name_has_type_hints(name):
    value = getattr(hf_freeze, name)
    own = vars(value).items() if inspect.isclass(value) else [(name, value)]
    functions = [f for n, f in own if inspect.isfunction(f) and (n == "__init__" or not n.startswith("_"))]
    functions = [f for f in functions if f.__module__ != "typing"]  # a protocol gets an __init__ from there

    for function in functions:
        signature = inspect.signature(function)
        hints = [p.annotation for p in signature.parameters.values() if p.name != "self"] + [
            signature.return_annotation
        ]
        assert inspect.Parameter.empty not in hints, function.__qualname__


def test_a_star_import_gives_the_public_names():
    names = {}
    exec("from hf_freeze import *", names)

    assert set(hf_freeze.__all__) <= set(names)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'hf_freeze' has no attribute 'freez'"):
        hf_freeze.freez  # noqa: B018


# What importing costs.


def test_importing_loads_nothing_heavy():
    loaded = in_a_fresh_process("import sys, hf_freeze; print(*{name.partition('.')[0] for name in sys.modules})")

    assert not HEAVY & set(loaded.split())


def test_the_layer_map_and_freezing_need_no_peft():
    code = "import sys; from hf_freeze import freeze, layer_map, select; print('peft' in sys.modules)"

    assert in_a_fresh_process(code) == "False"


# Which file may import which: the list in CONTRIBUTING.md.

FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


def listed() -> list[tuple[str, ...]]:
    """Returns the modules in the order of the list: ``("errors",)``, ..., ``("adapters", "config")``, ..."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"imports only from files above it in this list:\n\n```\n(.*?)```", text, re.DOTALL)
    assert block, "CONTRIBUTING.md has lost its list"
    order: list[tuple[str, ...]] = []
    for line in block[1].splitlines():
        room, _, inside = (part.strip() for part in line.partition("/"))
        order += [(room, name) for name in re.split(r",\s*", inside) if (PACKAGE / room / f"{name}.py").exists()]
        order.append((room,))  # a folder as a whole stands behind what is in it
    return order


def imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yields what a file of `package` imports, in functions too, as paths from the top: those for types alone aside."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (*package[: len(package) - node.level + 1], *filter(None, (node.module or "").split(".")))
            path = base if node.level else base[len(package) :]
            yield from ((*path, alias.name) for alias in node.names)
        yield from imports(node, package)


def imported_by(file: Path) -> list[tuple[str, ...]]:
    return list(imports(ast.parse(file.read_text(encoding="utf-8")), file.relative_to(ROOT).parent.parts))


def position(path: tuple[str, ...], order: list[tuple[str, ...]]) -> int:
    """Returns where a module stands in the list, or that of its folder, for one that the list does not name."""
    return next(order.index(path[:end]) for end in range(len(path), 0, -1) if path[:end] in order)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_imports_only_from_files_above_it(file):
    order = listed()
    module = tuple(part for part in file.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")
    own = [path[1:] for path in imported_by(file) if path[0] == "hf_freeze" and path[1:]]

    for path in own:
        inside = module[0] == path[0] and (path[0],) in order and position(module, order) == position((path[0],), order)
        assert inside or position(path, order) < position(module, order), f"{file.name} imports {'.'.join(path)}"


def test_the_list_names_every_file_and_nothing_else():
    order = listed()
    rooms = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.name[0] not in "_."}
    ordered = {path[0] for path in order if len(path) > 1}

    assert {path[0] for path in order} == rooms - {"py"}
    for room in ordered:
        names = {file.stem for file in (PACKAGE / room).glob("*.py") if file.stem != "__init__"}
        assert {path[1] for path in order if path[0] == room and len(path) > 1} == names


@pytest.mark.parametrize(
    "name, allowed",
    [
        ("errors", set()),
        ("stacks", {"torch"}),
        ("layers", {"torch"}),
        ("selectors", {"torch"}),
        ("freezing", {"torch", "rich"}),
        ("conditions", set()),
        ("schedules", {"torch", "yaml"}),
        ("engine", {"torch"}),
    ],
)
def test_what_is_pure_knows_neither_transformers_nor_peft(name, allowed):
    others = {path[0] for path in imported_by(PACKAGE / f"{name}.py")} - {"hf_freeze", *sys.stdlib_module_names}

    assert others <= allowed
