"""What a user sees of a staged run: rates in the logs, the stage in the progress bar, a table at the end."""

import pytest
import torch
from tqdm.auto import tqdm
from training import Watch, make_trainer, tiny_bert
from transformers import TrainerCallback

from hf_freeze import Stage, StagedUnfreezing, layer_map, on_plateau
from hf_freeze.announcing import closing_table, segment_rates, show_in_bar


def staged() -> StagedUnfreezing:
    return StagedUnfreezing([Stage(0, "head"), Stage("2 steps", "layers[-1]"), Stage("4 steps", "layers[0]")])


def test_the_logs_hold_the_rate_of_each_segment_that_trains_as_the_optimizer_has_it(tmp_path):
    watch = Watch()
    callback = StagedUnfreezing([Stage(0, "head"), Stage("3 steps", "layers", lr=0.002, layer_decay=0.5)])
    trainer = make_trainer(tmp_path, callback, watch, lr_scheduler_type="constant")

    trainer.train()

    layers = layer_map(trainer.model)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, rates in zip(logged, watch.rates, strict=True):
        own = {layers.owners[name].name: rate for name, rate in rates.items()}
        assert {key[10:]: rate for key, rate in entry.items() if key.startswith("freeze/lr/")} == own
    assert {key for entry in logged[:3] for key in entry if "/lr/" in key} == {"freeze/lr/head"}


def test_an_evaluation_is_logged_without_rates(tmp_path):
    trainer = make_trainer(tmp_path, staged(), eval_strategy="steps", eval_steps=2)
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluations
    assert all("freeze/stage" in entry and not any("/lr/" in key for key in entry) for entry in evaluations)


def test_a_segment_with_several_rates_is_told_by_the_highest():
    model = tiny_bert()
    first, *others = model.bert.encoder.layer[0].parameters()
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": others, "lr": 0.1}])
    assert segment_rates(model, optimizer) == {"layers[0]": 0.5}


@pytest.fixture
def bar():
    with tqdm(total=6, disable=False) as own:
        yield own


def test_the_stage_stands_behind_the_progress_bar(bar):
    with tqdm(total=3, disable=False) as other:
        show_in_bar("stage 2 of 3", total=6)
        assert (bar.postfix, other.postfix) == ("stage 2 of 3", None)


def test_a_run_shows_each_stage_in_the_trainers_bar(tmp_path, capsys):
    make_trainer(tmp_path, staged(), disable_tqdm=False).train()
    shown = capsys.readouterr().err
    assert all(f"stage {number} of 3]" in shown for number in (1, 2, 3))


def test_a_run_ends_with_the_table_of_what_trained_when(tmp_path, capsys):
    callback = staged()
    trainer = make_trainer(tmp_path, callback)
    trainer.train()
    assert closing_table(callback.engine.planned, trainer.model, steps=6) in capsys.readouterr().out


def test_the_table_of_a_run_that_was_stopped_early_leaves_out_what_was_not_reached(tmp_path, capsys):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    make_trainer(tmp_path, staged(), Stop()).train()
    assert "2 stages, 3 steps" in capsys.readouterr().out


def test_the_table_tells_a_plateau_that_was_met_by_its_step(tmp_path, capsys):
    stages = [Stage(0, "head"), Stage(on_plateau("eval_loss", patience=1, min_delta=9.0), "layers[-1]")]
    make_trainer(tmp_path, StagedUnfreezing(stages), eval_strategy="steps", eval_steps=2).train()
    table = capsys.readouterr().out
    assert "2 stages, 6 steps" in table
    assert "4 to 5" in table
    assert "if no plateau comes" not in table
