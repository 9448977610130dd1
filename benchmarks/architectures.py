"""What of transformers' base model types works with this package: each is built tiny, adapted and checked.

Every type runs in a process of its own, since a few are slow, and since some need packages that are not installed.
Writes docs/architectures.md, and with --list also tests/architectures.txt, the types that the tests walk.

    python benchmarks/architectures.py            # about a quarter of an hour on 2 cores
    python benchmarks/architectures.py --list
    python benchmarks/architectures.py bert t5    # these alone, printed
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hf_freeze import freeze, layer_map  # noqa: E402
from hf_freeze.errors import AdapterError  # noqa: E402
from tests.adapters.architectures import CHECKS, FAILING, LIGHT, Check, Trial, idle_stacks  # noqa: E402
from tests.tiny import forward_loss, on_meta, tiny_inputs, tiny_model  # noqa: E402

TIMEOUT = 120
PLACEMENTS = ("layer", "pfeiffer", "houlsby", "parallel")
ROWS = {
    "map": "layer map of the full-size model",
    "tiny": "built tiny, runs forward and backward",
    "freezing": "frozen parameters and buffers unchanged by training",
    **{placement: f"adapters, placement `{placement}`" for placement in PLACEMENTS},
}
OK, REFUSED, FAILED, NO_MODEL = "ok", "refused", "failed", "no model"

HEAD = """\
# Architectures

<!-- Written by benchmarks/architectures.py; do not edit. -->

What holds on the {types} base model types of transformers {transformers} (torch {torch}, {date}). Each type
that can be is built from its config, with two layers or so, and run on made-up inputs on a CPU.
`python benchmarks/architectures.py` writes this page. Refused means: an error before anything is changed, which names
what works.

| | passed | of | refused |
|---|---:|---:|---:|
"""
METHOD = """\
Adapters pass when a new one is the identity bit for bit, has an effect once its weights are random, and alone gets
gradients in train mode; with placement `layer` also when switching it off gives the base back bit for bit, and when
saving and loading it into a fresh base gives the same outputs bit for bit. Freezing passes when two steps of AdamW with
weight decay in train mode leave all that is frozen as it was. A type counts for the layer map when its default config
builds; it passes when its parameters are partitioned into segments, with layers among them.
"""

Result = dict[str, tuple[str, str]]  # what was tried -> how it went, and why


def examine(model_type: str) -> Result:
    """Tries all on one model type."""
    found: Result = {"map": _attempt(lambda: _map(model_type))}
    found["tiny"] = _attempt(lambda: _runs(model_type))
    if found["tiny"][0] != OK:
        return found
    found["freezing"] = _attempt(lambda: _freezes(model_type))
    base = tiny_model(model_type)
    for placement in PLACEMENTS:
        checks = CHECKS if placement == "layer" else LIGHT
        found[placement] = _attempt(lambda placement=placement, checks=checks: _adapts(base, placement, checks))
    return found


def _attempt(trial: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    try:
        return trial()
    except Exception as error:  # whatever a model raises is its reason
        reason = (str(error).strip().splitlines() or [""])[0]
        return FAILED, f"{type(error).__name__}: {reason}"[:160]


def _map(model_type: str) -> tuple[str, str]:
    try:
        with on_meta():
            model = AutoModel.from_config(AutoConfig.for_model(model_type))
    except Exception as error:
        return NO_MODEL, type(error).__name__
    owned = [name for segment in layer_map(model) for name in segment.parameter_names]
    whole = sorted(owned) == sorted(name for name, _ in model.named_parameters())
    return (OK, "") if whole and layer_map(model).layers else (FAILED, "no layers" if whole else "not a partition")


def _runs(model_type: str) -> tuple[str, str]:
    model = tiny_model(model_type).train()
    loss = forward_loss(model, tiny_inputs(model))
    loss.backward()
    moved = any(p.grad is not None and p.grad.any() for p in model.parameters())
    return (OK, "") if moved and loss.isfinite() else (FAILED, "no gradient, or none that is finite")


def _freezes(model_type: str) -> tuple[str, str]:
    model = tiny_model(model_type)
    names = set(freeze(model, "base - layers[-1]"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    segments = [segment for segment in layer_map(model) if set(segment.parameter_names) <= names]
    prefixes = tuple(f"{module}." for segment in segments for module in segment.module_names)
    still = names | {name for name, _ in model.named_buffers() if name.startswith(prefixes)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        forward_loss(model.train(), tiny_inputs(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = [n for n, t in model.state_dict().items() if n in still and not torch.equal(t, before[n])]
    return (FAILED, f"{moved[0]} has moved") if moved else (OK, "")


def _adapts(base: Any, placement: str, checks: Iterable[Check]) -> tuple[str, str]:
    try:
        trial = Trial(base, placement)
    except AdapterError as error:
        return REFUSED, re.sub(r" Use placement.*", "", str(error))
    for check in checks:
        if not check(trial):
            return FAILED, check.__name__.replace("_", " ")
    idle = idle_stacks(trial)
    return OK, f"no gradient reached {', '.join(idle)}" if idle else ""


def _in_a_process(model_type: str) -> Result:
    """Examines one type in a forked process, which is killed when it takes too long."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_send, args=(model_type, send))
    process.start()
    found = receive.recv() if receive.poll(TIMEOUT) else {"tiny": (FAILED, f"took more than {TIMEOUT} s")}
    process.kill()
    process.join()
    return found


