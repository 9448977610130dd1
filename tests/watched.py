"""What the tests of audits and certificates run on two processes.

    python -m torch.distributed.run --nproc-per-node 2 tests/watched.py FOLDER

Each rank writes what happened to ``FOLDER/SCENARIO.RANK.json``.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from sharded import fsdp_on_cpu
from torch.distributed.tensor import DTensor
from training import make_trainer, tiny_bert
from transformers import TrainerCallback

from hf_freeze import AuditCallback, CertifyCallback, Stage, StagedUnfreezing, freeze
from hf_freeze.errors import CertificateError

RANK = int(os.environ.get("RANK", 0))
STAGES = [Stage(0, "head"), Stage("3 steps", "layers[-1]")]
SHARDED = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": "BertLayer"}}
SCENARIOS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "sharded": SHARDED,
    "ddp, broken": {"breaks": True},
    "sharded, broken": {**SHARDED, "breaks": True},
}


class Breaks(TrainerCallback):
    """Writes into a frozen weight, on the last process alone."""

    def on_step_end(self, args, state, control, **kwargs):
        if RANK == 1 and state.global_step == 2:
            weight = kwargs["model"].get_parameter("bert.encoder.layer.0.output.dense.weight")
            (weight.to_local() if isinstance(weight, DTensor) else weight).data.add_(1e-3)


def run(folder: Path, name: str) -> dict[str, Any]:
    options = dict(SCENARIOS[name])
    audits, certifies = AuditCallback(first=10), CertifyCallback()
    callbacks = [StagedUnfreezing(STAGES), audits, certifies, *([Breaks()] if options.pop("breaks", False) else [])]
    model = tiny_bert()
    freeze(model, "embeddings, layers[:2]")
    error = None
    with warnings.catch_warnings(record=True) as caught, fsdp_on_cpu() if "fsdp" in options else nullcontext():
        warnings.simplefilter("always")
        # an evaluation at the end leaves FSDP2's outermost module whole
        options |= {"learning_rate": 1e-3, "eval_strategy": "steps", "eval_steps": 1}
        try:
            make_trainer(folder / name, *callbacks, model=model, **options).train()
        except CertificateError as raised:
            error = str(raised)
    told = [str(each.message) for each in caught if str(each.message).startswith(("HF0", "The run is not"))]
    return {"error": error, "told": told, "audited": None if audits.report is None else audits.report.to_dict()}


if __name__ == "__main__":
    for scenario in SCENARIOS:
        happened = run(Path(sys.argv[1]), scenario)
        (Path(sys.argv[1]) / f"{scenario}.{RANK}.json").write_text(json.dumps(happened))
    torch.distributed.destroy_process_group()
