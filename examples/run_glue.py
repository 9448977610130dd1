"""Fine-tunes a classifier of texts, or of pairs of texts, in stages, on one device or several.

In the manner of transformers' run_glue.py. It takes any data set of the hub, or else the embedded BERT and BBC News:

    python examples/run_glue.py
    accelerate launch --multi_gpu --num_processes 2 examples/run_glue.py
    accelerate launch --num_processes 8 examples/run_glue.py --fsdp --bf16 --model bert-large-uncased \\
        --dataset nyu-mll/glue --config sst2 --text-columns sentence --metric glue
"""

import argparse
import time
from collections.abc import Sequence

import evaluate
import torch
from datasets import Dataset
from text_parts import add_options, labels, numbered, read, run_options
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_freeze import Stage, StagedUnfreezing, layer_map
from hf_freeze.data import check_model, compute_metrics

STAGES = [
    Stage(0, "all - embeddings - layers", lr=1e-3),
    Stage("33%", "layers[-2:]", lr=2e-4, layer_decay=0.9),
    Stage("67%", "layers[:-2]", lr=1e-4, layer_decay=0.9),
]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("run_glue.py", description=__doc__.splitlines()[0])
    parser.add_argument("--text-columns", nargs="+", default=["text"], help="the column with the text, or the two")
    parser.add_argument("--label-column", default="label", help="the column with the label")
    parser.add_argument("--batch-size", type=int, default=16, help="texts of a step on each device")
    parser.add_argument("--bf16", action="store_true", help="computes in bfloat16")
    parser.add_argument("--fsdp", action="store_true", help="shards the model over the processes, by FSDP2")
    add_options(parser, limit=480, epochs=3, max_length=128)
    return parser.parse_args(argv)


def encode(rows: Dataset, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    def features(batch: dict) -> dict:
        texts = [batch[column] for column in args.text_columns]
        return {**tokenizer(*texts, truncation=True, max_length=args.max_length), "labels": batch[args.label_column]}

    return rows.map(features, batched=True, remove_columns=rows.column_names)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    set_seed(args.seed)
    splits = read(
        args, lambda own: [{"text": text, "label": at} for text, at in zip(own.texts, own.labels, strict=True)]
    )
    splits, names = numbered(splits, args.label_column)
    tokenizer = AutoTokenizer.from_pretrained(check_model(args.model))
    train, test = (encode(rows, args, tokenizer) for rows in splits)
    model = AutoModelForSequenceClassification.from_pretrained(check_model(args.model), **labels(names))
    layer = model.get_submodule(layer_map(model).layers[0].module_names[0])
    arguments = TrainingArguments(
        **{**run_options(args), "per_device_train_batch_size": args.batch_size},
        bf16=args.bf16,
        fsdp=args.fsdp,
        # the layers alone: left to itself, accelerate 1.15 shards BERT's embeddings twice, which is an error
        fsdp_config={"transformer_layer_cls_to_wrap": type(layer).__name__} if args.fsdp else None,
        # not told of the CPU, accelerate 1.15 runs processes without a GPU apart from each other
        use_cpu=not torch.accelerator.is_available(),
    )
    metric = evaluate.load(args.metric, args.config) if args.metric else None

    def score(found: EvalPrediction) -> dict[str, float]:
        if metric is None:
            return compute_metrics(found)
        return metric.compute(predictions=found.predictions.argmax(-1), references=found.label_ids)

    trainer = Trainer(
        model,
        arguments,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=train,
        compute_metrics=score,
        callbacks=[StagedUnfreezing(STAGES)],
    )
    begun = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begun
    found = trainer.evaluate(test, metric_key_prefix="test")
    trainer.save_model(args.output)
    if trainer.is_world_process_zero():
        how = trainer.accelerator.distributed_type.value
        print(f"{arguments.world_size} process(es), {how}, {arguments.device}: {seconds:.1f} s, {len(train)} rows")
        print(", ".join(f"{name} {number:.3f}" for name, number in found.items()))


if __name__ == "__main__":
    main()
