"""`hf-freeze demo`: the embedded BERT on the embedded news, fine-tuned in four ways and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option(help="Folder to save the staged model to.")] = Path("outputs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of the split, the heads, dropout and shuffling.")] = 0,
) -> None:
    """Compares head only, adapters, staged unfreezing and full fine-tuning on real news text.

    Example: hf-freeze demo --seed 1
    """
    from rich.console import Console

    from ..data import EMBEDDED, check_model, load_corpus
    from ..runs import fine_tune, load, predict, save
    from .demo_methods import LIMIT, methods
    from .tables import outcome_table, quiet
    from .train import SENTENCES

    name = check_model(EMBEDDED)
    corpus = load_corpus(seed=seed, limit=LIMIT)
    console = Console()
    sizes = ", ".join(f"{len(getattr(corpus, split).texts)} {split}" for split in ("train", "validation", "test"))
    console.print(f"MiniLM (a pretrained BERT of 6 layers) on BBC News: {sizes} texts, stratified, seed {seed}")
    quiet()
    outcomes = []
    for spec in methods(seed):
        console.print(f"\n[bold]{spec.name}[/bold]: {spec.epochs:g} epochs, peak lr {spec.lr:g}")
        outcomes.append(fine_tune(name, corpus, spec))
    console.print(outcome_table(outcomes, title=f"BBC News, test split, seed {seed}"))
    staged = next(outcome for outcome in outcomes if outcome.name == "staged unfreezing")
    save(staged, name, output)
    tokenizer, restored = load(output)
    console.print(f"The staged model is in {output}. Loaded back, it says:")
    for text, (label, probability) in zip(SENTENCES, predict(restored, tokenizer, list(SENTENCES)), strict=True):
        console.print(f"  {label} ({probability:.0%}): {text}", highlight=False)
