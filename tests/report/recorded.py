"""What the test of reports runs on two processes: a staged run, recorded, audited and certified, under DDP and FSDP2.

    python -m torch.distributed.run --nproc-per-node 2 tests/report/recorded.py FOLDER

Each rank leaves in ``FOLDER/SCENARIO.RANK.json`` what it wrote.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from sharded import fsdp_on_cpu
from torch import nn
from training import make_trainer, rows, tiny_bert

from hf_freeze import AuditCallback, CertifyCallback, RunRecorder, Stage, StagedUnfreezing, freeze
from hf_freeze.report import recording

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
BATCH = 4  # of all processes together
STAGES = [Stage(0, "head", lr=0.05), Stage("2 steps", "layers[-1], pooler", lr=0.02, layer_decay=0.5)]
SCENARIOS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "sharded": {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": "BertLayer"}},
}


def run(folder: Path, name: str) -> list[str]:
    """Trains on this process's share of the batches; returns the files that this process began to write."""
    options = SCENARIOS[name] if WORLD > 1 else {}
    model = tiny_bert()
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # each process draws its own
            module.p = 0.0
    freeze(model, "embeddings, layers[:2]")
    begun: list[str] = []

    def noted(path: Path, *arguments: Any) -> None:
        begun.append(path.name)
        begin(path, *arguments)

    begin = recording.begin
    callbacks = [StagedUnfreezing(STAGES), RunRecorder(), AuditCallback(), CertifyCallback()]
    with patch.object(recording, "begin", noted), fsdp_on_cpu() if options else nullcontext():
        trainer = make_trainer(
            folder / name,
            *callbacks,
            model=model,
            per_device_train_batch_size=BATCH // WORLD,
            optim="sgd",
            max_grad_norm=0.0,
            eval_strategy="steps",
            eval_steps=3,
            **options,
        )
        trainer.train_dataset = rows(3 * BATCH)
        trainer.train()
    return begun


if __name__ == "__main__":
    for scenario in SCENARIOS:
        written = run(Path(sys.argv[1]), scenario)
        (Path(sys.argv[1]) / f"{scenario}.{RANK}.json").write_text(json.dumps(written))
    if WORLD > 1:
        torch.distributed.destroy_process_group()
