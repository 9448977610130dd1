"""Lets a small attention model decide, while a video model is fine-tuned, which of its layers may freeze.

Shapes move over the picture, and the model has to tell which way. It is made small, and first trained on straight ways;
then it is fine-tuned on eight ways, in full, with `AttentionFreezing`, and with `PrefixCache` besides:

    python examples/video_freezing.py
    python examples/video_freezing.py --architecture timesformer
    python examples/video_freezing.py --model MCG-NJU/videomae-base --limit 200
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from made_signals import SLANTED, STRAIGHT, moving_shapes
from signal_parts import make_trainer
from transformers import AutoConfig, AutoModelForVideoClassification, set_seed

from hf_freeze import AdaptiveFreezing, AttentionFreezing, PrefixCache

ALL = STRAIGHT + SLANTED
SIZES = {
    **{"image_size": 32, "patch_size": 8, "num_frames": 8, "hidden_size": 96, "num_hidden_layers": 6},
    **{"num_attention_heads": 4, "intermediate_size": 192},
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--architecture", choices=("videomae", "timesformer"), default="videomae", help="the model that is made"
    )
    parser.add_argument("--model", help="a model folder or a hub id; where none is named, a small one is made")
    parser.add_argument("--every", type=int, default=10, help="steps from one look at the layers to the next")
    parser.add_argument("--confidence", type=float, default=0.8, help="how likely it has to be that nothing is lost")
    parser.add_argument("--limit", type=int, default=480, help="videos to train on, and half as many to test on")
    parser.add_argument("--epochs", type=float, default=8, help="passes over the videos")
    parser.add_argument(
        "--pretraining", type=float, default=10, help="passes over twice as many to make the small model"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/video_freezing"), help="where the models go")
    parser.add_argument("--seed", type=int, default=0, help="seed of videos, weights and shuffling")
    return parser.parse_args(argv)


def videos(count: int, config: AutoConfig, seed: int, motions: Sequence[str]) -> list[dict]:
    made, labels = moving_shapes(count, config.num_frames, config.image_size, seed, motions)
    return [{"pixel_values": video, "labels": int(label)} for video, label in zip(made - 0.2, labels, strict=True)]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    set_seed(args.seed)
    name = args.model or str(args.output / args.architecture)
    if not args.model:
        config = AutoConfig.for_model(args.architecture, num_labels=len(STRAIGHT), **SIZES)
        model = AutoModelForVideoClassification.from_config(config)
        before = make_trainer(
            model, videos(2 * args.limit, config, args.seed + 1, STRAIGHT), args, args.pretraining, 1e-3
        )
        before.train()
        known = before.evaluate(videos(args.limit // 2, config, args.seed + 2, STRAIGHT))["eval_accuracy"]
        print(f"before: accuracy {known:.3f} on straight ways")
        before.save_model(name)

    config = AutoConfig.from_pretrained(name)
    train, test = (
        videos(count, config, args.seed + seed, ALL) for count, seed in ((args.limit, 3), (args.limit // 2, 4))
    )
    lines = []
    for what, freezes, more in (
        ("all trains", False, []),
        ("AttentionFreezing", True, []),
        ("AttentionFreezing, PrefixCache", True, [PrefixCache()]),
    ):
        set_seed(args.seed)
        model = AutoModelForVideoClassification.from_pretrained(name, num_labels=len(ALL), ignore_mismatched_sizes=True)
        adaptive = AdaptiveFreezing(AttentionFreezing(every=args.every, confidence=args.confidence))
        trainer = make_trainer(model, train, args, args.epochs, 5e-4, *([adaptive] if freezes else []), *more)
        begun = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun
        accuracy = trainer.evaluate(test)["eval_accuracy"]
        when = [f"{decision.freeze} at step {step}" for step, decision in adaptive.decisions if decision.freeze]
        lines.append(f"{what:<32}{seconds:7.1f} s   accuracy {accuracy:.3f}   {'; '.join(when)}")
    print(f"{len(train)} videos, {args.epochs:g} epochs, {trainer.state.max_steps} steps", *lines, sep="\n")


if __name__ == "__main__":
    main()
