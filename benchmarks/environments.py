"""Virtual environments for peers that can't live beside hf_freeze, made once and kept."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path


def python_of(folder: Path, packages: Sequence[str]) -> str:
    """Returns the Python of an environment with these packages in it; makes it, or adds to it, where they lack.

    Args:
        folder: Where the environment goes. Its file ``complete`` names what has been installed.
        packages: What pip installs, one after another: torch first, at the version in use here, so that nothing
            else brings another.
    """
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        venv.create(folder, with_pip=True, clear=True)
    installed = complete.read_text(encoding="utf-8").split() if complete.exists() else []
    for package in packages:
        if package not in installed:
            print(f"installing {package} into {folder}", file=sys.stderr)
            subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=True)
            installed.append(package)
    complete.write_text("\n".join(installed), encoding="utf-8")
    return str(python.absolute())
