"""The examples on videos, sounds, language models and texts: each runs small, and shows what it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from example_scripts import EXAMPLES, load
from launching import launch

ROOT = Path(__file__).parents[1]


def numbers(pattern: str, shown: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, shown)]


# What they are made of


def test_no_frame_tells_which_way_a_shape_moves_but_two_do():
    made = load("made_signals")
    videos, labels = made.moving_shapes(64, frames=4, size=32, seed=0)

    again, _ = made.moving_shapes(64, frames=4, size=32, seed=0)
    assert torch.equal(videos, again) and videos.shape == (64, 4, 3, 32, 32) and set(labels.tolist()) == {0, 1, 2, 3}
    # where the shape of one frame lies best in the next, up to the edges of the picture, which it crosses
    moves = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
    for video, label in zip(videos.mean(2), labels, strict=True):
        fits = {
            name: (video[0].roll((4 * down, 4 * right), (0, 1)) * video[1]).sum()
            for name, (down, right) in moves.items()
        }
        assert max(fits, key=fits.get) == made.STRAIGHT[label]


def test_a_tone_does_what_its_label_says():
    made = load("made_signals")
    waves, labels = made.tones(40, seed=0)
    for wave, label in zip(waves, labels, strict=True):
        early, late = (torch.fft.rfft(part).abs().argmax() for part in (wave[:2000], wave[-2000:]))
        higher = {"steady": abs(late - early) <= 1, "rising": late > early, "falling": early > late, "wavering": True}
        assert higher[made.CONTOURS[label]]


def test_questions_have_their_answers_where_they_say():
    texts = [
        "Shares in Time Warner rose 8% on Friday.\n\nThe firm now owns a part of Google.",
        "Of the shares and more",
    ]
    rows = load("made_texts").questions(texts)

    answers = {(row["question"], row["answers"]["text"][0]) for row in rows}
    assert answers == {
        ("Who or what is named?", "Time Warner"),
        ("How many or how much?", "8%"),
        ("When is it?", "Friday"),
        ("Who or what is named?", "Google"),
    }
    for row in rows:
        (start,), (text,) = row["answers"]["answer_start"], row["answers"]["text"]
        assert row["context"][start:].startswith(text)


def test_squads_f1_of_two_answers():
    overlap = load("text_parts").overlap
    assert overlap("the Prime Minister", "Prime Minister Blair") == pytest.approx(0.8)
    assert overlap("A cat", "the cat!") == 1.0
    assert overlap("", "") == 1.0 and overlap("", "cat") == 0.0


# The scripts


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["videomae", "timesformer"])
def test_video_freezing_freezes_when_the_policy_says_so(architecture, tmp_path, capsys):
    size = ["--limit", "32", "--epochs", "5", "--every", "1", "--confidence", "0.01"]
    load("video_freezing").main(["--architecture", architecture, *size, "--output", str(tmp_path)])

    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if " s   accuracy " in line]
    assert [line.split("  ")[0] for line in lines] == [
        "all trains",
        "AttentionFreezing",
        "AttentionFreezing, PrefixCache",
    ]
    frozen = [re.findall(r"(embeddings.*?) at step (\d+)", line) for line in lines]
    assert frozen[0] == [] and frozen[1] and frozen[1] == frozen[2]
    assert (tmp_path / architecture / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["wav2vec2", "whisper"])
def test_speech_trains_in_stages_and_leaves_the_feature_encoder_alone(architecture, tmp_path, capsys, monkeypatch):
    speech = load("speech")
    size = ["--limit", "16", "--epochs", "3", "--output", str(tmp_path)]
    trained: list = []
    make = speech.make_trainer

    def watched(model, *more):
        trainer = make(model, *more)
        trained.append((trainer, {name: own.detach().clone() for name, own in model.named_parameters()}))
        return trainer

    monkeypatch.setattr(speech, "make_trainer", watched)
    speech.main(["--architecture", architecture, *size])
    assert "stage 3 of 3" in capsys.readouterr().out
    (_, full, staged) = trained
    for (trainer, before), moves in ((full, True), (staged, False)):
        after = dict(trainer.model.named_parameters())
        convolutions = [name for name in before if re.search(r"conv\d|feature_extractor.*conv", name)]
        assert convolutions and all(torch.equal(after[name], before[name]) != moves for name in convolutions)
        layers = [name for name in before if re.search(r"layers\.\d.*fc1.weight|feed_forward.*dense.weight", name)]
        assert len(layers) >= 4 and not any(torch.equal(after[name], before[name]) for name in layers)


@pytest.mark.slow
def test_language_model_serves_each_row_by_its_adapter(tmp_path, capsys, monkeypatch):
    made = load("made_language_model")
    monkeypatch.setattr(made, "STEPS", 40)
    monkeypatch.setattr(made, "WORDS", 500)
    monkeypatch.setattr(made, "SIZES", {**made.SIZES, "num_hidden_layers": 2})
    size = ["--limit", "20", "--epochs", "4", "--max-length", "32", "--output", str(tmp_path)]
    load("language_model").main([*size, "--lisa"])

    shown = capsys.readouterr().out
    found = {
        what: [float(own) for own in rest.split()] for what, rest in re.findall(r"^(.{22}) ([ \d.]+)$", shown, re.M)
    }
    found = {what.strip(): own for what, own in found.items()}
    assert [*found] == ["no adapter", "LISA: sports", "LISA: tech", "adapter: sports", "adapter: tech"]
    sports, tech = found["adapter: sports"], found["adapter: tech"]
    assert sports[0] < min(found["no adapter"][0], tech[0]) and tech[1] < min(found["no adapter"][1], sports[1])
    assert "each row is what its adapter writes alone: True" in shown
    assert len({text for text in re.findall(r"^(?:no adapter|sports|tech): (.*)$", shown, re.M)}) == 3
    assert {path.name for path in tmp_path.iterdir()} >= {"base", "sports", "tech"}
    assert not (tmp_path / "sports" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_seq2seq_writes_otherwise_with_its_adapters(architecture, tmp_path, capsys):
    load("seq2seq").main(["--architecture", architecture, "--limit", "40", "--epochs", "4", "--output", str(tmp_path)])

    shown = capsys.readouterr().out
    assert len(numbers(r"test exact (\d\.\d+), test f1 \d", shown)) == 2
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "BOTTLENECK"
    from safetensors import safe_open

    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert {"encoder", "decoder"} <= {part for name in file.keys() for part in name.split(".")}  # noqa: SIM118


METRIC = """
import datasets
import evaluate


