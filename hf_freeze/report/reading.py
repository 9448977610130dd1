"""What is known of a run, read from its folder.

What lives here: `RunRecord`, what it is made of, and `read_run`. What may not: writing (`recording.py`), pictures,
torch. How data passes through:

    record.jsonl, or else the newest trainer_state.json -> lines -> stages, logs, seconds -> RunRecord
    audit.json, certificate.json, recipe.yaml, where they are -------------------------------^
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from .lines import RECORD_FILE, lines_of

STATE_FILE = "trainer_state.json"
AUDIT_FILE, CERTIFICATE_FILE, RECIPE_FILE = "audit.json", "certificate.json", "recipe.yaml"
_RATE = "freeze/lr/"  # what `StagedUnfreezing` logs of each segment that trains
_DECIDED = ("freezes", "unfreezes", "scale", "statistics", "threshold")  # what `AdaptiveFreezing` tells of a decision
_LAYER = re.compile(r"(?P<stack>.*layers)\[(?P<index>\d+)\](?P<inside>.*)")


@dataclass(frozen=True)
class RecordedSegment:
    """A segment of the model's layer map.

    Attributes:
        name: Its name in the selector language.
        kind: Its kind, see `hf_freeze.Segment`.
        parameters: How many scalars it owns; None where only a Trainer's state was left.
    """

    name: str
    kind: str
    parameters: int | None


@dataclass(frozen=True)
class RecordedStage:
    """A span of steps in which the same trained.

    Attributes:
        number: Its number, from 1.
        first: How many optimizer steps were done before it.
        end: How many were when it ended.
        trains: The share, above 0 and up to 1, of each segment of which something trained.
    """

    number: int
    first: int
    end: int
    trains: Mapping[str, float]


@dataclass(frozen=True)
class RecordedLog:
    """What was logged at a step.

    Attributes:
        step: Optimizer steps done.
        values: What the Trainer and its callbacks logged; what was no number is NaN.
        rates: The learning rate of each segment in the step just done.
        gradients: The L2 norm of the gradients of each segment in it, before clipping.
    """

    step: int
    values: Mapping[str, float]
    rates: Mapping[str, float] = field(default_factory=dict)
    gradients: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordedDecision:
    """What a policy has decided.

    Attributes:
        step: Optimizer steps done before.
        reason: Why.
        freezes: The selector of what stopped, if anything did.
        unfreezes: The selector of what began to train again.
        scale: Factors on rates, by selector.
        statistics: What it was decided by, part by part.
        threshold: What they were held against.
    """

    step: int
    reason: str
    freezes: str = ""
    unfreezes: str = ""
    scale: Mapping[str, float] = field(default_factory=dict)
    statistics: Mapping[str, float] = field(default_factory=dict)
    threshold: float | None = None

    @property
    def frozen(self) -> frozenset[str]:
        """The parts of `statistics` that it froze."""
        named = {term.partition(" - ")[0].removesuffix(".adapters") for term in self.freezes.split(", ")}
        return frozenset(named & self.statistics.keys())


@dataclass(frozen=True)
class RunRecord:
    """A run, as it was written down.

    Attributes:
        source: The file that it was read from.
        model: The class of the model; None where only a Trainer's state was left.
        planned: The optimizer steps that it was to have; 0 where that is not known.
        done: The optimizer steps that are known to be done, or begun.
        ended: Whether training ended by itself; None where that is not known.
        segments: The segments of the layer map, in depth order.
        stages: What trained when, in order.
        logs: What was logged, in order.
        started: The rates at the first step of each stage: steps done before it, and the rate of each segment.
        seconds: The seconds of each step, by the steps done with it.
        decisions: What a policy decided, in order.
        audit: What `audit.json` holds, if there is one.
        certificate: What `certificate.json` holds, if there is one.
        recipe: The text of `recipe.yaml`, if there is one.
    """

    source: Path
    model: str | None
    planned: int
    done: int
    ended: bool | None
    segments: tuple[RecordedSegment, ...]
    stages: tuple[RecordedStage, ...]
    logs: tuple[RecordedLog, ...]
    started: tuple[tuple[int, Mapping[str, float]], ...] = ()
    seconds: Mapping[int, float] = field(default_factory=dict)
    decisions: tuple[RecordedDecision, ...] = ()
    audit: Mapping[str, Any] | None = None
    certificate: Mapping[str, Any] | None = None
    recipe: str | None = None

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Returns the steps at which something was logged, and what; the later where one step was logged twice."""
        found = {log.step: log.values[key] for log in self.logs if key in log.values}
        return list(found), list(found.values())

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of what was evaluated: ``eval_loss``, ``eval_accuracy``; not how fast that was."""
        keys = (key for log in self.logs for key in log.values if key.startswith("eval_"))
        return tuple(key for key in dict.fromkeys(keys) if not key.endswith(("_runtime", "_per_second", "_time")))

    def rate_samples(self, stage: RecordedStage) -> list[tuple[int, Mapping[str, float]]]:
        """Returns the rates that are known within a stage, each with the number of steps done before it took effect."""
        known = dict(self.started) | {log.step - 1: log.rates for log in self.logs if log.rates}
        return [(step, known[step]) for step in sorted(known) if stage.first <= step < stage.end]

    def seconds_in(self, stage: RecordedStage) -> list[float]:
        """Returns the seconds of the steps of a stage."""
        return [own for step, own in self.seconds.items() if stage.first < step <= stage.end]


def read_run(folder: str | Path) -> RunRecord:
    """Reads what a run has left in its output folder.

    Args:
        folder: The folder of `RunRecorder` or the Trainer's ``output_dir``: `record.jsonl` is read, or else the newest
            `trainer_state.json`, its checkpoints' or its own.

    Raises:
        DataError: there is neither, or a file that can't be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} is no folder. Name the output_dir of a Trainer, or an output of hf-freeze.")
    others = {
        "audit": _audit(folder / AUDIT_FILE),
        "certificate": _json(folder / CERTIFICATE_FILE),
        "recipe": _text(folder / RECIPE_FILE),
    }
    if (folder / RECORD_FILE).is_file():
        return from_lines(folder / RECORD_FILE, lines_of(folder / RECORD_FILE), others)
    states = [*folder.glob(f"checkpoint-*/{STATE_FILE}"), folder / STATE_FILE]
    read = [(path, state) for path in states if (state := _json(path)) is not None]
    if not read:
        raise DataError(
            f"{str(folder)!r} holds neither {RECORD_FILE} nor a checkpoint with {STATE_FILE}. Pass "
            f"callbacks=[RunRecorder()] to the Trainer, or name its output_dir."
        )
    return from_state(*max(read, key=lambda own: own[1].get("global_step", 0)), others)


