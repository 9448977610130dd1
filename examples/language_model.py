"""Gives a causal language model one adapter for each kind of text, by TRL, and serves them all in one batch.

The model is a small Qwen3 that is first trained on BBC News, for about a minute, and kept in the output folder.
Perplexity is taken on texts that neither model nor adapter has seen:

    python examples/language_model.py
    python examples/language_model.py --lisa
    python examples/language_model.py --model Qwen/Qwen3-0.6B --max-length 512 --classes tech
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from made_language_model import blocks, perplexity, small_language_model
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from hf_freeze import BottleneckConfig, StagedUnfreezing, UnfreezeSchedule, trainable_summary
from hf_freeze.data import Split, check_model, load_corpus

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASE = "__base__"  # PEFT's name for a row without an adapter


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model folder or a hub id; where none is named, a small one is made")
    parser.add_argument("--dataset", default="embedded", help="a folder, a CSV or JSON file, a hub id, or 'embedded'")
    parser.add_argument("--classes", nargs="+", default=["sports", "tech"], help="the classes that get an adapter")
    parser.add_argument("--lisa", action="store_true", help="also trains the model itself, two random layers at a time")
    parser.add_argument("--prompt", default="The company said", help="what is written on")
    parser.add_argument("--limit", type=int, help="at most so many training texts")
    parser.add_argument("--epochs", type=float, default=1, help="passes over the texts of a class")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--output", type=Path, default=Path("outputs/language_model"), help="where all goes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split, the weights and shuffling")
    return parser.parse_args(argv)


def train(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Dataset, args: argparse.Namespace, **options
) -> torch.nn.Module:
    config = SFTConfig(
        str(args.output / "checkpoints"),
        num_train_epochs=args.epochs,
        learning_rate=2e-3,
        per_device_train_batch_size=16,
        max_length=args.max_length,
        gradient_checkpointing=False,
        bf16=DEVICE == "cuda",
        dataloader_pin_memory=DEVICE == "cuda",
        save_strategy="no",
        report_to=[],
        seed=args.seed,
    )
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, **options)
    trainer.train()
    return trainer.model


def write_on(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: dict, **names) -> list[str]:
    options = {"max_new_tokens": 40, "do_sample": False, "repetition_penalty": 1.3}
    written = model.eval().generate(**prompts, **names, **options)
    return tokenizer.batch_decode(written, skip_special_tokens=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    set_seed(args.seed)
    corpus = load_corpus(args.dataset, seed=args.seed, limit=args.limit)
    folder, texts = args.output / "base", corpus.train.texts
    name = args.model or small_language_model(texts, folder, args.max_length, args.seed)
    tokenizer = AutoTokenizer.from_pretrained(check_model(name))

    def base() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(name).to(DEVICE)

    def rows_of(label: str, split: Split) -> Dataset:
        own = [text for text, at in zip(split.texts, split.labels, strict=True) if corpus.label_names[at] == label]
        return blocks(own, tokenizer, args.max_length)

    tests = [rows_of(label, corpus.test) for label in args.classes]
    found = {"no adapter": [perplexity(base(), rows) for rows in tests]}
    for label in args.classes:
        config = BottleneckConfig(bottleneck_size=32, task_type="CAUSAL_LM")
        adapted = train(base(), tokenizer, rows_of(label, corpus.train), args, peft_config=config)
        adapted.save_pretrained(args.output / label)  # the adapter alone
        print(trainable_summary(adapted))
        if args.lisa:
            lisa = StagedUnfreezing(UnfreezeSchedule.lisa(layers=2, steps=20))
            whole = train(base(), tokenizer, rows_of(label, corpus.train), args, callbacks=[lisa])
            found[f"LISA: {label}"] = [perplexity(whole, rows) for rows in tests]

    served = PeftModel.from_pretrained(base(), args.output / args.classes[0], adapter_name=args.classes[0])
    for label in args.classes[1:]:
        served.load_adapter(args.output / label, label)
    prompts = tokenizer([args.prompt] * (1 + len(args.classes)), return_tensors="pt").to(DEVICE)
    together = write_on(served, tokenizer, prompts, adapter_names=[BASE, *args.classes])
    alone = together[:1]
    for label in args.classes:
        served.set_adapter(label)
        found[f"adapter: {label}"] = [perplexity(served, rows) for rows in tests]
        alone.append(write_on(served, tokenizer, prompts)[len(alone)])

    print("perplexity on texts of", *(f"{label:>13}" for label in args.classes))
    for what, numbers in found.items():
        print(f"{what:<22}", *(f"{number:13.2f}" for number in numbers))
    for what, text in zip(["no adapter", *args.classes], together, strict=True):
        print(f"{what}: {text!r}")
    print("each row is what its adapter writes alone:", together == alone)


if __name__ == "__main__":
    main()
