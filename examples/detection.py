"""Trains a detector on a frozen backbone, beside training all of it: precision, operations and time.

A small ResNet learns to name single coloured shapes, and then to find one to three in an image, with a plain
convolutional head or as the backbone of a DETR. Nothing is downloaded:

    python examples/detection.py
    python examples/detection.py --head detr
    python examples/detection.py --model microsoft/resnet-18 --size 256
"""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from made_detectors import Convolutional, average_precision, detr
from made_images import SHAPES, shapes
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification, ResNetConfig, set_seed
from vision_parts import arguments, fit, pretrained, print_table, quiet

from hf_freeze import PrefixCache, freeze, trainable_summary, unfreeze

TRAINING, TEST = 400, 100  # images
SMALL = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [2, 3], "layer_type": "basic"}
# of each head: what makes it, where its backbone is, and how it is trained unless told otherwise
HEADS = {
    "convolutional": (Convolutional, "backbone", {"epochs": 12, "lr": 2e-3}),
    "detr": (detr, "model.backbone.model", {"epochs": 20, "lr": 5e-4}),
}
WAYS = {"everything trains": (False, False), "backbone frozen": (True, False), "backbone frozen, cached": (True, True)}


class Row(NamedTuple):
    way: str
    share: float  # of the parameters, that trains
    flops: int  # operations of one step, forward and backward; with a cache, of a step that it serves
    seconds: float  # of a step
    precision: float  # COCO's mean average precision, from overlaps of 0.5 to 0.95
    precision_at_half: float


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": [r["labels"] for r in rows]}


def pretrain(args: argparse.Namespace) -> str:
    """Trains a small ResNet to name the one shape in an image."""
    rows = [
        {"pixel_values": row["pixel_values"], "labels": int(row["labels"]["class_labels"][0])}
        for row in shapes(TRAINING + TEST, seed=args.seed + 2, size=args.size, most=1)
    ]
    return pretrained(ResNetConfig(**SMALL, num_labels=len(SHAPES)), rows[:TRAINING], rows[TRAINING:], args)


def operations(model: nn.Module, rows: list) -> int:
    """Counts the floating-point operations of one step; the first step, which fills a cache, is not counted."""
    batch = collate(rows)
    model.cpu().train()(**batch)
    with FlopCounterMode(display=False) as counter:
        model(**batch)["loss"].backward()
    return counter.get_total_flops()


def compare(args: argparse.Namespace) -> list[Row]:
    """Trains the detector in each of the ways; the first is the one to compare with."""
    name = pretrain(args) if args.model == "made" else args.model
    make, place, _ = HEADS[args.head]
    train = shapes(TRAINING, args.seed, args.size)[: args.limit]
    test = shapes(TEST, args.seed + 1, args.size)
    rows = []
    for way, (frozen, cached) in WAYS.items():
        set_seed(args.seed)  # the same new head each time
        model = make(AutoModelForImageClassification.from_pretrained(name).base_model, len(SHAPES))
        unfreeze(model, "all")  # transformers' DETR comes with a backbone that does not train
        if frozen:
            freeze(model, place)
        with PrefixCache(model.get_submodule(place)) if cached else nullcontext():
            done = fit(model, train, args, args.epochs, collator=collate)
            flops = operations(model, train[: args.batch_size])
        seconds, share = done.metrics["train_runtime"] / done.global_step, trainable_summary(model).share
        rows.append(Row(way, share, flops, seconds, *average_precision(model, test, args.size)))
    return rows


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__, 0, 15, 0, "detection")
    parser.add_argument("--head", choices=HEADS, default="convolutional", help="what finds the shapes")
    head = parser.parse_known_args(argv)[0].head
    parser.set_defaults(size=64, batch_size=16, **HEADS[head][2])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    quiet()
    rows = compare(parse_args(argv))
    cells = []
    for row in rows:
        saved = [1 - row.flops / rows[0].flops, 1 - row.seconds / rows[0].seconds]
        cost = f"{row.flops / 1e9:.2f}", f"{saved[0]:.0%}", f"{1000 * row.seconds:.0f}", f"{saved[1]:.0%}"
        cells.append([row.way, f"{row.share:.1%}", *cost, f"{row.precision:.3f}", f"{row.precision_at_half:.3f}"])
    cells.append(["*literature: backbone frozen*", "", "", "*60%*", "", "", "", ""])
    print_table(["way", "trains", "GFLOP a step", "saved", "ms a step", "saved", "mAP", "AP50"], cells)


if __name__ == "__main__":
    main()
