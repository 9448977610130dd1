"""The wheel: what is in it, and that it runs where nothing of the clone is."""

from __future__ import annotations

import email
import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import hf_freeze

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

# The demo as it is, on fewer and shorter texts, through the wheel's own command.
SMALL_DEMO = """
import sys
from hf_freeze import cli
from hf_freeze.cli import demo_methods
demo_methods.LIMIT, demo_methods.MAX_LENGTH = 40, 8
demo_methods.SETTINGS = {name: (rate, 2.0) for name, (rate, _) in demo_methods.SETTINGS.items()}
sys.argv = ["hf-freeze", "demo", "--output", "out"]
cli.main()
"""


def done(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the clone: by the hatchling that is installed here, else by one that pip fetches."""
    folder = tmp_path_factory.mktemp("wheel")
    here = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    done(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *here, "--wheel-dir", folder, ROOT, cwd=folder)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory) -> Path:
    """The programs of an environment with the wheel in it, and this one's packages behind it without the clone."""
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, symlinks=True)
    programs = home / "bin"
    own = done(programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip()
    # a plain path: .pth files in that folder, by which the clone is found, are not read
    Path(own, "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ("--quiet", "--no-deps", "--no-index", "--ignore-installed")
    done(programs / "python", "-m", "pip", "install", *options, wheel, cwd=home)
    return programs


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel):
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_freeze").rglob("*") if path.is_file()}
    package = {path for path in package if "__pycache__" not in path}

    assert {name for name in names(wheel) if ".dist-info/" not in name} == package
    assert {"hf_freeze/py.typed", "hf_freeze/report/page.html.j2", "hf_freeze/recipes/fast.yaml"} <= package


def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        folder = f"hf_freeze-{hf_freeze.__version__}.dist-info"
        told = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        commands = archive.read(f"{folder}/entry_points.txt").decode()

    assert (told["Name"], told["Version"]) == ("hf-freeze", hf_freeze.__version__)
    assert "hf-freeze = hf_freeze.cli:main" in commands
    assert f"{folder}/licenses/LICENSE" in names(wheel)
    assert "# hf_freeze" in told.get_payload()


def test_the_wheel_is_what_runs_in_a_clean_environment(clean, tmp_path):
    found = done(clean / "python", "-c", "import hf_freeze; print(hf_freeze.__file__)", cwd=tmp_path).strip()

    assert Path(found).is_relative_to(clean.parent)
    assert "inspect" in done(clean / "hf-freeze", "--help", cwd=tmp_path)
    assert "lp-ft" in done(clean / "hf-freeze", "recipe", "list", cwd=tmp_path)


def test_the_demo_and_its_report_run_from_the_wheel(clean, tmp_path):
    shown = done(clean / "python", "-c", SMALL_DEMO, cwd=tmp_path)

    assert "points from full fine-tuning" in shown and "bit for bit" in shown
    done(clean / "hf-freeze", "report", "out", cwd=tmp_path)
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
