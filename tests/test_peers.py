"""Side by side: what the benchmark makes of its results. The runs themselves are not made here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import peers  # noqa: E402
import peers_worker  # noqa: E402
from pages import BENCHMARKS, markers, with_section  # noqa: E402
from peers_page import Run, best_rate, draw, grid_table, reached, section, table, target_of  # noqa: E402


def run(seconds=(2.0, 1.0), accuracies=(0.5, 0.9), trainable=7, mib=10.0):
    return Run(tuple(seconds), tuple(accuracies), trainable, mib)


def test_the_rate_is_the_best_on_validation_texts_and_the_lowest_of_equals():
    assert best_rate({1e-4: 0.7, 2e-4: 0.9, 4e-4: 0.8}) == 2e-4
    assert best_rate({4e-4: 0.9, 2e-4: 0.9, 1e-4: 0.7}) == 2e-4


def test_the_target_is_half_a_point_below_the_mean_at_the_end():
    assert target_of([run(accuracies=(0.99, 0.90)), run(accuracies=(0.1, 0.94))]) == pytest.approx(0.915)


def test_the_target_is_reached_at_the_end_of_the_first_epoch_that_has_it():
    assert run((2.0, 1.0, 1.0), (0.5, 0.9, 0.8)).seconds_to(0.9) == 3.0
    assert run((2.0, 1.0, 1.0), (0.5, 0.8, 0.8)).seconds_to(0.9) is None


def test_a_target_that_half_of_the_seeds_miss_is_not_reached():
    fast, slow, never = run((1.0, 1.0), (0.9, 0.9)), run((1.0, 1.0), (0.1, 0.9)), run((1.0, 1.0), (0.1, 0.1))
    assert reached([fast, slow, slow], 0.9) == "2.0 (3 of 3)"
    assert reached([fast, slow, never], 0.9) == "1.5 (2 of 3)"
    assert reached([fast, never], 0.9) == "not reached (1 of 2)"
    assert reached([never, never], 0.9) == "not reached (0 of 2)"


def test_epochs_that_were_timed_and_not_evaluated_are_refused():
    with pytest.raises(ValueError, match="2 epochs were timed and 1 evaluated"):
        run((1.0, 1.0), (0.9,))
    with pytest.raises(ValueError, match="0 epochs"):
        run((), ())


def test_the_table_has_medians_of_time_and_the_mean_and_spread_of_accuracy():
    runs = {"a": [run((9.0, 1.0), (0.5, 0.8), 1234, 10.4), run((3.0, 1.0), (0.5, 0.9), 1234, 12.0)]}
    row = table(runs, {"a": 2e-4}, target=0.85).splitlines()[-1]
    assert row == "| a | 0.0002 | 2 | 1,234 | 2.0 | 7.0 | not reached (1 of 2) | 12 | 0.850 (0.800 to 0.900) |"


def test_the_grid_says_when_the_best_rate_lies_at_its_edge():
    inside, edge, alone = grid_table(
        {"a": {1.0: 0.1, 2.0: 0.2, 4.0: 0.1}, "b": {1.0: 0.1, 2.0: 0.1, 4.0: 0.3}, "c": {1.0: 0.1}}
    ).splitlines()[2:]
    assert inside == "| a | 1: 0.100, 2: 0.200, 4: 0.100 | 2 |"
    assert edge.endswith("| 4 (at the edge) |")
    assert alone.endswith("| 1 |")


def test_a_section_takes_the_place_of_the_one_before():
    begin, end = markers("peers")
    page = f"head\n{begin}\nold\n{end}\nfoot\n"
    assert with_section(with_section(page, "peers", "one"), "peers", "two") == f"head\n{begin}\n\ntwo\n\n{end}\nfoot\n"
    with pytest.raises(ValueError, match="The page has no"):
        with_section(f"{end} {begin}", "peers", "text")


def test_the_page_has_a_place_for_the_section_and_names_each_contender():
    page = BENCHMARKS.read_text(encoding="utf-8")
    assert "new text" in with_section(page, "peers", "new text")
    for name, contender in peers.CONTENDERS.items():
        assert f"| {name} |" in page
        assert any(line.endswith(f"| {contender.epochs} |") for line in page.splitlines() if f"| {name} |" in line)


def test_each_contender_has_a_method_and_a_rate():
    assert {contender.method for contender in peers.CONTENDERS.values()} == set(peers_worker.METHODS)
    trials = {name: dict.fromkeys(c.rates, 0.5) for name, c in peers.CONTENDERS.items() if c.rates}
    rates = peers.best_rates(trials)
    assert set(rates) == set(peers.CONTENDERS)
    assert rates["hf_freeze, staged + cache"] == rates["hf_freeze, staged"]


def test_the_plot_and_the_section_show_every_contender(tmp_path):
    runs = {name: [run((2.0, 1.0), (0.5, 0.9)), run((2.0, 3.0), (0.4, 0.8))] for name in peers.CONTENDERS}
    draw(runs, tmp_path / "pictures" / "peers.png", "title")
    assert (tmp_path / "pictures" / "peers.png").read_bytes().startswith(b"\x89PNG")
    rates = dict.fromkeys(runs, 1e-3)
    text = section(runs, {"full fine-tuning": {1e-3: 0.5}}, rates, "Note.", "p.png")
    assert all(f"| {name} |" in text for name in runs)
    assert "The target is 0.8450. Note." in text and "](p.png)" in text


def test_the_clock_leaves_evaluation_out_and_gives_the_model_back_in_train_mode(monkeypatch):
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=1, hidden_size=12, vocab_size=9, num_labels=3))
    rows = [{"input_ids": torch.tensor([1, 2]), "labels": torch.tensor(label)} for label in (0, 1, 2)]
    moments = iter([0.0, 2.0, 50.0, 53.0, 90.0])  # start, end of an epoch, evaluated, end, evaluated
    # A clock that is wound by hand: real time can't tell whether evaluation was left out.
    monkeypatch.setattr(peers_worker, "perf_counter", lambda: next(moments))
    clock = peers_worker.Clock(rows)
    model.train()
    clock.start()
    clock.epoch_ends(model)
    clock.epoch_ends(model)
    assert clock.seconds == [2.0, 3.0]
    assert clock.accuracies == pytest.approx([1 / 3, 1 / 3])  # three equal rows with three labels
    assert model.training
    assert clock.trainable == sum(parameter.numel() for parameter in model.parameters())
