"""Trains a CLIP with one tower frozen, beside training both, and proves that the frozen tower is what it was.

A small CLIP learns written digits 0 to 4 with captions, and is moved to 5 to 9, whose names it has never read. With
its vision tower locked this is LiT (arXiv:2111.07991). Nothing is downloaded:

    python examples/clip_one_tower.py
    python examples/clip_one_tower.py --model openai/clip-vit-base-patch32 --size 224 --lr 1e-5
"""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from made_clip import small_clip
from made_images import digits
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase, default_data_collator, set_seed
from vision_parts import arguments, fit, print_table, quiet

from hf_freeze import PrefixCache, certify_frozen, freeze, trainable_summary

FIRST, SECOND = range(5), range(5, 10)  # the digits to pretrain on, and those to move to
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ("a photo of the digit {}", "the number {} written by hand", "somebody wrote a {}", "a small grey {}")
UNSEEN = "a photo of the number {}"  # for the test: no image has been trained with it
WAYS = (
    ("both towers train", None, False),
    ("vision tower frozen", "vision_model", False),
    ("vision tower frozen, cached", "vision_model", True),
    ("text tower frozen", "text_model", False),
)


class Row(NamedTuple):
    way: str
    trainable: int
    seconds: float
    before: float  # accuracy by captions
    after: float
    proof: str  # the certificate of what was frozen


def captioned(tokenizer: PreTrainedTokenizerBase, classes: range, args: argparse.Namespace) -> tuple[list, list]:
    """Returns training rows of an image and one of its captions, and test rows of an image and its label."""
    train, test = digits(classes, args.size)
    captions = [CAPTIONS[at % len(CAPTIONS)].format(NAMES[classes[row["labels"]]]) for at, row in enumerate(train)]
    texts = tokenizer(captions, padding="max_length", max_length=16)
    rows = [
        {"pixel_values": row["pixel_values"], "input_ids": ids, "attention_mask": mask}
        for row, ids, mask in zip(train, texts["input_ids"], texts["attention_mask"], strict=True)
    ]
    return rows, test


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {**default_data_collator(rows), "return_loss": True}


@torch.no_grad()
def by_captions(model: CLIPModel, tokenizer: PreTrainedTokenizerBase, rows: list, classes: range) -> float:
    """Returns the share of images whose nearest caption names their digit; no head is trained for it."""
    captions = tokenizer([UNSEEN.format(NAMES[digit]) for digit in classes], padding=True, return_tensors="pt")
    batch = default_data_collator(rows)
    images = batch["pixel_values"].to(model.device)
    scores = model.eval()(**captions.to(model.device), pixel_values=images).logits_per_image
    return (scores.argmax(-1).cpu() == batch["labels"]).float().mean().item()


def pretrain(args: argparse.Namespace) -> str:
    """Trains a small CLIP on one half of the digits; its folder is used as a hub id is."""
    set_seed(args.seed)
    model, tokenizer = small_clip([text.replace("{}", "") for text in (*CAPTIONS, UNSEEN)] + [*NAMES], args.size)
    train, test = captioned(tokenizer, FIRST, args)
    fit(model, train, args, args.pretrain_epochs, collator=collate)
    print(f"pretrained CLIPModel from nothing: accuracy {by_captions(model, tokenizer, test, FIRST):.3f}")
    for part in (model, tokenizer):
        part.save_pretrained(args.output / "pretrained")
    return str(args.output / "pretrained")


def compare(args: argparse.Namespace) -> list[Row]:
    """Moves the pretrained model to the new digits in each of the ways."""
    name = pretrain(args) if args.model == "made" else args.model
    tokenizer = AutoTokenizer.from_pretrained(name)
    train, test = captioned(tokenizer, SECOND, args)
    rows = []
    for way, frozen, cached in WAYS:
        set_seed(args.seed)
        model = CLIPModel.from_pretrained(name)
        before, proof = by_captions(model, tokenizer, test, SECOND), ""
        if frozen:
            freeze(model, frozen)
        cache = PrefixCache(model.get_submodule(frozen)) if cached else nullcontext()
        with certify_frozen(model) if frozen else nullcontext() as seal, cache:
            done = fit(model, train, args, args.epochs, collator=collate)
        if seal:
            kept = seal.certificate
            proof = f"{kept.tensors} tensors {kept.verdict}, SHA-256 {kept.end.sha256[:8]}"
        after = by_captions(model, tokenizer, test, SECOND)
        rows.append(Row(way, trainable_summary(model).trainable, done.metrics["train_runtime"], before, after, proof))
    return rows


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return arguments(__doc__, 10, 20, 1e-3, "clip_one_tower").parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    quiet()
    cells = [
        [row.way, f"{row.trainable:,}", f"{row.seconds:.1f}", f"{row.before:.3f}", f"{row.after:.3f}", row.proof]
        for row in compare(parse_args(argv))
    ]
    print_table(["way", "trainable", "seconds", "accuracy before", "after", "certificate"], cells)


if __name__ == "__main__":
    main()
