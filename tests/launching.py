"""A script on several real processes, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys


def launch(script: str, *arguments: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Runs a script on so many processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*command, script, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
