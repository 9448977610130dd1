"""Moves a pretrained ResNet to new classes, frozen in several ways, and compares their time and accuracy.

A small ResNet learns the written digits 0 to 4, and is then moved to 5 to 9. Nothing is downloaded:

    python examples/image_classification.py
    python examples/image_classification.py --model microsoft/resnet-18 --size 224
    python examples/image_classification.py --model timm:resnet18
    python examples/image_classification.py --model torchvision:resnet18
"""

import argparse
from collections.abc import Sequence
from itertools import chain, groupby
from typing import NamedTuple

from made_images import digits
from torch import nn
from transformers import ResNetConfig, TrainerCallback, set_seed
from vision_parts import accuracy, arguments, fit, load_classifier, pretrained, print_table, quiet

from hf_freeze import PrefixCache, Stage, StagedUnfreezing, freeze_until, layer_map, select, trainable_summary

FIRST, SECOND = range(5), range(5, 10)  # the digits to pretrain on, and those to move to
SMALL = {"embedding_size": 32, "hidden_sizes": [32, 64, 128, 256], "depths": [2, 2, 2, 2], "layer_type": "basic"}


class Row(NamedTuple):
    """What came of one way.

    Attributes:
        way: How it is called.
        share: The share of the parameters that trains.
        seconds: Time of training, the filling of a cache included.
        accuracy: On test images of the new classes.
        drift: How far BatchNorm's means have moved in frozen layers, at most; None where none is frozen throughout.
    """

    way: str
    share: float
    seconds: float
    accuracy: float
    drift: float | None


def stages_of(model: nn.Module) -> list[list[str]]:
    """Returns the names of the layers of each stage: the blocks of a stage lie in one list."""
    blocks = groupby(layer_map(model).layers, lambda layer: layer.module_names[0].rpartition(".")[0])
    return [[layer.name for layer in stage] for _, stage in blocks]


def by_hand(model: nn.Module) -> list[TrainerCallback]:
    """Stops gradients and no more, as is often done: BatchNorm's statistics stay live."""
    for name in select(model, ", ".join(["embeddings", *chain(*stages_of(model)[:-1])])):
        model.get_parameter(name).requires_grad_(False)
    return []


def all_but_last(model: nn.Module) -> list[TrainerCallback]:
    freeze_until(model, stages_of(model)[-1][0])
    return []


def stage_by_stage(model: nn.Module) -> list[TrainerCallback]:
    """Trains the head first, then one stage more at a time, from the top down; the stem comes with the lowest."""
    parts = ["head", *(", ".join(stage) for stage in stages_of(model)[::-1])]
    parts[-1] += ", embeddings"
    return [StagedUnfreezing([Stage(f"{100 * at // len(parts)}%", part) for at, part in enumerate(parts)])]


WAYS = {
    "everything trains": lambda model: [],
    "all but the last stage frozen, by hand": by_hand,
    "all but the last stage frozen": all_but_last,
    "the same, cached": lambda model: [*all_but_last(model), PrefixCache()],
    "unfrozen stage by stage": stage_by_stage,
}


def compare(args: argparse.Namespace) -> list[Row]:
    """Moves the pretrained model to the new classes in each of the ways; the first is the one to compare with."""
    small = ResNetConfig(**SMALL, num_labels=len(FIRST))
    name = pretrained(small, *digits(FIRST, args.size), args) if args.model == "made" else args.model
    train, test = digits(SECOND, args.size)
    rows = []
    for way, prepare in WAYS.items():
        set_seed(args.seed)  # the same new head each time
        model = load_classifier(name, len(SECOND))
        callbacks, share = prepare(model), trainable_summary(model).share
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and not m.weight.requires_grad]
        before = [norm.running_mean.clone() for norm in norms]
        done = fit(model, train, args, args.epochs, callbacks)
        moved = [(norm.running_mean.cpu() - mean).abs().max().item() for norm, mean in zip(norms, before, strict=True)]
        rows.append(Row(way, share, done.metrics["train_runtime"], accuracy(model, test), max(moved, default=None)))
    return rows


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return arguments(__doc__, 8, 8, 1e-3, "image_classification").parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    quiet()
    rows = compare(parse_args(argv))
    names = ["way", "trains", "seconds", "time saved", "accuracy", "of everything's", "frozen BatchNorm moved"]
    cells = []
    for row in rows:
        saved, kept = 1 - row.seconds / rows[0].seconds, row.accuracy / rows[0].accuracy
        drift = "" if row.drift is None else f"{row.drift:.3f}"
        numbers = f"{row.share:.1%}", f"{row.seconds:.1f}", f"{saved:.0%}", f"{row.accuracy:.3f}", f"{kept:.0%}", drift
        cells.append([row.way, *numbers])
    cells.append(["*literature: ResNet-50, CIFAR-100, three stages frozen*", "", "", "*40%*", "", "*92%*", ""])
    print_table(names, cells)


if __name__ == "__main__":
    main()
