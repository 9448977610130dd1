"""Finds the answers to questions in texts: spans, as in SQuAD.

In the manner of transformers' run_qa.py, with SQuAD's exact match and F1. Layers train in stages, or adapters do. As it
stands it takes the embedded BERT, and questions that a rule has put to BBC News:

    python examples/question_answering.py
    python examples/question_answering.py --method adapters
    python examples/question_answering.py --dataset asked.jsonl --metric squad
    python examples/question_answering.py --model bert-base-uncased --dataset rajpurkar/squad --max-length 384
"""

import argparse
from collections.abc import Sequence

import evaluate
from datasets import Dataset
from made_texts import questions
from text_parts import add_options, overlap, read, run_options, words
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_freeze import AutoFreezeModelForQuestionAnswering, BottleneckConfig, Stage, StagedUnfreezing, trainable_summary
from hf_freeze.data import check_model

STAGES = [Stage(0, "head, layers[-2:]", lr=5e-4), Stage("50%", "layers[:-2]", lr=2e-4, layer_decay=0.9)]
LONGEST = 30  # tokens of an answer


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("question_answering.py", description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("staged", "adapters"), default="staged", help="what trains")
    add_options(parser, limit=2000, epochs=3, max_length=64)
    return parser.parse_args(argv)


def encode(rows: Dataset, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Returns tokens, where those of the context are in it, and the first and last token of the first answer.

    What does not fit of a context is cut off; an answer in it is then at token 0, as where there is none.
    """

    def features(batch: dict) -> dict:
        encoded = tokenizer(
            batch["question"],
            batch["context"],
            truncation="only_second",
            max_length=length,
            return_offsets_mapping=True,
        )
        places = encoded.pop("offset_mapping")
        encoded["spans"], encoded["start_positions"], encoded["end_positions"] = [], [], []
        for row, answers in enumerate(batch["answers"]):
            which = encoded.sequence_ids(row)
            spans = [place if own == 1 else (0, 0) for place, own in zip(places[row], which, strict=True)]
            start, text = next(zip(answers["answer_start"], answers["text"], strict=True), (0, ""))
            inside = [at for at, (begins, ends) in enumerate(spans) if begins < start + len(text) and ends > start]
            encoded["spans"].append(spans)
            encoded["start_positions"].append(inside[0] if inside else 0)
            encoded["end_positions"].append(inside[-1] if inside else 0)
        return encoded

    return rows.map(features, batched=True)


def answer(context: str, spans: Sequence[Sequence[int]], starts: Sequence[float], ends: Sequence[float]) -> str:
    """Returns the span of the context whose first and last token are the likeliest together."""
    inside = [at for at, (begin, end) in enumerate(spans) if end > begin]
    pairs = [(first, last) for first in inside for last in inside if first <= last < first + LONGEST]
    first, last = max(pairs, key=lambda pair: starts[pair[0]] + ends[pair[1]], default=(0, 0))
    return context[spans[first][0] : spans[last][1]]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    set_seed(args.seed)
    splits = read(args, lambda own: questions(own.texts))
    base = check_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(base)
    train, test = (encode(rows, tokenizer, args.max_length) for rows in splits)
    if args.method == "staged":
        model, callbacks = AutoModelForQuestionAnswering.from_pretrained(base), [StagedUnfreezing(STAGES)]
    else:
        options = {"freeze": "base", "adapter": BottleneckConfig()}
        model, callbacks = AutoFreezeModelForQuestionAnswering.from_pretrained(base, **options), []
    trainer = Trainer(
        model,
        TrainingArguments(**run_options(args), learning_rate=3e-3),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=train,
        callbacks=callbacks,
    )
    trainer.train()
    print(trainable_summary(model))
    starts, ends = trainer.predict(test).predictions[:2]
    found = [answer(row["context"], row["spans"], *own) for row, *own in zip(test, starts, ends, strict=True)]
    if args.metric:
        guesses = [{"id": own, "prediction_text": text} for own, text in zip(test["id"], found, strict=True)]
        references = [{"id": row["id"], "answers": row["answers"]} for row in test]
        scores = evaluate.load(args.metric).compute(predictions=guesses, references=references)
    else:
        pairs = [(text, row["answers"]["text"] or [""]) for text, row in zip(found, test, strict=True)]
        f1 = [max(overlap(text, own) for own in true) for text, true in pairs]
        exact = [max(words(text) == words(own) for own in true) for text, true in pairs]
        scores = {"exact_match": 100 * sum(exact) / len(exact), "f1": 100 * sum(f1) / len(f1)}
    for row, text in zip(test.select(range(3)), found[:3], strict=True):
        print(f"{row['context']}\n  {row['question']} {text!r}, and rightly {row['answers']['text']}")
    print(", ".join(f"test {name} {number:.1f}" for name, number in scores.items()))
    trainer.save_model(args.output)


if __name__ == "__main__":
    main()
