"""Fine-tunes a text classifier in stages in a raw Accelerate loop, without a Trainer.

As it stands it takes the embedded BERT and BBC News, and needs no network. On one process or several, and on from where
a run ended:

    python examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py --resume outputs/accelerate_loop/state
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, get_scheduler

from hf_freeze import Stage, UnfreezeSchedule
from hf_freeze.data import check_model, load_corpus, tokenize
from hf_freeze.engine import attach_schedule

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
    parser.add_argument("--schedule", type=Path, help="a schedule in YAML, instead of the three stages above")
    parser.add_argument("--limit", type=int, default=480, help="at most so many training texts")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training texts")
    parser.add_argument("--batch-size", type=int, default=16, help="texts of a step, on each process")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--output", type=Path, default=Path("outputs/accelerate_loop"), help="where the model goes")
    parser.add_argument("--resume", type=Path, help="the state folder of a run with the same options")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split, the head, dropout and shuffling")
    return parser.parse_args(argv)


def accuracy(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader) -> float:
    right: list[torch.Tensor] = []
    model.eval()
    for batch in loader:
        with torch.no_grad():
            predicted = model(**batch).logits.argmax(dim=-1)
        right.append(accelerator.gather_for_metrics(predicted == batch["labels"]))
    return torch.cat(right).float().mean().item()


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    # what is not due has no gradient, and DDP has to look for it
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # not told of the CPU, accelerate 1.15 runs processes without a GPU apart from each other
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[unused])
    set_seed(args.seed)
    corpus = load_corpus(args.dataset, seed=args.seed, limit=args.limit)
    tokenizer = AutoTokenizer.from_pretrained(check_model(args.model))
    model = AutoModelForSequenceClassification.from_pretrained(
        check_model(args.model), num_labels=len(corpus.label_names)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)  # what does not train costs it nothing
    train, test = (
        DataLoader(
            tokenize(split, tokenizer, args.max_length),
            batch_size=args.batch_size,
            shuffle=split is corpus.train,
            collate_fn=DataCollatorWithPadding(tokenizer),
        )
        for split in (corpus.train, corpus.test)
    )
    model, optimizer, train, test = accelerator.prepare(model, optimizer, train, test)
    steps_per_epoch, total_steps = len(train), args.epochs * len(train)
    # prepared, a scheduler takes a step for each process at each optimizer step
    scheduler = accelerator.prepare(
        get_scheduler(
            "linear", optimizer, num_warmup_steps=0, num_training_steps=total_steps * accelerator.num_processes
        )
    )

    schedule = UnfreezeSchedule.from_yaml(args.schedule) if args.schedule else SCHEDULE
    engine = attach_schedule(schedule, model, optimizer, scheduler, total_steps, steps_per_epoch)
    accelerator.register_for_checkpointing(engine)
    if args.resume:
        accelerator.load_state(str(args.resume))

    for epoch in range(engine.steps // steps_per_epoch, args.epochs):
        model.train()
        for batch in train:
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if stage := engine.step():
                accelerator.print(f"step {engine.steps}: {len(stage.trainable)} tensors train")
        accelerator.print(f"epoch {epoch + 1}: test accuracy {accuracy(accelerator, model, test):.3f}")
        accelerator.save_state(str(args.output / "state"))

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
    accelerator.end_training()


if __name__ == "__main__":
    main()
