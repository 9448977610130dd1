"""How the pictures look: colours for a light page, a dark one, and one that changes by itself.

What lives here: `Theme`. What may not: matplotlib, data. Maps are viridis and cividis, which colour-blind readers see
as others do, and whose order is seen in grey too; lines have the colours of Okabe and Ito (2008), without the two that
are lost on white or on black.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1, 1, 1)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
RATES, NORMS = "viridis", "cividis"
ZERO, BROKEN = "#CC79A7", "#D55E00"  # a gradient of nothing but zeros; one that is no number


@dataclass(frozen=True)
class Theme:
    """The colours of a picture.

    Attributes:
        paper: What it is drawn on.
        ink: Text.
        muted: Axes, the lines between stages.
        grid: Lines behind the data.
        frozen: What does not train.
    """

    paper: str
    ink: str
    muted: str
    grid: str
    frozen: str

    def settings(self, size: float) -> dict[Any, Any]:
        """Returns matplotlib's settings for text of `size` points."""
        return {
            "font.size": size,
            "font.family": "sans-serif",
            "axes.titlesize": size + 1.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.titlepad": 6 + size,  # the stages' names stand between title and axes
            "axes.labelsize": size,
            "xtick.labelsize": size,
            "ytick.labelsize": size,
            "legend.fontsize": size,
            "legend.frameon": False,
            "figure.facecolor": self.paper,
            "savefig.facecolor": self.paper,
            "axes.facecolor": self.paper,
            "axes.edgecolor": self.muted,
            "axes.labelcolor": self.ink,
            "axes.titlecolor": self.ink,
            "text.color": self.ink,
            "xtick.color": self.muted,
            "ytick.color": self.muted,
            "xtick.labelcolor": self.ink,
            "ytick.labelcolor": self.ink,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "grid.color": self.grid,
            "grid.linewidth": 0.6,
            "axes.linewidth": 0.8,
            "lines.linewidth": 1.6,
            "hatch.linewidth": 0.8,
            "svg.fonttype": "none",  # text stays text
            "svg.hashsalt": "hf_freeze",  # the same picture is the same file
        }


LIGHT = Theme(paper="#ffffff", ink="#1b1f24", muted="#57606a", grid="#d8dee4", frozen="#d3d8de")
DARK = Theme(paper="#14181d", ink="#e6e9ed", muted="#9aa4af", grid="#2d343c", frozen="#3d464f")
# Stands for the page's own colours, which its style sheet names: see `html.py`.
PAGE = Theme(paper="none", ink="#010101", muted="#020202", grid="#030303", frozen="#040404")
