"""Trains bottleneck adapters, saves and loads them, and switches them off.

`BottleneckConfig` is a PEFT method, so both ways in are the libraries' own: `--api peft` calls `get_peft_model`,
`--api transformers` calls `model.add_adapter`. The embedded BERT and BBC News need no network:

    python examples/adapters_peft.py
    python examples/adapters_peft.py --api transformers --model bert-base-uncased --dataset reviews.csv
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_freeze import BottleneckConfig, trainable_summary
from hf_freeze.data import check_model, compute_metrics, load_corpus, tokenize


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--api", choices=("peft", "transformers"), default="peft", help="which library's calls to use")
    parser.add_argument("--model", default="embedded", help="a model folder, a hub id, or 'embedded'")
    parser.add_argument("--dataset", default="embedded", help="a folder, a CSV or JSON file, a hub id, or 'embedded'")
    parser.add_argument("--size", type=int, default=32, help="bottleneck size")
    parser.add_argument("--head", default="classifier", help="the model's head, which trains and is saved as well")
    parser.add_argument("--limit", type=int, default=480, help="at most so many training texts")
    parser.add_argument("--epochs", type=float, default=3, help="passes over the training texts")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--output", type=Path, default=Path("outputs/adapters_peft"), help="where the adapter goes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split, the head, dropout and shuffling")
    return parser.parse_args(argv)


def load_base(name: str, labels: int, seed: int) -> torch.nn.Module:
    """Loads the base model; the seed gives it the same new head each time."""
    set_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(name, num_labels=labels)


@torch.no_grad()
def logits(model: torch.nn.Module, batch: BatchEncoding) -> torch.Tensor:
    return model.eval()(**batch.to(model.device)).logits.cpu()


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    corpus = load_corpus(args.dataset, seed=args.seed, limit=args.limit)
    name, labels = check_model(args.model), len(corpus.label_names)
    tokenizer = AutoTokenizer.from_pretrained(name)
    batch = tokenizer(list(corpus.test.texts[:8]), truncation=True, max_length=64, padding=True, return_tensors="pt")
    base = load_base(name, labels, args.seed)
    before = logits(base, batch)

    config = BottleneckConfig(bottleneck_size=args.size, modules_to_save=[args.head])
    if args.api == "peft":
        model = get_peft_model(base, config)
    else:
        model = base
        model.add_adapter(config)
    print("a new adapter is the identity:", torch.equal(logits(model, batch), before))
    print(trainable_summary(model))

    trainer = Trainer(
        model,
        TrainingArguments(
            str(args.output / "checkpoints"),
            learning_rate=1e-3,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            seed=args.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=tokenize(corpus.train, tokenizer, args.max_length),
        compute_metrics=compute_metrics,
    )
    trainer.train()
    found = trainer.evaluate(tokenize(corpus.test, tokenizer, args.max_length), metric_key_prefix="test")
    trained = logits(model, batch)
    model.save_pretrained(args.output)  # the adapter and the head alone

    restored = load_base(name, labels, args.seed)
    if args.api == "peft":
        restored = PeftModel.from_pretrained(restored, args.output)
        loaded = logits(restored, batch)
        with restored.disable_adapter():
            disabled = logits(restored, batch)
    else:
        restored.load_adapter(str(args.output))
        loaded = logits(restored, batch)
        restored.disable_adapters()
        disabled = logits(restored, batch)
    # Not by torch.equal: two loads of the same weights may lie differently in memory, which changes the last bit.
    print(f"loaded back, the outputs differ by at most {(loaded - trained).abs().max():.1e}")
    print(f"disabled, they differ from the base model's by at most {(disabled - before).abs().max():.1e}")
    size = (args.output / "adapter_model.safetensors").stat().st_size
    print(f"test accuracy {found['test_accuracy']:.3f}; {size / 1e6:.2f} MB saved to {args.output}")


if __name__ == "__main__":
    main()
