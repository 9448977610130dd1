"""The file of a run's record: lines of JSON, written, read, and taken up by a run that goes on.

What lives here: the file. What may not: what the lines mean (`recording.py` writes them, `reading.py` understands
them). Each line is an object with a ``kind`` and a ``step``.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..writing import replacing

RECORD_FILE = "record.jsonl"


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a record; the last may be cut off, where a run was killed while it wrote it.

    Raises:
        DataError: another line is no line of a record.
    """
    lines = path.read_bytes().split(b"\n")
    read: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            entry = json.loads(line)
            if not (isinstance(entry["kind"], str) and isinstance(entry["step"], int)):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise DataError(f"Line {number} of '{path}' is no line of a record. Mend it, or delete the file.") from None
        read.append(entry)
    return read


def begin(path: Path, entry: Mapping[str, Any], history: Iterable[Mapping[str, Any]] = ()) -> None:
    """Writes the first line of a run into a record, behind what an earlier run has left that it goes on from.

    Args:
        path: The record, which need not exist.
        entry: The line, with the step that the run begins at.
        history: What the Trainer logged before, for a run that had no record so far.
    """
    step = entry["step"]
    kept: list[dict[str, Any]] = []
    if step and path.exists():
        try:
            kept = [line for line in lines_of(path) if _stays(line, step)]
        except DataError as error:
            warnings.warn(f"{error} The record begins anew.", stacklevel=4)
    if step and not kept:
        kept = [
            {"kind": "log", "step": log["step"], "logs": numbers(log)} for log in history if log.get("step", 0) <= step
        ]
    with replacing(path) as partial:
        partial.write_text("".join(map(as_line, [*kept, entry])), encoding="utf-8")


def _stays(line: Mapping[str, Any], step: int) -> bool:
    """Returns whether a line tells of what was done before a step; a stage's tells of the step behind it.

    Decisions are all written anew, from the checkpoint's log history.
    """
    return line["kind"] not in ("end", "decision") and (
        line["step"] < step or (line["step"] == step and line["kind"] != "stage")
    )


def as_line(entry: Mapping[str, Any]) -> str:
    """Returns an entry as a line of JSON, which has no word for what is not a number: null stands for it."""
    return json.dumps(_finite(entry), ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.8g}") if math.isfinite(value) else None
    return value


def numbers(logs: Mapping[str, Any]) -> dict[str, float | int]:
    """Returns what of some logs is a number, numpy's among them."""
    own = {key: value for key, value in logs.items() if isinstance(value, Real) and not isinstance(value, bool)}
    return {key: value if isinstance(value, int) else float(value) for key, value in own.items() if key != "step"}
