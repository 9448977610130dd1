"""The reference checkpoints of AdapterHub in `tests/fixtures/adapterhub`, and models to load them into.

`python -m tests.adapters.hub` prints the figures that the manual gives.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

ROOT = Path(__file__).parents[1] / "fixtures" / "adapterhub"
CASES = sorted(path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("*/*/io.safetensors"))
WITH_HEAD = [case for case in CASES if (ROOT / case / "adapter" / "head_config.json").exists()]
BODIES = [case for case in CASES if case not in WITH_HEAD]


def adapter(case: str) -> Path:
    """The folder that the `adapters` library wrote."""
    return ROOT / case / "adapter"


def base_model(case: str) -> PreTrainedModel:
    """The tiny base model of a case, in eval mode; with a classifier of three classes where the case has a head."""
    return copy.deepcopy(_load(ROOT / Path(case).parts[0] / "base", case in WITH_HEAD))


@functools.cache
def _load(folder: Path, head: bool) -> PreTrainedModel:
    (name,) = AutoConfig.from_pretrained(folder).architectures
    if head:
        torch.manual_seed(1)  # its classifier is not in the folder
        name = name.removesuffix("Model") + "ForSequenceClassification"
        return getattr(transformers, name).from_pretrained(folder, num_labels=3).eval()
    return getattr(transformers, name).from_pretrained(folder).eval()


def expected(case: str) -> dict[str, Tensor]:
    """What `adapters` computed: ``output``, and ``base_output`` without the adapter (not for a head)."""
    return {name: tensor for name, tensor in load_file(ROOT / case / "io.safetensors").items() if "output" in name}


def output(model: torch.nn.Module, case: str) -> Tensor:
    """The model's first output for the inputs of a case."""
    inputs = {name: t for name, t in load_file(ROOT / case / "io.safetensors").items() if "output" not in name}
    with torch.no_grad():
        return model(**inputs)[0]


def print_figures() -> None:
    """Prints the largest difference from what `adapters` computed, for each checkpoint, as the manual has it."""
    from hf_freeze import load_adapterhub

    print("| checkpoint | base | with the adapter |\n|---|---|---|")
    for case in CASES:
        model, wanted = base_model(case), expected(case)
        base = f"{(output(model, case) - wanted['base_output']).abs().max():.1e}" if case in BODIES else "-"
        load_adapterhub(model, adapter(case))
        print(f"| {case} | {base} | {(output(model, case) - wanted['output']).abs().max():.1e} |")


if __name__ == "__main__":
    print_figures()
