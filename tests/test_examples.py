"""The examples: each is short, explains itself, runs, and shows what it says."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from example_scripts import EXAMPLES, SCRIPTS, load

SMALL = ["--limit", "40", "--epochs", "1", "--max-length", "16"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short_and_has_help(path, capsys):
    assert len(path.read_text().splitlines()) < 120
    with pytest.raises(SystemExit) as stopped:
        load(path.stem).main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert load(path.stem).__doc__.splitlines()[0] in shown


@pytest.mark.slow
def test_trainer_staged_trains_its_stages_and_saves_the_model(tmp_path, capsys):
    load("trainer_staged").main([*SMALL, "--output", str(tmp_path)])

    shown = capsys.readouterr().out
    trainable = [int(size.replace(",", "")) for size in re.findall(r"stage \d of 3: .* ([\d,]+) parameters", shown)]
    assert len(trainable) == 3 and trainable == sorted(set(trainable))
    assert re.search(r"test accuracy \d\.\d{3}", shown)
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.slow
def test_trainer_staged_takes_data_and_a_schedule_of_ones_own(tmp_path, capsys):
    rows = [f"{word} number {number},{label}" for number in range(20) for word, label in (("good", 1), ("bad", 0))]
    (tmp_path / "reviews.csv").write_text("\n".join(["review,stars", *rows]))
    (tmp_path / "stages.yaml").write_text("stages:\n- {start: 0, unfreeze: head}\n- {start: 50%, unfreeze: pooler}\n")
    data = ["--dataset", str(tmp_path / "reviews.csv"), "--text-column", "review", "--label-column", "stars"]

    load("trainer_staged").main(
        [*SMALL, *data, "--schedule", str(tmp_path / "stages.yaml"), "--output", str(tmp_path / "out")]
    )

    shown = capsys.readouterr().out
    assert "stage 2 of 2: + pooler" in shown
    assert re.search(r"test accuracy \d\.\d{3}", shown)


@pytest.mark.slow
def test_accelerate_loop_trains_its_stages_on_two_processes(tmp_path):
    script = EXAMPLES / "accelerate_loop.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*launch, *SMALL, "--batch-size", "4", "--output", str(tmp_path)], capture_output=True, text=True, timeout=300
    )

    assert done.returncode == 0, done.stderr
    trainable = [int(count) for count in re.findall(r"step \d: (\d+) tensors train", done.stdout)]
    assert len(trainable) == 2 and trainable == sorted(trainable)  # 40 texts, 8 a step: at steps 2 and 3 of 5
    assert len(re.findall(r"test accuracy \d\.\d{3}", done.stdout)) == 1
    assert (tmp_path / "model.safetensors").is_file()
    assert sorted(path.name for path in (tmp_path / "state").glob("random_states_*")) == [
        "random_states_0.pkl",
        "random_states_1.pkl",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("api", ["peft", "transformers"])
def test_adapters_load_back_and_switch_off_exactly(api, tmp_path, capsys):
    load("adapters_peft").main([*SMALL, "--api", api, "--output", str(tmp_path)])

    shown = capsys.readouterr().out
    assert "a new adapter is the identity: True" in shown
    differences = [float(number) for number in re.findall(r"at most (\S+)", shown)]
    assert len(differences) == 2 and max(differences) < 1e-6
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 1_000_000
