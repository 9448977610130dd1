"""Checkpoints of a Trainer on disk: which one a run that was killed can go on from.

What lives here: telling a whole checkpoint from one whose writing was cut off. What may not: writing checkpoints, which
is the Trainer's. How data passes through:

    output_dir -> its checkpoints, newest first -> the first whose files are all whole
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

_FOLDER = re.compile(r"checkpoint-(\d+)")
_LAST_WRITTEN = "trainer_state.json"


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """Returns a Trainer's newest checkpoint that was written to its end; None if there is none.

    A process that is killed while it saves leaves half a checkpoint. ``resume_from_checkpoint=True`` takes that one,
    since it is the newest, and fails; or resumes without the random state of a process that had not written it yet
    (transformers 5.23). On several processes call it in each one, before any trains.

    Args:
        output_dir: The Trainer's output directory, which need not exist yet.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as output_dir:
        ...     half = Path(output_dir, "checkpoint-8")
        ...     half.mkdir()
        ...     print(last_whole_checkpoint(output_dir))  # trainer.train(resume_from_checkpoint=...)
        None
    """
    folder = Path(output_dir)
    steps = {path: match for path in folder.glob("*") if (match := _FOLDER.fullmatch(path.name))}
    newest_first = sorted(steps, key=lambda path: int(steps[path][1]), reverse=True)
    return next((str(path) for path in newest_first if is_whole(path)), None)


def is_whole(checkpoint: Path) -> bool:
    """Returns whether a checkpoint of a Trainer was written to its end.

    The main process writes ``trainer_state.json`` last. The others may be late with their random states, and each file
    may be cut off where a checkpoint is written again over an older half.
    """
    files = list(checkpoint.glob("*"))
    names = {path.name for path in files}
    # on more processes than one, each writes its own
    ranks = range(int(os.environ.get("WORLD_SIZE", 1))) if "rng_state_0.pth" in names else ()
    needed = {_LAST_WRITTEN, *(f"rng_state_{rank}.pth" for rank in ranks)}
    return needed <= names and all(_WHOLE.get(path.suffix, Path.exists)(path) for path in files)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def _is_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):  # compares the file's length with what its header says
            return True
    except SafetensorError:
        return False


# By suffix. torch.save writes zip files, whose directory comes last.
_WHOLE: dict[str, Callable[[Path], bool]] = {
    ".json": _is_json,
    ".safetensors": _is_safetensors,
    **dict.fromkeys((".pt", ".pth", ".bin"), zipfile.is_zipfile),
}
