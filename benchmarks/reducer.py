"""What DDP costs in a stage that trains the head alone: one reducer over all stages, against one made anew for each.

    python benchmarks/reducer.py

The embedded BERT on two processes of this machine (gloo), in a plain loop with a schedule of two stages, of which the
first is on. The kinds run in turns. Prints medians with machine, versions, seed, date.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification, get_scheduler

from hf_freeze import Stage, UnfreezeSchedule, attach_schedule
from hf_freeze.data import embedded_model_path

PROCESSES, SEED, TOKENS = 2, 0, 128
SCHEDULE = UnfreezeSchedule([Stage(0, "head"), Stage("90%", "all")])
# whether the reducer is made anew, and find_unused_parameters
KINDS = {
    "one reducer for all stages": (False, True),
    "made anew, find_unused_parameters": (True, True),
    "made anew": (True, False),
}


def step_times(anew: bool, find_unused: bool, batch: int, steps: int) -> list[float]:
    """Returns the seconds that each step takes, in the first stage."""
    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(embedded_model_path(), num_labels=5)
    wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with patch("hf_freeze.distributed.can_rebuild", return_value=anew):
        attach_schedule(SCHEDULE, wrapped, optimizer, get_scheduler("constant", optimizer), total_steps=10 * steps)
    ids, labels = torch.randint(1000, 20000, (batch, TOKENS)), torch.randint(5, (batch,))
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        wrapped.train()(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begin)
    return times


def work(rank: int, store: str, args: argparse.Namespace) -> None:
    """Measures on one process; the first prints the table."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(args.rounds):
        for kind, options in KINDS.items():
            times[kind] += step_times(*options, args.batch, args.steps)[3:]
    if rank == 0:
        print(f"{PROCESSES} processes, gloo, a thread each; {args.batch} x {TOKENS} tokens a process; seed {SEED}")
        print(
            f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        )
        print(f"torch {torch.__version__}, transformers {transformers.__version__}; medians of {args.rounds} rounds\n")
        for kind, own in times.items():
            print(f"{kind:34} {1000 * statistics.median(own):6.1f} ms a step")
    torch.distributed.destroy_process_group()


def main() -> None:
    """Starts the processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="Runs of each kind, in turns.")
    parser.add_argument("--steps", type=int, default=15, help="Steps of a run; the first 3 do not count.")
    parser.add_argument("--batch", type=int, default=4, help="Rows of each process.")
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (str(Path(folder, "store")), parser.parse_args()), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
