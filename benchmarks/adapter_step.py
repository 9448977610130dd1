"""A training step with bottleneck adapters, against the `adapters` library, PEFT's LoRA and full fine-tuning.

    python benchmarks/adapter_step.py

Makes a virtual environment with `adapters` 1.3.0 (which needs an older transformers) on its first run. All contenders
train the embedded BERT on the same tokens of the embedded news, in turns, each in a process of its own; a ratio below
1 means that the first is faster. hf_freeze runs twice for each placement: by `add_adapter` alone, which leaves the
base's dropout on as `adapters` does, and with the base frozen, as `AutoFreezeModelFor...(freeze="base")` has it, in
eval mode. Prints the medians over the rounds, with machine, versions, seed and date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
WORKER = HERE / "adapter_step_worker.py"
PEER = "adapters==1.3.0"
PLACEMENTS = ("pfeiffer", "houlsby", "parallel")


def main() -> None:
    """Runs all contenders in turns and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="How often each contender runs.")
    parser.add_argument("--steps", type=int, default=12, help="Timed steps in a run, after 3 that are not.")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="Threads of torch.")
    parser.add_argument("--cache", type=Path, default=Path("outputs/benchmarks"), help="Where the environment goes.")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    batch = write_batch(options.cache / "batch.json")
    peer = peer_python(options.cache / "adapters-1.3.0")
    contenders = {"full fine-tuning": (sys.executable, "full"), "LoRA r=8 (PEFT)": (sys.executable, "lora")}
    contenders["full fine-tuning, in the peer's environment"] = (peer, "full")
    contenders["hf_freeze, layer"] = (sys.executable, "layer")
    for placement in PLACEMENTS:
        contenders[f"hf_freeze, {placement}"] = (sys.executable, placement)
        contenders[f"hf_freeze, {placement}, base frozen"] = (sys.executable, f"{placement}+freeze")
        contenders[f"adapters, {placement}"] = (peer, placement)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(options.rounds):
        for name, (python, method) in contenders.items():
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr)
            results[name].append(run(python, method, batch, options.steps, options.threads))
    show(results, options)


def write_batch(path: Path) -> Path:
    """Writes 16 real texts, cut to 128 tokens, and the folder of the embedded model."""
    from transformers import AutoTokenizer

    from hf_freeze.data import embedded_model_path, load_corpus

    corpus, folder = load_corpus(seed=0), str(embedded_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(list(corpus.train.texts[:16]), truncation=True, max_length=128, padding="max_length")
    path.write_text(json.dumps({"model": folder, "labels": corpus.train.labels[:16], **dict(encoded)}))
    return path


def peer_python(folder: Path) -> str:
    """Returns the Python of an environment with the peer in it; makes it if it is not there."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"installing {PEER} into {folder}", file=sys.stderr)
        import torch

        venv.create(folder, with_pip=True, clear=True)
        version = torch.__version__.partition("+")[0]
        for package in (f"torch=={version}", PEER):
            subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=True)
        (folder / "complete").touch()
    return str(python.absolute())


def run(python: str, method: str, batch: Path, steps: int, threads: int) -> dict[str, float]:
    """Times one contender in a process of its own."""
    command = [python, str(WORKER), method, str(batch), str(steps), str(threads)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{method} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def show(results: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    """Prints the table, and the ratios that the bar speaks of."""
    import torch
    import transformers

    median = {name: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for name, runs in results.items()}
    full = median["full fine-tuning"]
    print("| contender | trainable | ms a step | against full | peak MiB |\n|---|---:|---:|---:|---:|")
    for name, row in median.items():
        ratio = row["ms"] / full["ms"]
        print(f"| {name} | {row['trainable']:,.0f} | {row['ms']:.0f} | {ratio:.2f} | {row['mib']:.0f} |")
    print()
    for name in (f"{placement}{way}" for placement in PLACEMENTS for way in ("", ", base frozen")):
        pairs = zip(results[f"hf_freeze, {name}"], results[f"adapters, {name.partition(',')[0]}"], strict=True)
        ratios = [ours["ms"] / theirs["ms"] for ours, theirs in pairs]
        print(f"{name}: hf_freeze / adapters = {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")
    print(
        f"\n{datetime.date.today()}, {platform.machine()}, {options.threads} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {PEER}; MiniLM, batch 16 x 128 tokens, AdamW, seed 0; medians of "
        f"{options.rounds} rounds of {options.steps} steps."
    )


if __name__ == "__main__":
    main()
