"""The command line: what each command prints, and that each mistake ends in one line with exit code 2."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, Trainer

from hf_freeze import Recipe, cli, runs
from hf_freeze.cli import demo_methods, tables
from hf_freeze.data import EMBEDDED, embedded_model_path
from hf_freeze.rendering import as_text
from hf_freeze.runs import Outcome, load_base, read_record
from tests.adapters import hub

gc.freeze()  # accelerate 1.15 collects garbage at the start of each train(): see tests/training.py
TEXTS = [(f"the film was {word} {number}", word) for number in range(15) for word in ("good", "bad")]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A BERT with the embedded model's words and random weights, of four layers."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder but for the data."""
    monkeypatch.chdir(tmp_path)
    write_csv("films.csv", TEXTS)
    return tmp_path


@pytest.fixture
def hf_freeze(monkeypatch, capsys):
    """Runs a command line in this process; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-freeze", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capsys.readouterr()

    return run


def write_csv(name: str, rows, header=("text", "label")) -> None:
    Path(name).write_text("".join(",".join(row) + "\n" for row in [header, *rows]))


def everything(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


# What works


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--freeze", "embeddings, layers[:2]", "--unfreeze", "gradual", "--epochs", "2"],
        ["--adapter", "4"],
        ["--adapter", "4", "--freeze", "base"],
        ["--unfreeze", "stages.yaml"],
    ],
    ids=" ".join,
)
def test_train(options, here, hf_freeze, model):
    Path("stages.yaml").write_text('stages: [{start: 0, unfreeze: head}, {start: "50%", unfreeze: "layers[-1:]"}]')
    code, out, _ = hf_freeze(
        "train", "--model", model, "--dataset", "films.csv", "--epochs", 1, "--batch-size", 4, *options
    )
    assert code == 0
    assert "18 training and 6 test texts in 2 classes, seed 0" in out
    assert "on all 6 test texts its logits are the trained model's, bit for bit" in out
    assert len(re.findall(r"^  (good|bad) \(\d+%\): the film was", out, re.MULTILINE)) == 3
    assert "{" not in out  # no dict of the Trainer's
    assert read_record(Path("outputs/train"))["labels"] == ["bad", "good"]


@pytest.mark.parametrize("shape", ["folders", "jsonl"])
def test_train_on_folders_and_json_lines_with_columns_of_ones_own(shape, here, hf_freeze, model):
    if shape == "folders":
        for number, (text, label) in enumerate(TEXTS):
            Path("data", label).mkdir(parents=True, exist_ok=True)
            Path("data", label, f"{number}.txt").write_text(text)
        options = ["--dataset", "data"]
    else:
        lines = [f'{{"body": "{text}", "verdict": "{label}"}}' for text, label in TEXTS]
        Path("data.jsonl").write_text("\n".join(lines))
        options = ["--dataset", "data.jsonl", "--text-column", "body", "--label-column", "verdict"]
    code, out, _ = hf_freeze("train", "--model", model, "--epochs", 1, "--limit", 8, *options)
    assert code == 0
    assert "8 training and 6 test texts in 2 classes" in out


def test_stage_changes_are_announced(here, hf_freeze, model):
    code, out, _ = hf_freeze(
        "train", "--model", model, "--dataset", "films.csv", "--epochs", 2, "--batch-size", 4, "--unfreeze", "gradual"
    )
    assert code == 0
    assert re.findall(r"^step \d+: stage (\d) of (\d): \+", out, re.MULTILINE) == [(str(i), "5") for i in range(1, 6)]


def test_one_progress_bar_on_a_terminal(here, hf_freeze, model, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    _, _, err = hf_freeze("train", "--model", model, "--dataset", "films.csv", "--epochs", 1, "--batch-size", 4)
    finished = [line for line in re.split(r"[\r\n]+", err) if line.startswith("train: 100%") and "loss=" in line]
    assert "5/5" in finished[-1]
    assert err.count("\n") == 1  # one bar is left: all else has been drawn over
    assert "{" not in err


def test_a_line_now_and_then_in_a_pipe_or_a_log(here, hf_freeze, model):
    arguments = ["--epochs", 4, "--batch-size", 4, "--unfreeze", "gradual"]
    code, out, err = hf_freeze("train", "--model", model, "--dataset", "films.csv", *arguments)
    lines = err.splitlines()
    assert code == 0 and len(lines) == 10
    pattern = r"train: step (\d+) of 20 \(\d+%\), loss \d+\.\d{3}, stage \d, \d+ s"
    assert [re.fullmatch(pattern, line)[1] for line in lines] == [str(2 * tenth) for tenth in range(1, 11)]
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", out + err)  # no carriage returns, no colours


def test_a_long_step_gets_a_line_of_its_own(here, hf_freeze, model, monkeypatch):
    monkeypatch.setattr("hf_freeze.cli.progress.PAUSE", -1.0)  # as though each step had taken more than that
    arguments = ["--epochs", 4, "--batch-size", 6, "--freeze", "base"]
    _, _, err = hf_freeze("train", "--model", model, "--dataset", "films.csv", *arguments)
    assert [re.sub(r", \d+ s", "", line) for line in err.splitlines() if "loss" not in line] == [
        f"train: step {step} of 12 ({step / 12:.0%})" for step in range(1, 13)
    ]


# Recipes


def saved(folder: str) -> dict[str, bytes]:
    """What a run has saved, but for the seconds that it took: the weights, the labels and the recipe."""
    names = ("model.safetensors", "adapter_model.safetensors", "config.json", "recipe.yaml")
    return {name: Path(folder, name).read_bytes() for name in names if Path(folder, name).exists()}


@pytest.mark.parametrize("recipe", Recipe.presets())
def test_a_recipe_beside_a_result_gives_the_same_bit_for_bit(recipe, here, hf_freeze, model, monkeypatch):
    options = ["--model", model, "--dataset", "films.csv", "--epochs", 2, "--batch-size", 4, "--limit", 16]
    code, out, _ = hf_freeze("train", "--recipe", recipe, *options, "--output", "first", "--json")
    assert code == 0
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    code, again, _ = hf_freeze("train", "--recipe", "../first/recipe.yaml", "--output", "../second", "--json")
    assert code == 0
    assert saved("../first") == saved("../second")
    assert len(saved("../first")) == 3 if Recipe.from_preset(recipe).adapter is None else 2
    figures, others = json.loads(out), json.loads(again)
    for name in ("name", "trainable", "parameters", "accuracy", "macro_f1"):
        assert figures[name] == others[name]


def test_options_beat_the_recipe(here, hf_freeze, model):
    Path("mine.yaml").write_text(
        "name: mine\nfreeze: base\nadapter: {bottleneck_size: 4, placement: houlsby}\nlr: 2e-3\nepochs: 1\n"
        "dataset: {name: films.csv, limit: 8}\nwarmup: 50%\n"
    )
    options = ["--adapter", 2, "--lr", "1e-3", "--limit", 10, "--warmup", "1", "--weight-decay", "0.1", "--seed", 3]
    code, out, err = hf_freeze("train", "--recipe", "mine.yaml", "--model", model, *options)
    assert code == 0, err
    assert "10 training and 6 test texts in 2 classes, seed 3" in out
    told = Recipe.from_yaml(Path("outputs/train/recipe.yaml"))
    assert (told.name, told.freeze, told.lr, told.epochs, told.warmup, told.seed) == ("mine", "base", 1e-3, 1, 1, 3)
    assert (told.adapter.bottleneck_size, told.adapter.placement) == (2, "houlsby")
    assert (told.dataset.name, told.dataset.limit, told.model) == (str(here / "films.csv"), 10, model)


def test_json_stands_alone_on_stdout(here, hf_freeze, model):
    arguments = ["train", "--model", model, "--dataset", "films.csv", "--epochs", 2, "--unfreeze", "gradual"]
    code, out, err = hf_freeze(*arguments, "--batch-size", 4, "--json")
    found = json.loads(out)
    assert code == 0 and found["output"] == "outputs/train" and 0 <= found["accuracy"] <= 1
    assert "stage 2 of 5" in err and "bit for bit" in err


def test_recipes_are_listed(hf_freeze):
    _, out, _ = hf_freeze("recipe", "list")
    assert [line.split()[0] for line in out.splitlines()] == [*Recipe.presets()]
    listed = json.loads(hf_freeze("recipe", "list", "--json")[1])
    assert [own["name"] for own in listed] == [*Recipe.presets()] and all(own["about"] for own in listed)


@pytest.mark.parametrize("name", Recipe.presets())
def test_a_recipe_that_is_shown_can_be_edited_and_run(name, here, hf_freeze):
    code, out, _ = hf_freeze("recipe", "show", name)
    Path("mine.yaml").write_text(out)
    assert code == 0 and out.startswith("#") and "$schema" not in out
    assert Recipe.from_yaml(Path("mine.yaml")) == Recipe.from_preset(name)
    assert hf_freeze("recipe", "check", "mine.yaml") == (0, "mine.yaml: valid\n", "")


@pytest.mark.parametrize("name", Recipe.presets())
def test_a_recipe_is_held_against_a_model(name, hf_freeze, model):
    code, out, _ = hf_freeze("recipe", "check", name, "--model", model, "--json")
    found = json.loads(out)
    assert code == 0 and found["valid"] and found["class"] == "BertForSequenceClassification"
    assert 0 < found["trainable"] <= found["parameters"]
    assert found["stages"] == {"gradual": 5, "lp-ft": 2}.get(name, 1)
    assert "fits BertForSequenceClassification" in hf_freeze("recipe", "check", name, "--model", model)[1]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("freze: base", "Unknown field 'freze' in the recipe. Did you mean 'freeze'"),
        ("freeze: 'layers[9]'", r"layers\[9\]"),
        ("unfreeze: {stages: [{start: 0, unfreeze: hat}]}", "'hat' names no segment"),
        ("adapter: {layers: head}", "layers='head' names 'head'"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(content, match, here, hf_freeze, model):
    Path("mine.yaml").write_text(content)
    code, out, err = hf_freeze("recipe", "check", "mine.yaml", "--model", model)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"Error: .*{match}.*\n", err)
    code, out, _ = hf_freeze("recipe", "check", "mine.yaml", "--model", model, "--json")
    assert code == 2
    assert not json.loads(out)["valid"] and re.search(match, json.loads(out)["error"])


def test_the_schema_is_printed_or_written(here, hf_freeze):
    assert json.loads(hf_freeze("recipe", "schema")[1]) == Recipe.json_schema()
    assert hf_freeze("recipe", "schema", "--output", "recipe.schema.json")[:2] == (0, "")
    assert json.loads(Path("recipe.schema.json").read_text()) == Recipe.json_schema()
    code, out, err = hf_freeze("recipe", "schema", "--output", "films.csv/recipe.schema.json")
    assert (code, out) == (2, "") and re.fullmatch("Error: The schema can't be written to 'films.csv/.*\n", err)


# predict


def test_predict_says_for_each_text_what_the_saved_model_does(here, hf_freeze, model):
    hf_freeze("train", "--model", model, "--dataset", "films.csv", "--epochs", 1, "--max-length", 8)
    texts = [f"the film was {word}" for word in ("good", "bad")] + ["a\tlong   text " * 20]
    code, out, err = hf_freeze("predict", "outputs/train", *texts)
    rows = [line.split("\t") for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [row[2] for row in rows] == [" ".join(text.split()) for text in texts]
    tokenizer, restored = runs.load(Path("outputs/train"))
    wanted = list(runs.predict(restored, tokenizer, texts, max_length=8))
    assert [(row[0], row[1]) for row in rows] == [(label, f"{share:.3f}") for label, share in wanted]
    found = [json.loads(line) for line in hf_freeze("predict", "outputs/train", *texts, "--json")[1].splitlines()]
    assert [(own["label"], own["probability"], own["text"]) for own in found] == [
        (*pair, text) for pair, text in zip(wanted, texts, strict=True)
    ]
    # stdin is a process's own
    done = subprocess.run(
        [sys.executable, "-m", "hf_freeze.cli", "predict", "outputs/train"],
        input="\n".join(texts[:2]).encode() + b"\n\xff\n", capture_output=True,
    )  # fmt: skip
    assert done.stdout.decode().splitlines()[:2] == out.splitlines()[:2]
    assert len(done.stdout.splitlines()) == 3 and (done.returncode, done.stderr) == (0, b"")


def test_predict_refuses_in_one_line(here, hf_freeze, model, monkeypatch):
    code, out, err = hf_freeze("predict", "films.csv", "a")
    assert (code, out) == (2, "") and re.fullmatch("Error: 'films.csv' holds no run of hf_freeze .*\n", err)
    hf_freeze("train", "--model", model, "--dataset", "films.csv", "--epochs", 1, "--adapter", 2)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    code, out, err = hf_freeze("predict", "outputs/train")
    assert (code, out) == (2, "") and re.fullmatch("Error: No texts: name some, or pipe them.*\n", err)


# convert


def test_convert_goes_to_adapterhub_and_back(here, hf_freeze, model):
    hf_freeze("train", "--model", model, "--dataset", "films.csv", "--epochs", 1, "--adapter", 2)
    Path("mine.yaml").write_text("adapter: {placement: pfeiffer, bottleneck_size: 2}\nepochs: 1\ndataset: films.csv")
    hf_freeze("train", "--model", model, "--recipe", "mine.yaml", "--output", "ours")
    code, out, err = hf_freeze("convert", "ours", "theirs", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"source": "ours", "output": "theirs", "format": "AdapterHub"}
    code, out, err = hf_freeze("convert", "theirs", "again", "--model", model)
    assert (code, out, err) == (0, "theirs is in again now, in PEFT's format.\n", "")
    tokenizer, trained = runs.load(Path("ours"))
    restored = BertForSequenceClassification.from_pretrained(model)
    restored.load_adapter("again")
    batch = tokenizer("the film was good", return_tensors="pt")
    assert torch.equal(trained.eval()(**batch).logits, restored.eval()(**batch).logits)


@pytest.mark.parametrize("case", ["bert/pfeiffer", "bert/static_head", "bert/flexible_head", "gpt2/parallel"])
def test_convert_reads_what_the_adapters_library_wrote(case, here, hf_freeze):
    folder, base = hub.adapter(case), hub.ROOT / Path(case).parts[0] / "base"
    code, _, err = hf_freeze("convert", folder, "ours", "--model", base)
    assert (code, err) == (0, "")
    model = hub.base_model(case)
    model.load_adapter("ours")
    torch.testing.assert_close(hub.output(model.eval(), case), hub.expected(case)["output"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["nothing", "out"], "nothing/adapter_config.json is missing"),
        ([hub.adapter("bert/pfeiffer"), "out"], "does not name its base model. Name it: --model"),
        ([hub.adapter("bert/pfeiffer"), "out", "--model", "./none"], "No such model folder: 'none'"),
        ([hub.adapter("bert/pfeiffer"), "."], "is not empty: name another one, or pass --overwrite"),
        (["lora", "out"], "holds LORA, and AdapterHub has a counterpart of bottleneck adapters alone"),
    ],
)
def test_convert_refuses_in_one_line(arguments, match, here, hf_freeze):
    Path("lora").mkdir()
    Path("lora/adapter_config.json").write_text('{"peft_type": "LORA"}')
    code, out, err = hf_freeze("convert", *arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"Error: .*{match}.*\n", err), err


# What every command has


def commands(group=cli.app, prefix=()):
    """Yields the words of each command."""
    for name, command in (typer.main.get_command(group).commands if isinstance(group, typer.Typer) else group).items():
        if hasattr(command, "commands"):
            yield from commands(command.commands, (*prefix, name))
        else:
            yield (*prefix, name)


@pytest.mark.parametrize("words", [(), *commands()], ids=" ".join)
def test_help_teaches_with_an_example(words, hf_freeze):
    code, out, err = hf_freeze(*words, "--help")
    assert (code, err) == (0, "")
    assert f"Example: hf-freeze {' '.join(words)}".strip() in " ".join(out.replace("│", " ").split())


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['hf-freeze', '--help']\nfrom hf_freeze import cli\n"
        "try: cli.main()\nexcept SystemExit: print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    seconds, loaded = [], ""
    for _ in range(3):
        before = os.times()  # the machine may be busy with others: what counts is the time that it works for us
        loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    heavy = {"torch", "transformers", "peft", "accelerate", "datasets", "numpy", "matplotlib", "sklearn", "yaml"}
    assert not heavy & set(re.findall(r"'(\w+)'", loaded.splitlines()[-1]))
    assert min(seconds) < 1.0


def test_shells_complete_commands_and_options(tmp_path):
    def completed(words: str) -> list[str]:
        told = {"_HF_FREEZE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        code = "import sys; sys.argv = ['hf-freeze']; from hf_freeze import cli; cli.main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **told})
        return done.stdout.split()

    assert completed("hf-freeze pre") == ["predict"]
    assert completed("hf-freeze recipe s") == ["show", "schema"]
    assert "--recipe" in completed("hf-freeze train --re")


def test_train_replaces_an_earlier_run_if_told(here, hf_freeze, model):
    arguments = ["train", "--model", model, "--dataset", "films.csv", "--epochs", 1]
    assert hf_freeze(*arguments)[0] == 0
    Path("outputs/train/notes.txt").write_text("mine")
    assert hf_freeze(*arguments, "--adapter", 4, "--overwrite")[0] == 0
    names = {path.name for path in Path("outputs/train").iterdir()}
    assert "notes.txt" in names and "adapter_model.safetensors" in names
    assert "model.safetensors" not in names


def test_a_model_that_comes_back_changed_is_no_success(here, hf_freeze, model, monkeypatch):
    # The bug that this guards against does not exist: the base model stands in for what `load` would then return.
    monkeypatch.setattr(runs, "load", lambda folder: load_base(model, ("bad", "good")))
    with pytest.raises(RuntimeError, match="predicts otherwise than the one that was trained"):
        hf_freeze("train", "--model", model, "--dataset", "films.csv", "--epochs", 1)


@pytest.mark.slow
def test_train_on_real_weights_and_text(here, hf_freeze):
    code, out, _ = hf_freeze("train", "--limit", 20, "--epochs", 1, "--max-length", 8, "--freeze", "base")
    assert code == 0
    assert "20 training and 425 test texts in 5 classes" in out
    assert "Shares fell sharply" in out
    assert read_record(Path("outputs/train"))["base_model"] == EMBEDDED


# Mistakes: one line, exit code 2, before the first step, and nothing written


def refuses(hf_freeze, here: Path, monkeypatch, match: str, *arguments: object) -> None:
    # A step would be too late for a refusal.
    monkeypatch.setattr(Trainer, "training_step", lambda *_, **__: pytest.fail("a step was taken"))
    before = everything(here)
    code, _, err = hf_freeze("train", *arguments)
    assert code == 2
    assert re.fullmatch(rf"Error: .*{match}.*\n", err), err
    assert everything(here) == before


STAGES = {
    "late": '{start: 0, unfreeze: head}, {start: "500 steps", unfreeze: layers}',
    "disorder": "{start: 0, unfreeze: head}, {start: 2, unfreeze: layers}, {start: 1, unfreeze: embeddings}",
    "mixed": '{start: 0, unfreeze: head}, {start: 2, unfreeze: layers}, {start: "1 step", unfreeze: embeddings}',
    "never": "{start: 0, freeze: head}",
    "nowhere": '{start: 0, unfreeze: "layers[9]"}',
    "word": "{start: 0, unfreez: head}",
    "gap": "{start: 1, unfreeze: head}",
}


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("No such model folder: 'bert'", ["--model", "./bert"]),
        (r"'none/such' can't be loaded", ["--model", "none/such"]),
        ("No such file or folder: 'film.csv'. Did you mean 'films.csv'", ["--dataset", "film.csv"]),
        ("has no column 'body'.* one of: 'text', 'label'", ["--text-column", "body"]),
        ("has no column 'lable'. Did you mean 'label'", ["--label-column", "lable"]),
        ("'heads' names no segment.* Did you mean 'head'", ["--freeze", "heads"]),
        (r"layers\[9\]", ["--freeze", "layers[9]"]),
        ("'all' leaves nothing to train. Leave the head out", ["--freeze", "all"]),
        ("bottleneck_size=0: an adapter needs a size of at least 1", ["--adapter", "0"]),
        ("A preset stages what trains.*stages in a YAML file", ["--adapter", "4", "--unfreeze", "gradual"]),
        ("names 'classifier.*of the head.*freeze 'base'", ["--adapter", "4", "--freeze", "all"]),
        ("'gradul' is no preset and no file. Did you mean 'gradual'", ["--unfreeze", "gradul"]),
        ("gradual has 5 stages for this model, and the run 2 steps", ["--unfreeze", "gradual", "--epochs", "1"]),
        ("lr is 0.0: write a positive number", ["--lr", "0"]),
        ("epochs is -1.0: write a positive number", ["--epochs", "-1"]),
        ("batch_size is 0: write a whole number from 1", ["--batch-size", "0"]),
        ("max_length of 2 has no room for text: use 3 or more", ["--max-length", "2"]),
        ("A limit of 1 leaves out some of 2 classes", ["--limit", "1"]),
        ("500 steps.*the run ends at step 6. Start it earlier or train longer", ["--unfreeze", "late"]),
        ("Stages out of order", ["--unfreeze", "disorder"]),
        ("Stages out of order", ["--unfreeze", "mixed"]),
        ("Nothing trains at step 0.*Start with", ["--unfreeze", "never"]),
        (r"layers\[9\]", ["--unfreeze", "nowhere"]),
        ("Unknown field 'unfreez'. Did you mean 'unfreeze'", ["--unfreeze", "word"]),
        ("Nothing trains at step 0: the first stage, at 1", ["--unfreeze", "gap"]),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(match, options, here, hf_freeze, model, monkeypatch):
    for name, stages in STAGES.items():
        Path(name).write_text(f"stages: [{stages}]")
    defaults = ["--model", model, "--dataset", "films.csv", "--epochs", "3"]
    refuses(hf_freeze, here, monkeypatch, match, *defaults, *options)


def test_refuses_an_empty_class(here, hf_freeze, model, monkeypatch):
    Path("data/good").mkdir(parents=True)
    Path("data/good/1.txt").write_text("a")
    Path("data/bad").mkdir()
    refuses(hf_freeze, here, monkeypatch, "bad' holds no text: add", "--model", model, "--dataset", "data")


def test_refuses_labels_that_differ_between_splits(here, hf_freeze, model, monkeypatch):
    Path("data").mkdir()
    write_csv("data/train.csv", TEXTS)
    write_csv("data/test.csv", [("a", "good"), ("b", "ugly")])
    match = "test and train differ in the label.s. 'bad', 'ugly'"
    refuses(hf_freeze, here, monkeypatch, match, "--model", model, "--dataset", "data")


def test_refuses_an_output_folder_that_cant_be_used(here, hf_freeze, model, monkeypatch):
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    for output, match in [
        ("full", "'full' is not empty: name another one, or pass --overwrite"),
        ("films.csv", "'films.csv' is a file: name a folder"),
        ("films.csv/run", "can't be made in"),
    ]:
        refuses(hf_freeze, here, monkeypatch, match, "--model", model, "--dataset", "films.csv", "--output", output)


def test_refuses_adapters_as_a_base_model(here, hf_freeze, model, monkeypatch):
    arguments = ["--dataset", "films.csv", "--epochs", 1, "--adapter", 4]
    assert hf_freeze("train", "--model", model, *arguments)[0] == 0
    refuses(
        hf_freeze, here, monkeypatch, "adapters alone: name the model that they belong to",
        "--model", "outputs/train", "--dataset", "films.csv", "--output", "second",
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [["train", "--epochs", "many"], ["train", "--no-such-option"], ["trian"]])
def test_usage_errors_have_exit_code_2(arguments, hf_freeze):
    assert hf_freeze(*arguments)[0] == 2


def test_the_installed_command_has_exit_codes_too(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "hf_freeze.cli", "train", "--adapter", "0"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("Error: bottleneck_size=0: .*\n", done.stderr)


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_leaves_nothing(here, model):
    arguments = ["train", "--model", model, "--dataset", "films.csv"]
    # Ctrl-C is a signal, which only a process of its own can be sent. Tests that were started in the background ignore
    # it, and what they start would too.
    child = subprocess.Popen(
        [sys.executable, "-m", "hf_freeze.cli", *arguments, "--epochs", "100000", "--unfreeze", "gradual"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while "stage 1" not in child.stdout.readline():
        assert child.poll() is None, child.stderr.read()
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in err
    assert everything(here) == [here / "films.csv"]


# inspect


def test_inspect_shows_the_class_that_the_config_names(hf_freeze, model):
    code, out, _ = hf_freeze("inspect", model)
    assert code == 0
    assert "BertForSequenceClassification" in out
    assert re.search(r"head .*34 ", out)  # 16 x 2 weights and 2 biases
    assert "BertModel" in hf_freeze("inspect", EMBEDDED)[1]


def test_inspect_lists_what_a_selector_names(hf_freeze, model):
    assert hf_freeze("inspect", model, "--select", "head")[1].split() == ["classifier.weight", "classifier.bias"]


def test_inspect_gives_json(hf_freeze, model):
    found = json.loads(hf_freeze("inspect", model, "--json")[1])
    assert found["class"] == "BertForSequenceClassification"
    assert found["segments"][-1] == {"segment": "head", "class": "Dropout + Linear", "parameters": 34}
    assert sum(own["parameters"] for own in found["segments"]) == found["parameters"]
    named = json.loads(hf_freeze("inspect", model, "--select", "head", "--json")[1])
    assert named == ["classifier.weight", "classifier.bias"]


def test_inspect_refuses_in_one_line(here, hf_freeze, model):
    for arguments in (["./none"], ["none/such"], [model, "--select", "heads"]):
        code, out, err = hf_freeze("inspect", *arguments)
        assert (code, out) == (2, "")
        assert re.fullmatch("Error: .*\n", err)


# demo


def outcome(name: str, accuracy: float, trainable: int = 100) -> Outcome:
    return Outcome(Recipe(name=name), trainable, 100, 1.0, accuracy, accuracy, np.empty(0), None, None)


def test_a_run_may_be_called_what_it_will():
    table = tables.outcome_table([outcome("[/b] layers[k]", 0.5)])
    assert "[/b] layers[k]" in as_text(table)


@pytest.mark.parametrize(
    ("staged", "adapters", "expected"),
    [
        (0.960, 0.941, ["+0.0 points", "within the half", "98.0%", "at least"]),
        (0.955, 0.940, ["-0.5 points", "within the half", "97.9%", "below"]),
        (0.954, 0.970, ["-0.6 points", "not within the half", "101.0%", "at least"]),
    ],
)
def test_the_verdict_says_what_was_kept_and_what_missed(staged, adapters, expected):
    found = demo_methods.verdict(
        [
            outcome(demo_methods.ADAPTERS, adapters, trainable=2),
            outcome(demo_methods.STAGED, staged),
            outcome(demo_methods.FULL, 0.960),
        ]
    )
    assert [phrase for phrase in expected if phrase in found] == expected
    assert ("not within" in found) == ("not within the half" in expected)


def test_the_demos_adapters_are_at_most_three_percent():
    model = demo_methods.method(demo_methods.ADAPTERS).apply(load_base(EMBEDDED, tuple("abcde"))[1])
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert 0 < trainable <= 0.03 * model.num_parameters()


def test_demo_refuses_a_folder_with_files_that_are_not_its_own(here, hf_freeze):
    Path("outputs/demo").mkdir(parents=True)
    Path("outputs/demo/notes.txt").write_text("mine")
    code, _, err = hf_freeze("demo")
    assert code == 2
    assert "'outputs/demo' is not empty" in err


@pytest.mark.slow
def test_demo_compares_four_methods_and_runs_twice(here, hf_freeze, monkeypatch):
    # The demo itself, on fewer and shorter texts.
    monkeypatch.setattr(demo_methods, "LIMIT", 40)
    monkeypatch.setattr(demo_methods, "MAX_LENGTH", 8)
    monkeypatch.setattr(demo_methods, "SETTINGS", {n: (lr, 2.0) for n, (lr, _) in demo_methods.SETTINGS.items()})
    for _ in range(2):
        code, out, err = hf_freeze("demo", "--seed", 3)
        assert code == 0, err
    assert "40 train, 425 validation, 425 test texts, stratified, seed 3" in out
    rows = [line for line in out.partition("test split, seed")[2].splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == list(demo_methods.SETTINGS)
    assert max(map(len, rows)) <= 80
    assert "points from full fine-tuning" in out and "bit for bit" in out
    code, alone, told = hf_freeze("demo", "--seed", 3, "--json")
    found = json.loads(alone)
    shown = {row.split("│")[1].strip(): row.split("│")[5].strip() for row in rows}
    assert code == 0 and {own["name"]: f"{own['accuracy']:.3f}" for own in found["methods"]} == shown
    assert (found["seed"], found["output"]) == (3, "outputs/demo") and "bit for bit" in told