def from_lines(path: Path, lines: Sequence[Mapping[str, Any]], others: Mapping[str, Any]) -> RunRecord:
    """Makes a record of the lines that `RunRecorder` has written.

    Raises:
        DataError: no line tells of a run, or one lacks something.
    """
    if not any(line["kind"] == "run" for line in lines):
        raise DataError(f"'{path}' tells of no run. Train again with RunRecorder().")
    try:
        return _read(path, lines, others)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"'{path}' is not as RunRecorder writes it ({error!r}). Delete it, and train again.") from error


def _read(path: Path, lines: Sequence[Mapping[str, Any]], others: Mapping[str, Any]) -> RunRecord:
    kinds = ("run", "stage", "log", "step", "decision", "end")
    of = {kind: [line for line in lines if line["kind"] == kind] for kind in kinds}
    run = of["run"][-1]
    done = max(line["step"] + (line["kind"] == "stage") for line in lines)
    return RunRecord(
        source=path,
        model=run["model"],
        planned=run["steps"],
        done=done,
        ended=bool(of["end"]),
        segments=tuple(RecordedSegment(**own) for own in run["segments"]),
        stages=_spans(of["stage"], done),
        logs=tuple(
            RecordedLog(line["step"], *(_floats(line.get(key, {})) for key in ("logs", "rates", "gradients")))
            for line in of["log"]
        ),
        started=tuple((line["step"], _floats(line["rates"])) for line in of["stage"]),
        seconds={
            line["step"] - len(line["seconds"]) + at: float(own)
            for line in of["step"]
            for at, own in enumerate(line["seconds"], start=1)
        },
        decisions=tuple(map(_decision, of["decision"])),
        **others,
    )


def _spans(lines: Sequence[Mapping[str, Any]], done: int) -> tuple[RecordedStage, ...]:
    """Returns the stages; one that goes on behind a resumption is one stage."""
    begun: list[Mapping[str, Any]] = []
    for line in lines:
        if not begun or line["trains"] != begun[-1]["trains"] or line.get("scheduled"):
            begun.append(line)
    ends = [*(line["step"] for line in begun[1:]), done]
    return tuple(
        RecordedStage(number, line["step"], end, dict(line["trains"]))
        for number, (line, end) in enumerate(zip(begun, ends, strict=False), start=1)
    )


def from_state(path: Path, state: Mapping[str, Any], others: Mapping[str, Any]) -> RunRecord:
    """Makes a record of what a Trainer keeps in its checkpoints.

    What trained is known from the logs of `StagedUnfreezing` alone, to the nearest log or step in its schedule; a part
    of a segment counts as all of it.
    """
    logs = tuple(_log_of(entry) for entry in state.get("log_history", ()) if "step" in entry)
    names = dict.fromkeys(name for log in logs for name in log.rates)
    done = int(state.get("global_step", 0))
    recorded = state.get("stateful_callbacks", {}).get("hf_freeze") or {}
    written = [str(stage.get("start", "")).split(" ") for stage in recorded.get("stages", ())]
    starts = [int(words[0]) for words in written if words[1:] == ["steps"]]
    return RunRecord(
        source=path,
        model=None,
        planned=int(state.get("max_steps", 0)),
        done=done,
        ended=None,
        segments=tuple(RecordedSegment(name, _kind(name), None) for name in sorted(names, key=_depth)),
        stages=_stages_of(logs, starts, done),
        logs=logs,
        decisions=tuple(map(_decision, decisions_in(state.get("log_history", ())))),
        **others,
    )


