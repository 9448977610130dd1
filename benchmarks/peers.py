"""hf_freeze side by side with what else there is: seconds, accuracy, memory, parameters.

    python benchmarks/peers.py            # about half an hour on 2 cores; writes docs/benchmarks.md
    python benchmarks/peers.py --quick    # that it runs: a few short texts, no figures to go by, no page
    python benchmarks/peers.py --redraw   # the page anew from the results that were kept

Full fine-tuning, freezing by hand, the `adapters` library, PEFT's LoRA, Lightning's `BackboneFinetuning` and three ways
of hf_freeze train the embedded BERT on the same texts of the embedded news, from the same weights (the new head's
included), each in a process of its own. Peers that can't live beside hf_freeze get virtual environments, made on the
first run. First each rate of a contender's grid is tried once, and judged on the validation texts; these runs are not
timed, and go side by side, each on one thread. Then each contender runs at its best rate under each seed, in turns, one
at a time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from environments import python_of
from pages import BENCHMARKS, with_section, write
from peers_page import best_rate, draw, runs_of, section

HERE = Path(__file__).parent
WORKER = HERE / "peers_worker.py"
PICTURE = "pictures/peers.png"  # beside the page
ADAPTERS, LIGHTNING = "adapters-1.3.0", "lightning-2.6.6"
SPLIT_SEED = 0


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        method: Of `peers_worker.py`.
        epochs: Passes over the texts.
        rates: Peak learning rates to try; none where the one of the contender above is taken, of the same arithmetic.
        environment: Where it runs, if not in this environment.
    """

    method: str
    epochs: int
    rates: tuple[float, ...] = ()
    environment: str | None = None


CONTENDERS = {
    "full fine-tuning": Contender("full", 3, (1e-4, 2e-4, 4e-4)),
    "4 of 6 layers frozen by hand": Contender("by_hand", 3, (2e-4, 4e-4, 8e-4)),
    "adapters 1.3.0": Contender("adapter_library", 6, (3e-4, 1e-3, 3e-3), ADAPTERS),
    "LoRA r=8 (PEFT)": Contender("lora", 6, (3e-4, 1e-3, 3e-3)),
    "Lightning BackboneFinetuning": Contender("lightning", 4, (5e-4, 1e-3, 2e-3), LIGHTNING),
    "hf_freeze, adapters": Contender("our_adapters", 6, (3e-4, 1e-3, 3e-3)),
    "hf_freeze, staged": Contender("staged", 3, (2e-4, 4e-4, 8e-4)),
    "hf_freeze, staged + cache": Contender("staged_cached", 3),
}


@dataclass(frozen=True)
class Size:
    """How much is trained and tested: texts of each split, and their tokens."""

    train: int
    validation: int
    test: int
    length: int


FULL_SIZE, QUICK_SIZE = Size(320, 200, 400, 64), Size(48, 32, 32, 24)


def main() -> None:
    """Runs all contenders, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="Seeds of head, dropout and shuffling.")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="Threads of torch.")
    parser.add_argument("--tokens", type=int, default=FULL_SIZE.length, help="Of each text.")
    parser.add_argument("--cache", type=Path, default=Path("outputs/benchmarks"), help="Where files go.")
    parser.add_argument("--quick", action="store_true", help="A few short texts, two epochs, one rate, one seed.")
    parser.add_argument("--redraw", action="store_true", help="Write the page from the results that were kept.")
    options = parser.parse_args()
    folder = options.cache / ("peers-quick" if options.quick else "peers")
    file = folder / "results.json"
    if not options.redraw:
        measure(options, folder, file)
    show(json.loads(file.read_text(encoding="utf-8")), folder if options.quick else None)


def measure(options: argparse.Namespace, folder: Path, file: Path) -> None:
    """Tries the rates, runs each contender under each seed, and keeps the results."""
    seeds = range(1 if options.quick else options.seeds)
    size = QUICK_SIZE if options.quick else replace(FULL_SIZE, length=options.tokens)
    prepare(folder, size, seeds)
    pythons = environments(options.cache)
    trials = try_rates(pythons, folder, options.threads, options.quick)
    results: dict[str, Any] = {
        "date": str(datetime.date.today()),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {options.threads} threads",
        "size": vars(size),
        "seeds": list(seeds),
        "trials": {name: list(own.items()) for name, own in trials.items()},
        "rates": best_rates(trials),
        "runs": {name: [] for name in CONTENDERS},
    }
    for seed in seeds:
        for name, contender in CONTENDERS.items():
            print(f"seed {seed}: {name}", file=sys.stderr)
            rate, epochs = results["rates"][name], 2 if options.quick else contender.epochs
            found = run(pythons, contender, folder, rate, epochs, seed, options.threads, measured=True)
            results["runs"][name].append(found)
            write(file, json.dumps(results, indent=1))


def best_rates(trials: Mapping[str, Mapping[float, float]]) -> dict[str, float]:
    """Returns each contender's best rate; for one without trials, that of the one above it."""
    rates: dict[str, float] = {}
    for name in CONTENDERS:
        rates[name] = best_rate(trials[name]) if name in trials else [*rates.values()][-1]
    return rates


