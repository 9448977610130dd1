"""What tests of examples share: where the scripts are, and how one is loaded."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if "def main(" in path.read_text())  # not what they share


def load(name: str) -> ModuleType:
    """Imports an example as its own process would, which finds what lies beside the script."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(name)