def decisions_in(history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the decisions that `AdaptiveFreezing` has put into a log history, as they stand in lines of a record."""
    found = [entry for entry in history if "freeze/decision" in entry]
    keys = {"reason": "freeze/decision", **{key: f"freeze/{key}" for key in _DECIDED}}
    return [{"step": entry["step"], **{k: entry[own] for k, own in keys.items() if own in entry}} for entry in found]


def _decision(line: Mapping[str, Any]) -> RecordedDecision:
    return RecordedDecision(
        line["step"], line["reason"], line.get("freezes") or "", line.get("unfreezes") or "",
        _floats(line.get("scale", {})), _floats(line.get("statistics", {})), line.get("threshold"),
    )  # fmt: skip


def _log_of(entry: Mapping[str, Any]) -> RecordedLog:
    values = _floats({key: own for key, own in entry.items() if isinstance(own, int | float) and key != "step"})
    rates = {key.removeprefix(_RATE): own for key, own in values.items() if key.startswith(_RATE)}
    return RecordedLog(entry["step"], values, rates)


def _stages_of(logs: Sequence[RecordedLog], starts: Sequence[int], done: int) -> tuple[RecordedStage, ...]:
    begun: list[tuple[int, tuple[Any, tuple[str, ...]]]] = []
    before = 0
    for log in (log for log in logs if log.rates):
        own = (log.values.get("freeze/stage"), tuple(log.rates))
        if not begun or own != begun[-1][1]:
            begun.append((next((start for start in starts if before <= start < log.step), before), own))
        before = log.step
    ends = [*(step for step, _ in begun[1:]), done]
    return tuple(
        RecordedStage(number, step, end, dict.fromkeys(names, 1.0))
        for number, ((step, (_, names)), end) in enumerate(zip(begun, ends, strict=False), start=1)
    )


def _kind(name: str) -> str:
    match = _LAYER.fullmatch(name)
    return name.rpartition(".")[2] if not match else "adapters" if match["inside"] else "layer"


def _depth(name: str) -> tuple[int, str, int, str]:
    """Returns the sort key of a segment of which nothing but the name is known."""
    match = _LAYER.fullmatch(name)
    if match:
        return (1, match["stack"], int(match["index"]), match["inside"])
    return ({"embeddings": 0, "norm": 2, "pooler": 3, "other": 4, "head": 5}.get(name.rpartition(".")[2], 4), "", 0, "")


def outline(names: Sequence[str]) -> str:
    """Returns some segments in one line.

    >>> outline(["embeddings", "layers[0]", "layers[1]", "layers[3]", "head"])
    'embeddings, layers[0:2], layers[3], head'
    """
    spans: list[tuple[str, str, list[int]]] = []
    for name in names:
        match = _LAYER.fullmatch(name)
        stack, inside, index = (match["stack"], match["inside"], [int(match["index"])]) if match else (name, "", [])
        like = [span for span in spans if span[:2] == (stack, inside)]
        if index and like and like[-1][2][-1] == index[0] - 1:
            like[-1][2].append(index[0])
        else:
            spans.append((stack, inside, index))
    return ", ".join(stack + _between(indices) + inside for stack, inside, indices in spans)


def _between(indices: Sequence[int]) -> str:
    if len(indices) < 2:
        return "".join(f"[{index}]" for index in indices)
    return f"[{indices[0]}:{indices[-1] + 1}]"


def _floats(numbers: Mapping[str, Any]) -> dict[str, float]:
    return {key: math.nan if own is None else float(own) for key, own in numbers.items()}


def _audit(path: Path) -> Any:
    audit = _json(path)
    findings = [] if audit is None else audit.get("findings")
    if not isinstance(findings, list) or not all(isinstance(finding, dict) for finding in findings):
        raise DataError(f"'{path}' holds no list of findings. Delete it, or audit anew.")
    return audit


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _json(path: Path) -> Any:
    text = _text(path)
    if text is None:
        return None
    try:
        read = json.loads(text)
    except ValueError as error:
        raise DataError(f"'{path}' can't be read: {error}. Delete it, or write it anew.") from error
    if not isinstance(read, dict):
        raise DataError(f"'{path}' holds {type(read).__name__} where an object was expected. Delete it.")
    return read
