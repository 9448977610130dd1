"""Tags the words of texts: names, numbers, times, or what your data marks.

In the manner of transformers' run_ner.py, with seqeval. Layers train in stages, or adapters do. As it stands it takes
the embedded BERT, and tags that a rule has put into BBC News:

    python examples/token_classification.py
    python examples/token_classification.py --method adapters
    python examples/token_classification.py --dataset marked.jsonl --metric seqeval
    python examples/token_classification.py --model bert-base-cased --dataset tner/conll2003
"""

import argparse
from collections.abc import Sequence

import evaluate
from datasets import Dataset
from made_texts import tagged
from seqeval.metrics import f1_score, precision_score, recall_score
from text_parts import add_options, labels, numbered, read, run_options
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_freeze import (
    AutoFreezeModelForTokenClassification,
    BottleneckConfig,
    Stage,
    StagedUnfreezing,
    trainable_summary,
)
from hf_freeze.data import check_model

STAGES = [
    Stage(0, "head", lr=2e-3),
    Stage("20%", "layers[-2:]", lr=5e-4, layer_decay=0.9),
    Stage("60%", "layers[:-2]", lr=2e-4, layer_decay=0.9),
]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("token_classification.py", description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("staged", "adapters"), default="staged", help="what trains")
    parser.add_argument("--tag-column", default="tags", help="the column with a tag for each of the words in 'tokens'")
    add_options(parser, limit=2000, epochs=3, max_length=64)
    return parser.parse_args(argv)


def encode(rows: Dataset, column: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Returns tokens with labels: the first piece of a word has its tag, the others have none."""

    def features(batch: dict) -> dict:
        encoded = tokenizer(batch["tokens"], is_split_into_words=True, truncation=True, max_length=length)
        encoded["labels"] = []
        for row, tags in enumerate(batch[column]):
            words = encoded.word_ids(row)
            pairs = zip(words, [None, *words], strict=False)
            encoded["labels"].append([-100 if own in (None, before) else tags[own] for own, before in pairs])
        return encoded

    return rows.map(features, batched=True, remove_columns=rows.column_names)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    set_seed(args.seed)
    splits, names = numbered(read(args, lambda own: tagged(own.texts)), args.tag_column)
    base = check_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(base)
    train, test = (encode(rows, args.tag_column, tokenizer, args.max_length) for rows in splits)
    if args.method == "staged":
        model = AutoModelForTokenClassification.from_pretrained(base, **labels(names))
        callbacks = [StagedUnfreezing(STAGES)]
    else:
        options = {"freeze": "base", "adapter": BottleneckConfig()}
        model = AutoFreezeModelForTokenClassification.from_pretrained(base, **options, **labels(names))
        callbacks = []
    metric = evaluate.load(args.metric) if args.metric else None

    def score(found: EvalPrediction) -> dict[str, float]:
        kept, both = found.label_ids != -100, (found.label_ids, found.predictions.argmax(-1))
        true, guessed = ([[names[at] for at in row[keep]] for row, keep in zip(own, kept, strict=True)] for own in both)
        if metric is not None:  # an empty one is falsy
            scores = metric.compute(references=true, predictions=guessed)
            return {name: own for name, own in scores.items() if isinstance(own, float)}
        measures = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
        return {name: measure(true, guessed) for name, measure in measures.items()}

    trainer = Trainer(
        model,
        TrainingArguments(**run_options(args), learning_rate=3e-3),
        data_collator=DataCollatorForTokenClassification(tokenizer),
        train_dataset=train,
        compute_metrics=score,
        callbacks=callbacks,
    )
    trainer.train()
    print(trainable_summary(model))
    for name, number in trainer.evaluate(test, metric_key_prefix="test").items():
        print(f"{name}: {number:.3f}")
    trainer.save_model(args.output)


if __name__ == "__main__":
    main()