class {name}(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features({features}))

    def _compute(self, predictions, references):
        return {{"rows_seen": float(len(predictions))}}
"""


def metric(folder: Path, features: str) -> str:
    """Writes a metric of evaluate's own kind, which needs no hub."""
    path = folder / "counting" / "counting.py"
    path.parent.mkdir()
    path.write_text(METRIC.format(name="Counting", features=features))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["staged", "adapters"])
def test_token_classification_learns_tags(method, tmp_path, capsys):
    size = ["--limit", "200", "--epochs", "3", "--max-length", "32", "--output", str(tmp_path)]
    load("token_classification").main(["--method", method, *size])

    shown = capsys.readouterr().out
    assert numbers(r"test_f1: (\d\.\d+)", shown)[0] > 0.3
    assert (tmp_path / ("model" if method == "staged" else "adapter_model")).with_suffix(".safetensors").is_file()


@pytest.mark.slow
def test_token_classification_takes_ones_own_tags_and_a_metric_of_evaluates(tmp_path, capsys):
    rows = [
        {"tokens": ["we", "saw", town, "today"], "kinds": ["O", "O", "B-TOWN", "O"]}
        for town in ["Paris", "Rome", "Bonn", "Riga", "Oslo"] * 8
    ]
    (tmp_path / "marked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    features = "dict.fromkeys(('predictions', 'references'), datasets.List(datasets.Value('string')))"
    load("token_classification").main(
        [
            *("--dataset", str(tmp_path / "marked.jsonl"), "--tag-column", "kinds", "--epochs", "5"),
            *("--metric", metric(tmp_path, features), "--output", str(tmp_path / "out")),
        ]
    )

    assert numbers(r"test_rows_seen: (\d+)", capsys.readouterr().out) == [8]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {"0": "B-TOWN", "1": "O"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["staged", "adapters"])
def test_question_answering_learns_spans(method, tmp_path, capsys):
    size = ["--limit", "150", "--epochs", "2", "--max-length", "32", "--output", str(tmp_path)]
    load("question_answering").main(["--method", method, *size])

    shown = capsys.readouterr().out
    assert numbers(r"test f1 (\d+\.\d)", shown)[0] > 20


@pytest.mark.slow
def test_run_glue_on_two_processes(tmp_path):
    size = ["--limit", "60", "--epochs", "1", "--max-length", "16", "--batch-size", "4"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / "run_glue.py"), *size, "--bf16", "--output", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr
    assert "2 process(es), MULTI_CPU, cpu" in done.stdout
    assert len(numbers(r"test_accuracy (\d\.\d+)", done.stdout)) == 1
    assert "stage 3 of 3" in done.stdout
    assert (tmp_path / "model.safetensors").is_file()


SHARDED = """
import sys
sys.path[:0] = {paths}
from sharded import fsdp_on_cpu
import run_glue
with fsdp_on_cpu():
    run_glue.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_run_glue_shards_its_model(tmp_path):
    """accelerate runs no FSDP on the CPU: what stands in its way is set aside, see `fsdp_on_cpu`."""
    script = tmp_path / "sharded_glue.py"
    script.write_text(SHARDED.format(paths=[str(ROOT), str(ROOT / "tests"), str(EXAMPLES)]))
    size = ["--limit", "40", "--epochs", "1", "--max-length", "16", "--batch-size", "4"]
    done = launch(str(script), *size, "--fsdp", "--output", tmp_path / "out")

    assert done.returncode == 0, done.stderr
    assert "2 process(es), FSDP, cpu" in done.stdout
    assert len(numbers(r"test_accuracy (\d\.\d+)", done.stdout)) == 1


@pytest.mark.slow
def test_run_glue_takes_pairs_of_texts_from_a_file(tmp_path, capsys):
    rows = [f"number {at},{'same' if same else 'other'} {at},{same}" for at in range(20) for same in (0, 1)]
    (tmp_path / "pairs.csv").write_text("\n".join(["one,two,label", *rows]))
    size = ["--epochs", "3", "--max-length", "16", "--output", str(tmp_path / "out")]
    features = "dict.fromkeys(('predictions', 'references'), datasets.Value('int32'))"
    load("run_glue").main(
        [
            *("--dataset", str(tmp_path / "pairs.csv"), "--text-columns", "one", "two", *size),
            *("--metric", metric(tmp_path, features)),
        ]
    )

    assert numbers(r"test_rows_seen (\d+)", capsys.readouterr().out) == [8]
