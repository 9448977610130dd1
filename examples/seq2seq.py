"""Teaches an encoder-decoder something new by adapters in both, and lets it write while it is evaluated.

The model is a small BART or T5 that is first taught to write down what it reads, for about half a minute. The adapters
then teach it to write telegrams, without the small words:

    python examples/seq2seq.py
    python examples/seq2seq.py --architecture t5
    python examples/seq2seq.py --model google-t5/t5-small --dataset EdinburghNLP/xsum --text-column document \\
        --target-column summary --prefix "summarize: " --max-length 512 --metric rouge
"""

import argparse
from collections.abc import Sequence

import evaluate
import numpy as np
from datasets import Dataset
from made_seq2seq import RATES, copies, small_seq2seq
from made_texts import telegrams
from peft import get_peft_model
from text_parts import add_options, overlap, read, run_options
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

from hf_freeze import BottleneckConfig, trainable_summary


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("seq2seq.py", description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", choices=RATES, default="bart", help="the model that is made")
    parser.add_argument("--text-column", default="text", help="the column with what is read")
    parser.add_argument("--target-column", default="short", help="the column with what is to be written")
    parser.add_argument("--prefix", default="", help="what to put before each text")
    add_options(parser, limit=1000, epochs=6, max_length=32, model="made")
    return parser.parse_args(argv)


def encode(texts: Sequence[str], targets: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    read, written = (tokenizer(own, truncation=True, max_length=length) for own in (texts, targets))
    return Dataset.from_dict({"input_ids": read["input_ids"], "labels": written["input_ids"]})


def make_trainer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Dataset, args: argparse.Namespace, **run
) -> Seq2SeqTrainer:
    metric = evaluate.load(args.metric) if args.metric else None

    def score(found: EvalPrediction) -> dict[str, float]:
        ids = (np.where(own < 0, tokenizer.pad_token_id, own) for own in (found.predictions, found.label_ids))
        written, true = (tokenizer.batch_decode(own, skip_special_tokens=True) for own in ids)
        if metric is not None:  # an empty one is falsy
            return metric.compute(predictions=written, references=true)
        exact = np.mean([own == right for own, right in zip(written, true, strict=True)])
        return {"exact": float(exact), "f1": float(np.mean([*map(overlap, written, true)]))}

    arguments = Seq2SeqTrainingArguments(
        **{**run_options(args), "per_device_train_batch_size": 32, **run},
        predict_with_generate=True,
        generation_max_length=args.max_length,
    )
    collator = DataCollatorForSeq2Seq(tokenizer, model)
    return Seq2SeqTrainer(model, arguments, data_collator=collator, train_dataset=rows, compute_metrics=score)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    set_seed(args.seed)
    splits = read(args, lambda own: telegrams(own.texts))
    texts = [[args.prefix + text for text in rows[:][args.text_column]] for rows in splits]
    if args.model == "made":
        base, tokenizer = small_seq2seq(args.architecture, texts[0] + texts[1])
        same = copies(texts[0], 40 * args.limit, args.seed)
        rows = encode(same, same, tokenizer, args.max_length)
        run = {"learning_rate": RATES[args.architecture], "warmup_steps": 50, "num_train_epochs": 1}
        make_trainer(base, tokenizer, rows, args, **run).train()
    else:
        base, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    train, test = (
        encode(own, rows[:][args.target_column], tokenizer, args.max_length)
        for own, rows in zip(texts, splits, strict=True)
    )

    model = get_peft_model(base, BottleneckConfig(bottleneck_size=32, task_type="SEQ_2_SEQ_LM"))
    print(trainable_summary(model))
    trainer = make_trainer(model, tokenizer, train, args, learning_rate=2e-3)
    trainer.train()
    adapted = trainer.predict(test)
    with model.disable_adapter():
        plain = trainer.predict(test)
    for what, found in (("no adapter", plain), ("adapters", adapted)):
        scores = trainer.compute_metrics(found)
        print(f"{what}:", ", ".join(f"test {name} {own:.3f}" for name, own in scores.items()))
        ids = np.where(found.predictions < 0, tokenizer.pad_token_id, found.predictions)[:3]
        for text, written in zip(texts[1], tokenizer.batch_decode(ids, skip_special_tokens=True), strict=False):
            print(f"  {text} -> {written}")
    model.save_pretrained(args.output)


if __name__ == "__main__":
    main()
