"""Which checkpoint a run that was killed goes on from: the newest that was written to its end."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from training import make_trainer
from transformers.trainer_utils import get_last_checkpoint

from hf_freeze import last_whole_checkpoint


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The output of a Trainer's run of three steps, with a checkpoint at each."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, steps=3, save_strategy="steps", save_steps=1).train()
    return folder


@pytest.fixture
def output(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "run")


def found(output: Path) -> str | None:
    checkpoint = last_whole_checkpoint(output)
    return checkpoint and Path(checkpoint).name


def cut(file: Path) -> None:
    """Leaves all but the last byte, or two bytes: what is behind JSON's last bracket is nothing."""
    file.write_bytes(file.read_bytes().rstrip()[:-1])


FILES = [
    "config.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json",
    "training_args.bin",
]  # fmt: skip


def test_these_are_the_files_of_a_checkpoint(written):
    assert sorted(file.name for file in (written / "checkpoint-3").iterdir()) == FILES


def test_of_whole_checkpoints_it_is_the_trainers_own_choice(output):
    assert last_whole_checkpoint(output) == get_last_checkpoint(output) == str(output / "checkpoint-3")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", ["nothing", "all but the end"])
def test_a_checkpoint_of_which_a_file_was_not_written_to_its_end_is_passed_over(output, name, left):
    file = output / "checkpoint-3" / name
    cut(file) if left == "all but the end" else file.write_bytes(b"")
    assert found(output) == "checkpoint-2"


def test_without_the_file_that_comes_last_it_is_passed_over(output):
    (output / "checkpoint-3" / "trainer_state.json").unlink()
    (output / "checkpoint-2" / "trainer_state.json").unlink()
    assert found(output) == "checkpoint-1"


def test_the_trainer_itself_would_fail_there(output):
    """What the function is for."""
    (output / "checkpoint-3" / "trainer_state.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"trainer_state\.json"):
        make_trainer(output, steps=3).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("processes", "name"), [(2, "checkpoint-3"), (3, "checkpoint-2")])
def test_of_several_processes_each_has_to_have_written_its_random_state(output, monkeypatch, processes, name):
    for checkpoint, ranks in (("checkpoint-2", 3), ("checkpoint-3", 2)):
        state = output / checkpoint / "rng_state.pth"
        for rank in range(ranks):
            shutil.copy(state, state.with_name(f"rng_state_{rank}.pth"))
        state.unlink()
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert found(output) == name


def test_a_checkpoint_of_one_process_serves_several(output, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert found(output) == "checkpoint-3"


def test_steps_are_compared_as_numbers_and_other_names_are_no_checkpoints(output):
    (output / "checkpoint-3").rename(output / "checkpoint-10")
    shutil.copytree(output / "checkpoint-2", output / "checkpoint-99-old")
    assert found(output) == "checkpoint-10"


def test_before_the_first_checkpoint_there_is_none(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / "not yet made") is None
