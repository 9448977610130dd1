"""Files that are there whole or not at all, whatever is written into them.

What lives here: `replacing`. What may not: what is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
