"""`python -m hf_freeze.searching.worker PARENT ASKED`: a process that works at a search beside the one that started it.

What lives here: its beginning. What may not: anything else.
"""

from __future__ import annotations

import os
import sys

from .searcher import Asked, work


def main(parent: int, asked: str) -> int:
    """Works at a search as long as the parent lives; returns the exit code."""
    try:
        work(Asked.from_json(asked), alive=lambda: os.getppid() == parent)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2]))
