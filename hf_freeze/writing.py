"""Files that are there whole or not at all, whatever is written into them.

What lives here: `replacing`, and `write_json`, which goes by it. What may not: what stands in the files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to, and puts what was written there in its place; makes missing folders.

    Raises:
        OSError: it can't be written there.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     with replacing(Path(folder, "new", "a.txt")) as partial:
    ...         _ = partial.write_text("whole")
    ...     print(*(file.name for file in Path(folder, "new").iterdir()))
    a.txt
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a JSON file.

    Raises:
        OSError: it can't be written there.
    """
    with replacing(Path(path)) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
