"""Fine-tunes a text classifier on a `Trainer` with staged unfreezing.

Head and pooler train first, then the two top layers, then the other layers; the embeddings stay frozen.
As it stands it takes the embedded BERT and BBC News, and needs no network:

    python examples/trainer_staged.py
    python examples/trainer_staged.py --model bert-base-uncased --dataset reviews.csv --label-column stars
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_freeze import Stage, StagedUnfreezing, UnfreezeSchedule, layer_map, trainable_summary
from hf_freeze.data import check_model, compute_metrics, load_corpus, tokenize

# Starts are shares of the run, so that the schedule fits any number of epochs. The first selector reads
# "what is neither embeddings nor layers": head and pooler, where a model has one.
SCHEDULE = UnfreezeSchedule(
    [
        Stage(0, "all - embeddings - layers", lr=1e-3),
        Stage("33%", "layers[-2:]", lr=2e-4, layer_decay=0.9),
        Stage("67%", "layers[:-2]", lr=1e-4, layer_decay=0.9),
    ]
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded", help="a model folder, a hub id, or 'embedded'")
    parser.add_argument("--dataset", default="embedded", help="a folder, a CSV or JSON file, a hub id, or 'embedded'")
    parser.add_argument("--text-column", default="text", help="the column that holds the text")
    parser.add_argument("--label-column", default="label", help="the column that holds the label")
    parser.add_argument("--schedule", type=Path, help="a schedule in YAML, instead of the three stages above")
    parser.add_argument("--limit", type=int, default=480, help="at most so many training texts")
    parser.add_argument("--epochs", type=float, default=3, help="passes over the training texts")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--output", type=Path, default=Path("outputs/trainer_staged"), help="where the model goes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split, the head, dropout and shuffling")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    set_seed(args.seed)
    corpus = load_corpus(
        args.dataset,
        text_column=args.text_column,
        label_column=args.label_column,
        seed=args.seed,
        limit=args.limit,
    )
    name = check_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(
        name,
        id2label=dict(enumerate(corpus.label_names)),
        label2id={label: index for index, label in enumerate(corpus.label_names)},
    )
    print(layer_map(model))

    schedule = UnfreezeSchedule.from_yaml(args.schedule) if args.schedule else SCHEDULE
    trainer = Trainer(
        model,
        TrainingArguments(
            str(args.output / "checkpoints"),
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
        callbacks=[StagedUnfreezing(schedule)],
    )
    trainer.train()

    print(trainable_summary(model))
    found = trainer.evaluate(tokenize(corpus.test, tokenizer, args.max_length), metric_key_prefix="test")
    trainer.save_model(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"test accuracy {found['test_accuracy']:.3f}, macro F1 {found['test_macro_f1']:.3f}; saved to {args.output}")


if __name__ == "__main__":
    main()
