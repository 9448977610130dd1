"""Tells tones apart with wav2vec 2.0 or Whisper: the feature encoder is frozen, the layers unfreeze in stages.

The model is made small, and first trained to tell rising from falling tones; then it learns four kinds, in full, and in
stages with the feature encoder as it was:

    python examples/speech.py
    python examples/speech.py --architecture whisper
    python examples/speech.py --model facebook/wav2vec2-base --limit 200
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from made_signals import CONTOURS, log_mel, tones
from signal_parts import make_trainer
from transformers import AutoConfig, AutoModelForAudioClassification, set_seed

from hf_freeze import Stage, StagedUnfreezing, layer_map

SIZES = {
    "wav2vec2": {
        **{"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128},
        **{"conv_dim": [32] * 7, "feat_extract_norm": "layer", "num_conv_pos_embeddings": 16, "mask_time_prob": 0.0},
        **{"num_conv_pos_embedding_groups": 4, "classifier_proj_size": 64, "layerdrop": 0.0},
    },
    "whisper": {
        **{"d_model": 64, "encoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 128},
        **{"max_source_positions": 50, "classifier_proj_size": 64},
    },
}
# The first selector reads "what is neither embeddings, which holds the feature encoder, nor layers".
STAGES = [
    Stage(0, "all - embeddings - layers", lr=2e-3),
    Stage("20%", "layers[-2:]", lr=1e-3, layer_decay=0.9),
    Stage("50%", "layers[:-2]", lr=5e-4, layer_decay=0.9),
]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", choices=SIZES, default="wav2vec2", help="the model that is made")
    parser.add_argument("--model", help="a model folder or a hub id; where none is named, a small one is made")
    parser.add_argument("--limit", type=int, default=480, help="tones to train on, and half as many to test on")
    parser.add_argument("--epochs", type=float, default=8, help="passes over the tones")
    parser.add_argument("--output", type=Path, default=Path("outputs/speech"), help="where the models go")
    parser.add_argument("--seed", type=int, default=0, help="seed of tones, weights and shuffling")
    return parser.parse_args(argv)


def sounds(count: int, model: torch.nn.Module, seed: int, contours: Sequence[str]) -> list[dict]:
    """Returns tones as the model takes them: waves, or log-mel spectrograms."""
    waves, labels = tones(count, seed, contours=contours)
    taken = model.main_input_name
    if taken == "input_features":
        config = model.config
        waves = log_mel(waves, config.num_mel_bins, seconds=config.max_source_positions // 50)
    return [{taken: wave, "labels": int(label)} for wave, label in zip(waves, labels, strict=True)]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    set_seed(args.seed)
    name, first = args.model or str(args.output / args.architecture), ("rising", "falling")
    if not args.model:
        config = AutoConfig.for_model(args.architecture, num_labels=len(first), **SIZES[args.architecture])
        model = AutoModelForAudioClassification.from_config(config)
        before = make_trainer(model, sounds(2 * args.limit, model, args.seed + 1, first), args, args.epochs, 1e-3)
        before.train()
        known = before.evaluate(sounds(args.limit // 2, model, args.seed + 2, first))["eval_accuracy"]
        print(f"before: accuracy {known:.3f} on rising and falling tones")
        before.save_model(name)

    lines = []
    for what, callbacks in (("all trains", []), ("in stages, feature encoder frozen", [StagedUnfreezing(STAGES)])):
        set_seed(args.seed)
        model = AutoModelForAudioClassification.from_pretrained(
            name, num_labels=len(CONTOURS), ignore_mismatched_sizes=True
        )
        if not lines:
            print(layer_map(model))
        train = sounds(args.limit, model, args.seed + 3, CONTOURS)
        trainer = make_trainer(model, train, args, args.epochs, 1e-3, *callbacks)
        begun = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun
        accuracy = trainer.evaluate(sounds(args.limit // 2, model, args.seed + 4, CONTOURS))["eval_accuracy"]
        lines.append(f"{what:<36}{seconds:7.1f} s   accuracy {accuracy:.3f}")
    print(f"{len(train)} tones, {args.epochs:g} epochs", *lines, sep="\n")


if __name__ == "__main__":
    main()
