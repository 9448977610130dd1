"""Times training steps of one contender; run by `adapter_step.py`, maybe in another environment."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from typing import Any

import torch
from transformers import BertForSequenceClassification


def build(method: str, library: str, folder: str) -> torch.nn.Module:
    """Returns the embedded BERT with 5 classes, made ready to train by `method` of `library`."""
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=5)
    if method == "full":
        return model
    if library == "adapters":
        import adapters

        adapters.init(model)
        model.add_adapter(
            "news", config={"pfeiffer": "seq_bn", "houlsby": "double_seq_bn", "parallel": "par_bn"}[method]
        )
        model.train_adapter("news")
        return model
    if method == "lora":
        from peft import LoraConfig

        model.add_adapter(LoraConfig(r=8, target_modules=["query", "value"], modules_to_save=["classifier"]))
        return model
    from hf_freeze import BottleneckConfig, freeze

    placement, _, frozen = method.partition("+")
    preset: Any = getattr(BottleneckConfig, placement, BottleneckConfig)
    model.add_adapter(preset(modules_to_save=["classifier"]))
    if frozen:
        freeze(model, "base")
    return model


def main(method: str, batch_file: str, steps: int, threads: int) -> None:
    """Prints milliseconds a step (median), peak memory and the number of trainable parameters as JSON."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        import adapters  # noqa: F401

        library = "adapters"
    except ImportError:
        library = "hf_freeze"
    with open(batch_file) as file:
        content = json.load(file)
    model = build(method, library, content.pop("model"))
    batch = {name: torch.tensor(value) for name, value in content.items()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    model.train()
    times = []
    for step in range(steps + 3):
        begin = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 3:
            times.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    count = sum(parameter.numel() for parameter in trainable)
    print(json.dumps({"ms": 1000 * statistics.median(times), "mib": peak, "trainable": count}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