def _send(model_type: str, connection: Any) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryFile("w") as sys.stdout, tempfile.TemporaryFile("w") as sys.stderr:
        connection.send(examine(model_type))


def page(results: dict[str, Result]) -> str:
    """Returns the page of the manual."""
    lines = HEAD.format(
        types=len(results),
        transformers=transformers.__version__,
        torch=torch.__version__.split("+")[0],
        date=f"{datetime.now(UTC):%Y-%m-%d}",
    ).splitlines()
    for key, title in ROWS.items():
        states = [result[key][0] for result in results.values() if key in result]
        known = [state for state in states if state != NO_MODEL]
        refused = known.count(REFUSED) if key in PLACEMENTS else ""
        lines.append(f"| {title} | {known.count(OK)} | {len(known)} | {refused} |")
    lines += ["", *METHOD.splitlines(), ""]
    for key, title in ROWS.items():
        lines += _section(f"{title[0].upper()}{title[1:]}: what fails", results, key, (FAILED,))
    lines += _refused(results)
    lines += _section("Parts of a model that these inputs do not reach", results, "layer", (OK,))
    return "\n".join(lines).rstrip() + "\n"


def _section(title: str, results: dict[str, Result], key: str, states: tuple[str, ...]) -> list[str]:
    """Returns a section that lists model types by reason, or nothing where there are none."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, result in results.items():
        state, reason = result.get(key, ("", ""))
        if state in states and reason:
            reason = FAILING.get(name, reason) if key not in ("map", "tiny") and state == FAILED else reason
            by_reason[_general(reason)].append(name)
    if not by_reason:
        return []
    rows = sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[1]))
    listed = [f"| {', '.join(f'`{name}`' for name in names)} | {_cell(reason)} |" for reason, names in rows]
    return [f"## {title}", "", "| model type | why |", "|---|---|", *listed, ""]


def _refused(results: dict[str, Result]) -> list[str]:
    """Returns the section that lists which placements inside a layer are refused, and why."""
    by_reason: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, result in results.items():
        reasons: dict[str, list[str]] = defaultdict(list)
        for key in PLACEMENTS:
            state, reason = result.get(key, ("", ""))
            if state == REFUSED:
                reasons[_general(reason)].append(key)
        for reason, keys in reasons.items():
            by_reason[reason, ", ".join(keys)].append(name)
    rows = sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[1]))
    listed = [f"| {', '.join(f'`{n}`' for n in names)} | {keys} | {_cell(why)} |" for (why, keys), names in rows]
    return ["## What is refused", "", "| model type | placement | why |", "|---|---|---|", *listed, ""]


def _general(reason: str) -> str:
    """Returns a reason without what differs from model to model, and without the paths of this machine."""
    reason = re.sub(r" from '/[^']*'?", "", reason)
    return re.sub(r"'[\w.]+\.\d+[\w.]*'( \(\w+\))?", "a layer", reason)


def _cell(text: str) -> str:
    return re.sub(r"([|*_<>\[\]`])", r"\\\1", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; all that are registered by default")
    parser.add_argument("--list", action="store_true", help="write tests/architectures.txt as well")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    types = options.types or sorted(MODEL_MAPPING_NAMES)
    with ThreadPoolExecutor(options.workers) as pool:
        results = dict(zip(types, pool.map(_in_a_process, types), strict=True))
    if options.types:
        print(*(f"{name}: {result}" for name, result in results.items()), sep="\n")
        return
    (ROOT / "docs" / "architectures.md").write_text(page(results), encoding="utf-8")
    if options.list:
        running = [name for name, result in results.items() if result["tiny"][0] == OK]
        (ROOT / "tests" / "architectures.txt").write_text("\n".join(running) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