def prepare(folder: Path, size: Size, seeds: range) -> None:
    """Writes the texts as tokens, and for each seed the model that everybody starts from, with its new head."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    from hf_freeze.data import embedded_model_path, load_corpus

    folder.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(seed=SPLIT_SEED, limit=size.train)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    splits = {}
    for name, count in (("train", size.train), ("validation", size.validation), ("test", size.test)):
        split = getattr(corpus, name)  # in order of their labels: a slice would have some of them only
        rows = sorted(random.Random(SPLIT_SEED).sample(range(len(split.texts)), count))
        texts = [split.texts[row] for row in rows]
        encoded = tokenizer(texts, truncation=True, max_length=size.length, padding="max_length")
        splits[name] = {**dict(encoded), "labels": [split.labels[row] for row in rows]}
    write(folder / "data.json", json.dumps(splits))
    for seed in seeds:
        set_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            embedded_model_path(), num_labels=len(corpus.label_names)
        )
        model.save_pretrained(folder / f"start-{seed}")


def environments(cache: Path) -> dict[str | None, str]:
    """Returns the Python of each environment; makes those that are not there."""
    torch = f"torch=={version('torch').partition('+')[0]}"
    adapters = [torch, ADAPTERS.replace("-", "=="), f"accelerate=={version('accelerate')}"]  # with its own transformers
    lightning = [torch, LIGHTNING.replace("-", "=="), f"transformers=={version('transformers')}"]
    return {
        None: sys.executable,
        ADAPTERS: python_of(cache / ADAPTERS, adapters),
        LIGHTNING: python_of(cache / LIGHTNING, lightning),
    }


def try_rates(
    pythons: Mapping[str | None, str], folder: Path, threads: int, quick: bool
) -> dict[str, dict[float, float]]:
    """Returns validation accuracies by contender and rate, under seed 0."""
    chosen = {name: contender.rates[:1] if quick else contender.rates for name, contender in CONTENDERS.items()}
    jobs = [(name, rate) for name, rates in chosen.items() for rate in rates]

    def attempt(job: tuple[str, float]) -> float:
        name, rate = job
        print(f"trying {rate:g}: {name}", file=sys.stderr)
        epochs = 2 if quick else CONTENDERS[name].epochs
        return run(pythons, CONTENDERS[name], folder, rate, epochs, 0, 1, measured=False)["validation"]

    with ThreadPoolExecutor(threads) as pool:
        found = dict(zip(jobs, pool.map(attempt, jobs), strict=True))
    return {name: {rate: found[name, rate] for rate in rates} for name, rates in chosen.items() if rates}


def run(
    pythons: Mapping[str | None, str],
    contender: Contender,
    folder: Path,
    rate: float,
    epochs: int,
    seed: int,
    threads: int,
    measured: bool,
) -> dict[str, Any]:
    """Trains one contender in a process of its own, and returns what the worker says."""
    job = {
        "method": contender.method, "start": str(folder / f"start-{seed}"), "data": str(folder / "data.json"),
        "lr": rate, "epochs": epochs, "seed": seed, "threads": threads, "measured": measured,
    }  # fmt: skip
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"
    }  # fmt: skip
    command = [pythons[contender.environment], str(WORKER), json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing on its way out"]
        raise SystemExit(f"{contender.method} failed with exit code {done.returncode}: {said[-1]}")
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "rate": rate, "seed": seed}


def show(results: Mapping[str, Any], scratch: Path | None) -> None:
    """Prints the section, draws the plot, and writes both into the page; into `scratch` alone, where that is given."""
    runs = runs_of(results)
    trials = {name: dict(own) for name, own in results["trials"].items()}
    content = section(runs, trials, results["rates"], note_on(results), PICTURE)
    print(content)
    size = results["size"]
    draw(
        runs,
        (scratch or BENCHMARKS.parent) / PICTURE,
        f"{size['train']} texts of {size['length']} tokens, batch 16, mean of {len(results['seeds'])} seeds",
    )
    if scratch is None:
        write(BENCHMARKS, with_section(BENCHMARKS.read_text(encoding="utf-8"), "peers", content))


def note_on(results: Mapping[str, Any]) -> str:
    """Returns on what, when and with which versions it was measured."""
    size, versions = results["size"], {}
    for name, own in results["runs"].items():
        where = f"in that of {CONTENDERS[name].environment}" if CONTENDERS[name].environment else "In this environment"
        versions[where] = f"{where}: " + ", ".join(" ".join(pair) for pair in own[0]["versions"].items())
    seeds = ", ".join(map(str, results["seeds"]))
    return (
        f"{results['date']}, {results['machine']}; MiniLM, {size['train']} training, {size['validation']} validation "
        f"and {size['test']} test texts of {size['length']} tokens, batch 16, split of seed {SPLIT_SEED}, "
        f"seeds {seeds}. "
        f"{'; '.join(versions.values())}."
    )


if __name__ == "__main__":
    main()
