"""What a plan says against what training takes: parameters, optimizer state, activations.

    python benchmarks/plan.py

Tiny BERT, GPT-2, ViT and T5, and the embedded MiniLM at its real size; full, with the lower half frozen, with adapters.
Planned from the config alone; measured on the CPU in one real step: with a real AdamW, with the tensors that autograd
keeps, and with what torch's allocator has handed out and not got back at the end of the forward pass.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_freeze import plan
from hf_freeze.planning.step import follow, training_inputs

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.planning.models import TINY, WAYS, minilm, tiny, trained

SEED = 0


def main() -> None:
    """Plans, measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=8, help="Rows of a step.")
    parser.add_argument("--length", type=int, default=128, help="Tokens of a row.")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print("| model | way | parameters | state | activations: planned | kept by autograd | ratio | allocated | ratio |")
    print("|---|---|---|---|---:|---:|---:|---:|---:|")
    for name in (*TINY, "MiniLM"):
        for way, told in WAYS.items():
            if name == "MiniLM" and "freeze" in told:
                told = {"freeze": "embeddings, layers[:3]"}
            print(row(name, way, told, options.batch_size, options.length))
    print(
        f"\n{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {options.batch_size} rows of {options.length} tokens, seed {SEED}."
    )


def row(name: str, way: str, told: dict[str, Any], rows: int, tokens: int) -> str:
    """Returns a line of the table."""
    torch.manual_seed(SEED)
    model = minilm() if name == "MiniLM" else tiny(name)
    costs = plan("embedded" if name == "MiniLM" else model, batch_size=rows, length=tokens, **told).costs
    model = trained(model, told)
    inputs = training_inputs(model, rows, tokens)
    kept, handed_out = follow(model, inputs).activations, allocated(model, inputs)
    optimizer = torch.optim.AdamW([own for own in model.parameters() if own.requires_grad])
    model(**inputs).loss.backward()
    optimizer.step()
    state = sum(value.nbytes for own in optimizer.state.values() for value in own.values())
    cells = [
        name,
        way,
        compared(costs.parameters, sum(own.numel() for own in model.parameters())),
        compared(costs.state, state),
        f"{costs.activations:,}",
        f"{kept:,}",
        f"{costs.activations / kept:.3f}",
        f"{handed_out:,}",
        f"{costs.activations / handed_out:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def compared(planned: int, found: int) -> str:
    """Returns a number with what was measured, where that is another."""
    return f"{planned:,}" if planned == found else f"{planned:,} (measured {found:,})"


def allocated(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    """Returns the bytes that the forward pass has been given and not given back, but for the loss and the outputs."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        loss = model(**inputs).loss
    assert loss.requires_grad  # it is alive, and so is all that its backward pass needs
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages())


if __name__ == "__main__":
    main()
