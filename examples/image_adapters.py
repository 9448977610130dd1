"""Puts bottleneck adapters into a frozen ViT or Swin, with and without the prefix cache, beside training all of it.

The model learns the written digits 0 to 4, and is then moved to 5 to 9. Nothing is downloaded:

    python examples/image_adapters.py
    python examples/image_adapters.py --architecture swin
    python examples/image_adapters.py --model google/vit-base-patch16-224-in21k --size 224
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from made_images import digits
from transformers import AutoModelForImageClassification, PreTrainedModel, SwinConfig, ViTConfig, set_seed
from vision_parts import accuracy, arguments, fit, pretrained, print_table, quiet

from hf_freeze import AutoFreezeModelForImageClassification, BottleneckConfig, PrefixCache, layer_map, trainable_summary

FIRST, SECOND = range(5), range(5, 10)  # the digits to pretrain on, and those to move to
SMALL = {
    "vit": ViTConfig(
        hidden_size=96, num_hidden_layers=6, num_attention_heads=4, intermediate_size=192, image_size=32, patch_size=8
    ),
    "swin": SwinConfig(embed_dim=48, depths=[2, 4], num_heads=[2, 4], window_size=4, image_size=32, patch_size=4),
}


class Row(NamedTuple):
    """What came of one way; `hits` are the rows that the cache had, of all that the model was given."""

    way: str
    trainable: int
    seconds: float
    accuracy: float
    hits: float | None


def load(name: str, adapters: str | None) -> PreTrainedModel:
    """Loads a pretrained model with a new head, and adapters in the layers that a selector names."""
    options = {"num_labels": len(SECOND), "ignore_mismatched_sizes": True}
    if adapters is None:
        return AutoModelForImageClassification.from_pretrained(name, **options)
    config = BottleneckConfig(layers=adapters, bottleneck_size=32)
    return AutoFreezeModelForImageClassification.from_pretrained(name, freeze="base", adapter=config, **options)


def compare(args: argparse.Namespace) -> list[Row]:
    """Moves the pretrained model to the new classes in each of the ways; the first is the one to compare with."""
    small = SMALL[args.architecture]
    small.num_labels = len(FIRST)
    name = pretrained(small, *digits(FIRST, args.size), args) if args.model == "made" else args.model
    train, test = digits(SECOND, args.size)
    depth = len(layer_map(load(name, None)).layers)
    top = f"layers[-{max(1, depth // 2)}:]"
    rows = []
    for way, adapters, cache in (
        ("everything trains", None, None),
        (f"adapters in all {depth} layers", "layers", None),
        (f"adapters in {top}", top, None),
        (f"adapters in {top}, cached", top, PrefixCache()),
    ):
        set_seed(args.seed)  # the same new head and adapters each time
        model = load(name, adapters)
        rate = args.lr if adapters is None else args.adapter_lr
        done = fit(model, train, args, args.epochs, [cache] if cache else [], lr=rate)
        hits = cache.hits / (cache.hits + cache.misses + cache.passed) if cache else None
        rows.append(
            Row(way, trainable_summary(model).trainable, done.metrics["train_runtime"], accuracy(model, test), hits)
        )
    return rows


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__, 10, 20, 5e-4, "image_adapters")
    parser.add_argument("--architecture", choices=SMALL, default="vit", help="what is made")
    parser.add_argument("--adapter-lr", type=float, default=1e-2, help="learning rate of adapters and their head")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    quiet()
    rows = compare(parse_args(argv))
    names = ["way", "trainable", "seconds", "time saved", "accuracy", "found in the cache"]
    cells = []
    for row in rows:
        saved, hits = 1 - row.seconds / rows[0].seconds, "" if row.hits is None else f"{row.hits:.0%}"
        cells.append([row.way, f"{row.trainable:,}", f"{row.seconds:.1f}", f"{saved:.0%}", f"{row.accuracy:.3f}", hits])
    print_table(names, cells)


if __name__ == "__main__":
    main()
