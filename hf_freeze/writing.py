"""JSON files that are there whole or not at all.

What lives here: `write_json`. What may not: what stands in the files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a JSON file under another name first, and then gives it its own; folders that are missing are made.

    Raises:
        OSError: it can't be written there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
