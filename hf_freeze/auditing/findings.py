"""What an audit has found, as data and as a table.

What lives here: `Finding` and `AuditReport`. What may not: finding anything. How data passes through:

    findings -> AuditReport, the worst first -> rich table, text, HTML, a dict for audit.json
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import AuditError, nearest
from ..rendering import printed
from ..writing import write_json
from .codes import CODES, SEVERITIES, Severity, Symptom

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_SHOWN = 4  # names in a table or a line
_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


@dataclass(frozen=True)
class Finding:
    """One thing that an audit has found.

    Args:
        code: ``HF001`` and so on; each has a section in the manual.
        names: What it is about, in the selector language: segments, and parameters or modules.
        cause: What was seen, with its figures.

    Raises:
        AuditError: there is no such code.

    Example:
        >>> Finding("HF001", cause="No parameter requires a gradient.").severity
        'error'
    """

    code: str
    names: tuple[str, ...] = ()
    cause: str = ""

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise AuditError(f"{self.code!r} is no code of an audit.{nearest(self.code, CODES)} HF001 is the first.")

    @property
    def severity(self) -> Severity:
        """``error``, ``warning`` or ``note``."""
        return CODES[self.code].severity

    @property
    def title(self) -> str:
        """What is found, in a few words."""
        return CODES[self.code].title

    @property
    def mend(self) -> str:
        """What to do."""
        return CODES[self.code].mend

    def __str__(self) -> str:
        about = f" ({shortened(self.names)})" if self.names else ""
        return f"{self.code}: {self.title}{about}. {self.cause} {self.mend}"

    def to_dict(self) -> dict[str, Any]:
        """Returns it as it stands in ``audit.json``."""
        return {
            "code": self.code,
            "severity": self.severity,
            "title": self.title,
            "names": list(self.names),
            "cause": self.cause,
            "mend": self.mend,
        }


@dataclass(frozen=True)
class SegmentFigures:
    """What was measured of one segment; None for what was not.

    Attributes:
        segment: Its name.
        trainable: Its parameters (scalars) that train.
        gradient: Its relative gradient, the norm of its gradients over that of the weights that have them.
        saved: Bytes of activations that it keeps for the backward pass.
    """

    segment: str
    trainable: int
    gradient: float | None = None
    saved: int | None = None


@printed
@dataclass(frozen=True, repr=False)
class AuditReport:
    """What an audit has found, the worst first. Prints as a table; true when there is no error in it.

    Attributes:
        model_class: The class of the model.
        findings: What was found.
        figures: What was measured, by segment, in depth order.
        symptom: The symptom that was asked about; None where all was looked at.
        answer: The answer to the symptom.
        step: The optimizer step at which it was audited, if known.
    """

    model_class: str
    findings: tuple[Finding, ...] = ()
    figures: tuple[SegmentFigures, ...] = ()
    symptom: Symptom | None = None
    answer: str | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        worst_first = sorted(self.findings, key=lambda finding: (SEVERITIES.index(finding.severity), finding.code))
        object.__setattr__(self, "findings", tuple(worst_first))

    @property
    def ok(self) -> bool:
        """Whether there is no error among the findings; warnings and notes may be there."""
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of the findings, the worst first."""
        return tuple(finding.code for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Returns it as ``audit.json`` holds it; with a symptom, its answer and the figures too."""
        import hf_freeze  # here, since it imports this file when it is asked for a public name

        own = {
            "version": hf_freeze.__version__,
            "step": self.step,
            "findings": [each.to_dict() for each in self.findings],
        }
        if self.symptom is None:
            return own
        return {**own, "symptom": self.symptom, "answer": self.answer, "figures": [vars(row) for row in self.figures]}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes ``audit.json``, under another name first, so that there is never half of it."""
        write_json(self.to_dict(), path)

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        parts: list[Any] = [Text(self.answer)] if self.answer else []
        parts += [self._finding_table()] if self.findings else [f"{self.model_class}: nothing found."]
        parts += [self._figure_table()] if self.figures and self.symptom else []
        return Group(*parts)

    def _finding_table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        at = "" if self.step is None else f", step {self.step}"
        table = Table(title=f"Audit of {self.model_class}{at}", show_lines=True)
        for heading in ("code", "severity", "what", "cause and mend"):
            table.add_column(heading, overflow="fold", no_wrap=heading == "code")
        for found in self.findings:
            about = f"{found.title}: {shortened(found.names)}" if found.names else found.title
            told = Text(f"{found.cause} {found.mend}")  # rich would take the k of 'layers[k]' for a style
            table.add_row(found.code, found.severity, Text(about), told, style=_STYLES[found.severity])
        return table

    def _figure_table(self) -> Table:
        from rich.table import Table

        table = Table(title="By segment")
        measured = [
            ("trainable", lambda row: f"{row.trainable:,}"),
            ("relative gradient", lambda row: None if row.gradient is None else f"{row.gradient:.2g}"),
            ("activations kept", lambda row: None if row.saved is None else in_bytes(row.saved)),
        ]
        shown = [(title, cell) for title, cell in measured if any(cell(row) is not None for row in self.figures)]
        table.add_column("segment", overflow="fold")
        for title, _ in shown:
            table.add_column(title, justify="right")
        for row in self.figures:
            table.add_row(row.segment, *(cell(row) or "" for _, cell in shown))
        return table


def merged(earlier: Iterable[Finding], later: Iterable[Finding]) -> tuple[Finding, ...]:
    """Returns one finding for each code of two audits: the earlier's cause, and the names of both.

    >>> merged([Finding("HF013", ("layers[0]",))], [Finding("HF013", ("layers[1]",))])[0].names
    ('layers[0]', 'layers[1]')
    """
    found: dict[str, Finding] = {}
    for each in (*earlier, *later):
        known = found.get(each.code, each)
        found[each.code] = replace(known, names=tuple(dict.fromkeys((*known.names, *each.names))))
    return tuple(found.values())


def shortened(names: tuple[str, ...]) -> str:
    """Returns names in a line, the first few of many.

    >>> shortened(tuple("abcdef"))
    'a, b, c, d and 2 more'
    """
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def in_bytes(count: int) -> str:
    """Returns a size to be read.

    >>> in_bytes(3 * 2**20)
    '3.0 MiB'
    """
    size, units = float(count), iter(("KiB", "MiB", "GiB"))
    unit = "B"
    while size >= 1024 and (larger := next(units, None)):
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
