"""The report of a run: one HTML file with all pictures and tables in it, for which no network is needed.

What lives here: `write_report`, and what the page says in words and numbers. What may not: pictures (`plots.py`), how
the page looks (`page.html.j2`). How data passes through:

    folder -> RunRecord -> pictures as SVG, for wide and for narrow screens, and tables -> the page -> one file

The pictures are part of the page, and their text and axes have its colours, so that a dark page has dark pictures. All
that is put into the page as text is escaped by Jinja.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import hf_freeze

from ..errors import DataError
from ..writing import replacing
from .curves import time_text
from .plots import NARROW, WIDE, Picture, figure_of, pictures_of, require_matplotlib
from .reading import RecordedDecision, RecordedStage, RunRecord, outline, read_run
from .themes import PAGE

REPORT_FILE = "report.html"
_SHOWN = 60  # rows of the table of stages: one that samples has hundreds
_INK = {PAGE.ink: "var(--ink)", PAGE.muted: "var(--muted)", PAGE.grid: "var(--grid)", PAGE.frozen: "var(--frozen)"}


@dataclass(frozen=True)
class StageRow:
    """A row of the table of stages, as text."""

    number: str
    steps: str
    trains: str
    parameters: str
    rates: str
    seconds: str
    loss: str


@dataclass(frozen=True)
class DecisionRow:
    """A row of the table of decisions, as text."""

    step: str
    does: str
    reason: str
    statistics: str
    threshold: str


def write_report(output_dir: str | Path, path: str | Path | None = None) -> Path:
    """Writes the report of a run: its pictures, stages, decisions, metrics, audit, certificate and recipe, in one file.

    The file needs no network and no other file. Without matplotlib it has the tables alone, and says so.

    Args:
        output_dir: The folder of the run: the Trainer's ``output_dir``, or the recorder's.
        path: Where to write it; None for ``report.html`` in the folder.

    Returns:
        Where it was written.

    Raises:
        DataError: there is nothing of a run in the folder, or the file can't be written.

    Example:
        >>> write_report("outputs/nothing")
        Traceback (most recent call last):
        hf_freeze.errors.DataError: 'outputs/nothing' is no folder. Name the output_dir of a Trainer, or an output of
        hf-freeze.
    """
    record = read_run(output_dir)
    target = Path(path) if path is not None else Path(output_dir) / REPORT_FILE
    text = page_of(record, title=Path(output_dir).resolve().name)
    try:
        with replacing(target) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"The report can't be written to {str(target)!r} ({error}). Name another file.") from error
    return target


def page_of(record: RunRecord, title: str) -> str:
    """Returns the page of a run."""
    from jinja2 import ChainableUndefined, Environment, PackageLoader

    try:
        require_matplotlib()
        pictures = [drawn(record, picture) for picture in pictures_of(record)]
        note = "" if pictures else "There is nothing to draw: no step of the run was logged."
    except DataError as error:
        pictures, note = [], str(error)
    environment = Environment(
        loader=PackageLoader("hf_freeze", "report"), autoescape=True, undefined=ChainableUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html.j2").render(
        title=title,
        facts=facts(record),
        pictures=pictures,
        note=note,
        stages=stage_rows(record),
        more=max(0, len(record.stages) - _SHOWN),
        decisions=decision_rows(record),
        undecided=max(0, len(record.decisions) - _SHOWN),
        metrics=metric_rows(record),
        audit=record.audit,
        certificate=record.certificate,
        recipe=record.recipe,
        version=hf_freeze.__version__,
    )


def drawn(record: RunRecord, picture: Picture) -> dict[str, Any]:
    """Returns a picture for the page: title, sentence, and one SVG for each width, safe to be put in as they are."""
    from markupsafe import Markup

    widths = {"wide": WIDE, "narrow": NARROW}
    graphics = {key: Markup(svg_of(record, picture, width, f"{picture.name}-{key}")) for key, width in widths.items()}
    return {"title": picture.title, "says": picture.says, "graphics": graphics}


def svg_of(record: RunRecord, picture: Picture, width: float, name: str) -> str:
    """Returns a picture as SVG to be put into a page; all ids in it begin with `name`.

    Two pictures in a page would otherwise share theirs, and one that is not shown would take what it clips along.
    """
    import matplotlib as mpl

    written = io.StringIO()
    figure = figure_of(record, picture, PAGE, width)
    with mpl.rc_context(PAGE.settings(8)):
        figure.savefig(written, format="svg", dpi=100, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour, variable in _INK.items():
        text = text.replace(colour, variable)
    opening = rf'<svg \1 role="img" aria-label="{picture.says}">'  # without a size: the page says how wide it is
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', opening, text, count=1)


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """Returns what stands at the head of the page: a name and a text each."""
    total = sum(record.seconds.values())
    known = [own.parameters for own in record.segments if own.parameters is not None]
    ended = {True: "", False: " (did not end by itself)", None: ""}[record.ended]
    steps = f"{record.done:,}" + (f" of {record.planned:,}" if record.planned else "") + ended
    names = {"loss": "training loss", **{key: key.removeprefix("eval_") for key in record.metrics}}
    if "eval_loss" in names:
        names["eval_loss"] = "evaluation loss"
    last = {name: record.series(key)[1][-1] for key, name in names.items() if record.series(key)[1]}
    found = [
        ("model", record.model),
        ("parameters", f"{sum(known):,}" if known else None),
        ("optimizer steps", steps),
        ("time of steps", time_text(total) if total else None),
        *((name, number(own)) for name, own in last.items()),
        ("audit", _audit_in_short(record.audit)),
        ("certificate", None if record.certificate is None else str(record.certificate.get("verdict", "?"))),
    ]
    return [(name, text) for name, text in found if text]


def _audit_in_short(audit: Mapping[str, Any] | None) -> str | None:
    if audit is None:
        return None
    count = len(audit.get("findings", ()))
    return f"{count} finding{'' if count == 1 else 's'}" if count else "no findings"


def stage_rows(record: RunRecord) -> list[StageRow]:
    """Returns the table of stages."""
    return [_stage_row(record, stage) for stage in record.stages[:_SHOWN]]


def _stage_row(record: RunRecord, stage: RecordedStage) -> StageRow:
    sizes = {own.name: own.parameters for own in record.segments}
    whole = sum(size or 0 for size in sizes.values())
    count = round(sum(share * (sizes.get(name) or 0) for name, share in stage.trains.items()))
    rates = [rate for _, own in record.rate_samples(stage) for rate in own.values() if rate > 0]
    seconds = record.seconds_in(stage)
    losses = [own for step, own in zip(*record.series("loss"), strict=True) if stage.first < step <= stage.end]
    names = [*(own.name for own in record.segments if own.name in stage.trains)]
    parts = outline([name for name in names if stage.trains[name] < 1])
    wholes = outline([name for name in names if stage.trains[name] == 1])
    return StageRow(
        number=str(stage.number),
        steps=f"{stage.first + 1:,} to {stage.end:,}" if stage.end > stage.first + 1 else f"{stage.end:,}",
        trains=", ".join(filter(None, (wholes, f"parts of {parts}" if parts else ""))) or "nothing",
        parameters=f"{count:,} ({count / whole:.2%})" if whole else "",
        rates=" to ".join(dict.fromkeys(f"{rate:.2g}" for rate in (min(rates), max(rates)))) if rates else "",
        seconds=time_text(median(seconds)) if seconds else "",
        loss=" to ".join(dict.fromkeys(map(number, (losses[0], losses[-1])))) if losses else "",
    )


def decision_rows(record: RunRecord) -> list[DecisionRow]:
    """Returns the table of what a policy decided."""
    return [_decision_row(decision) for decision in record.decisions[:_SHOWN]]


def _decision_row(decision: RecordedDecision) -> DecisionRow:
    scaled = ", ".join(f"{selector} at {factor:.2g} of its rate" for selector, factor in decision.scale.items())
    does = {"freezes": decision.freezes, "unfreezes": decision.unfreezes, "sets": scaled}
    return DecisionRow(
        step=f"{decision.step:,}",
        does="; ".join(f"{verb} {what}" for verb, what in does.items() if what),
        reason=decision.reason,
        statistics=", ".join(f"{name} {number(value)}" for name, value in decision.statistics.items()),
        threshold="" if decision.threshold is None else number(decision.threshold),
    )


def metric_rows(record: RunRecord) -> tuple[Sequence[str], list[list[str]]]:
    """Returns the table of evaluations: the names of the metrics, and a row of texts a step."""
    names = record.metrics
    steps = sorted({log.step for log in record.logs if any(name in log.values for name in names)})[-_SHOWN:]
    values = {name: dict(zip(*record.series(name), strict=True)) for name in names}
    cells = {step: [number(own[step]) if step in own else "" for own in values.values()] for step in steps}
    return [name.removeprefix("eval_") for name in names], [[f"{step:,}", *row] for step, row in cells.items()]


def number(value: float) -> str:
    """Returns a measured number as text."""
    return f"{value:.4g}" if math.isfinite(value) else "not a number"


def in_short(record: RunRecord) -> dict[str, Any]:
    """Returns what a run was, in plain data; null stands for what is no number or not known."""
    last = {key: record.series(key)[1][-1] for key in ("loss", *record.metrics) if record.series(key)[1]}
    return {
        "source": str(record.source),
        "model": record.model,
        "steps": record.done,
        "planned": record.planned,
        "ended": record.ended,
        "seconds": round(sum(record.seconds.values()), 3) if record.seconds else None,
        "stages": [
            {"number": own.number, "first": own.first, "end": own.end, "trains": dict(own.trains)}
            for own in record.stages
        ],
        "decisions": [
            {"step": own.step, "reason": own.reason, "freezes": own.freezes or None, "unfreezes": own.unfreezes or None}
            for own in record.decisions
        ],
        "metrics": {key: value if math.isfinite(value) else None for key, value in last.items()},
        "findings": None if record.audit is None else [own.get("code") for own in record.audit["findings"]],
        "certificate": None if record.certificate is None else record.certificate.get("verdict"),
    }
