"""The search: what is drawn becomes the recipe that it says, the front is the front, budgets hold, nothing is lost."""

from __future__ import annotations

import gc
import json
import random
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import FixedTrial, TrialState
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, default_data_collator

from hf_freeze import BottleneckConfig, Recipe, SearchBudget, SearchPoint, SearchSpace, cli, search
from hf_freeze.data import embedded_model_path, load_corpus
from hf_freeze.errors import DataError, RecipeError, SearchError
from hf_freeze.recipes import Cache, TextSource
from hf_freeze.runs import fine_tune
from hf_freeze.searching import judging, searcher
from hf_freeze.searching.files import write
from hf_freeze.searching.front import pareto
from hf_freeze.searching.judging import Behind, Judge, Refused
from hf_freeze.searching.pace import Pace, measure
from hf_freeze.searching.space import frozen
from hf_freeze.searching.study import MOST_TRIES, PACE, REFUSED, STOPPED, WORKER, Desk, read_result

gc.freeze()  # accelerate 1.15 collects garbage at the start of each train(): see tests/training.py
LAYERS, WIDTH = 4, 16
TEXTS = [(f"the film was {word} {number}", word) for number in range(15) for word in ("good", "bad")]
SMALL = SearchSpace(bottleneck=(0, 2, 4), epochs=(1, 2))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A BERT of four layers with random weights, and texts."""
    folder = tmp_path_factory.mktemp("home")
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2,
        intermediate_size=32, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "films.csv").write_text("".join(f"{text},{label}\n" for text, label in [("text", "label"), *TEXTS]))
    return folder


@pytest.fixture(scope="module")
def base(home) -> Recipe:
    """`fast` on them."""
    return replace(
        Recipe.from_preset("fast"), model=str(home / "model"), dataset=TextSource(str(home / "films.csv")),
        batch_size=4, max_length=16, cache=Cache(), epochs=2,
    )  # fmt: skip


@pytest.fixture
def judge(base, tmp_path) -> Judge:
    return Judge(base, None, tmp_path / "rows")


def trials_in(folder: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="search", storage=f"sqlite:///{folder / 'study.db'}").trials


# The space


class Dice:
    """Draws at random, and remembers what it drew."""

    def __init__(self, seed: int) -> None:
        self.dice, self.drawn = random.Random(seed), {}

    def suggest_int(self, name, low, high):
        return self.drawn.setdefault(name, self.dice.randint(low, high))

    def suggest_float(self, name, low, high, step=None, log=False):
        return self.drawn.setdefault(name, self.dice.uniform(low, high))

    def suggest_categorical(self, name, choices):
        return self.drawn.setdefault(name, self.dice.choice(choices))


def adapter_widths(model) -> dict[int, set[int]]:
    """The bottleneck widths in each layer."""
    found: dict[int, set[int]] = {}
    for name, parameter in model.named_parameters():
        if "bottleneck_down" in name and name.endswith("weight"):
            found.setdefault(int(name.split(".layer.")[1].split(".")[0]), set()).add(parameter.shape[0])
    return found


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_what_is_drawn_is_what_the_model_gets(seed):
    space, dice = SearchSpace(bottleneck=(0, 1, 3, 5)), Dice(seed)
    recipe = space.draw(dice, Recipe(cache=Cache()), LAYERS, WIDTH)
    config = BertConfig(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, vocab_size=9)
    model = recipe.apply(BertForSequenceClassification(config))
    sizes = {index: dice.drawn.get(f"bottleneck.{index}", 0) for index in range(LAYERS)}
    assert adapter_widths(model) == {index: {size} for index, size in sizes.items() if size}
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= {
        name.replace("modules_to_save.default.", "") for name in trains
    }
    depth = dice.drawn["frozen"]
    live = any("encoder.layer" in name and "bottleneck" not in name for name in trains)
    assert live == (depth < LAYERS and dice.drawn["adapter"] == "none")
    assert recipe.epochs == dice.drawn["epochs"]
    assert recipe.lr == pytest.approx(dice.drawn["lr"], rel=5e-3)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe.from_preset("fast"),
        Recipe(unfreeze="gradual", layer_decay=0.9, lr=4e-4, epochs=4),
        Recipe(freeze="embeddings, layers", lr=2e-3, epochs=3, cache=Cache()),
        Recipe(adapter=BottleneckConfig(bottleneck_size=32, placement="houlsby"), lr=5e-4, epochs=2),
    ],
    ids=["fast", "gradual", "head", "adapters"],
)
def test_the_search_begins_with_the_recipe(recipe, judge):
    space = SearchSpace()
    draws = space.start(recipe, judge.depth(recipe), LAYERS)
    drawn = space.draw(FixedTrial(draws), recipe, LAYERS, WIDTH)
    names = {"freeze": frozen(judge.depth(recipe))}
    if recipe.adapter:
        names["adapter"] = replace(recipe.adapter, layers=f"layers[0:{LAYERS}]")
    assert drawn == replace(recipe, **names)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe.from_preset("bitfit"),
        Recipe.from_preset("surgical"),
        Recipe(lr=1e-8),
        Recipe(epochs=9),
        Recipe(epochs=1.25),
        Recipe(freeze="base"),
        Recipe(unfreeze="lisa"),
        Recipe(layer_decay=0.1),
        Recipe(adapter=BottleneckConfig(reduction_factor=2)),
        Recipe(adapter=BottleneckConfig(bottleneck_size=8, layers="layers[2:]")),
        Recipe(adapter=BottleneckConfig(bottleneck_size=8), freeze="embeddings, layers"),
    ],
)
def test_a_recipe_outside_of_the_space_is_not_tried(recipe, judge):
    assert SearchSpace().start(recipe, judge.depth(recipe), LAYERS) is None


def test_the_fixed_depths_are_those_of_the_model():
    for told, drawn in [(None, (0, LAYERS)), ((1, 9), (1, LAYERS)), ((2, 2), (2, 2))]:
        assert SearchSpace(frozen=told)._depths(LAYERS) == drawn
    with pytest.raises(SearchError, match=r"frozen is \[7, 9\] in the space, and the model has 4 layers"):
        SearchSpace(frozen=(7, 9)).draw(Dice(0), Recipe(), LAYERS, WIDTH)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("{frosen: [1, 2]}", "Unknown field 'frosen' in the space. Did you mean 'frozen'"),
        ("{frozen: 3}", r"frozen is 3 in the space: write a list, such as \[0, 4\]"),
        ("{frozen: [3, 1]}", r"frozen is \[3, 1\] in the space: write the least and the greatest value"),
        ("{frozen: [-1, 2]}", "write the least and the greatest"),
        ("{lr: [0, 1e-3]}", "lr is"),
        ("{lr: [1e-4, 1e-3, 1e-2]}", "lr is"),
        ("{epochs: [0.5, 2]}", "epochs is"),
        ("{adapter: [pfeifer]}", "adapter has 'pfeifer' in the space. Did you mean 'pfeiffer'"),
        ("{unfreeze: []}", "unfreeze is"),
        ("{unfreeze: [gradual, slowly]}", "unfreeze has 'slowly' in the space. There are: none, "),
        ("{bottleneck: [8, -1]}", "bottleneck has -1 in the space: write whole numbers from 0"),
        ("{bottleneck: [8, 2.5]}", "bottleneck has 2.5"),
        ("[1, 2]", "No space can be read from"),
    ],
)
def test_a_space_that_can_not_be_is_refused(yaml, message):
    with pytest.raises(SearchError, match=message):
        SearchSpace.from_yaml(yaml)


def test_a_space_is_read_as_it_was_written():
    space = SearchSpace(frozen=(1, 2), adapter=("none",), lr=(1e-4, 1e-3))
    assert SearchSpace.from_yaml(json.dumps(space.to_dict())) == space


@pytest.mark.parametrize("told", [{"trials": 0}, {"trials": 2.5}, {"seconds": 0}, {"parameters": -1}], ids=str)
def test_a_budget_that_is_none_is_refused(told):
    with pytest.raises(SearchError, match=rf"{next(iter(told))} is .*: write a"):
        SearchBudget(**told)


# The front

few = st.integers(0, 4)


@given(st.lists(st.tuples(few, few, few), max_size=30))
def test_the_front_is_what_no_other_beats(costs):
    points = [SearchPoint(n, Recipe(), a / 4, t, float(s)) for n, (a, t, s) in enumerate(costs)]

    def beaten(one: SearchPoint) -> bool:
        return any(
            other.accuracy >= one.accuracy and other.trainable <= one.trainable and other.seconds <= one.seconds
            and (other.accuracy > one.accuracy or other.trainable < one.trainable or other.seconds < one.seconds)
            for other in points
        )  # fmt: skip

    front = pareto(points)
    assert {own.number for own in front} == {own.number for own in points if not beaten(own)}
    assert [own.seconds for own in front] == sorted(own.seconds for own in front)


# A trial


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"freeze": None, "unfreeze": None},
        {"freeze": "embeddings, layers", "unfreeze": None},
        {"freeze": None, "unfreeze": "lp_ft"},
        {"freeze": "embeddings, layers[:1]", "unfreeze": None, "adapter": BottleneckConfig(bottleneck_size=2)},
    ],
    ids=["fast", "full", "head", "lp_ft", "adapters"],
)
def test_the_parameters_that_are_foreseen_are_those_that_train(changes, base, judge):
    recipe = replace(base, **changes)
    point = judge.run(0, recipe, list)
    assert point.trainable == judge.trainable(recipe) == fine_tune(recipe, judge.corpus).trainable


def test_a_recipe_over_its_budget_is_not_run(base, tmp_path, monkeypatch):
    judge = Judge(base, 100, tmp_path)
    monkeypatch.setattr(judging, "fine_tune", None)
    with pytest.raises(Refused, match=r"^[\d,]+ parameters would train, and 100 may$"):
        judge.run(0, base, list)


@pytest.mark.parametrize(
    "changes",
    [{"adapter": BottleneckConfig(bottleneck_size=2, layers="layers[9:]")}, {"unfreeze": "gradual", "batch_size": 30}],
    ids=["a layer that is not there", "more stages than steps"],
)
def test_a_recipe_that_does_not_fit_is_not_run(changes, base, judge):
    recipe = replace(base, **{"unfreeze": None, "freeze": None, "epochs": 1, **changes})
    with pytest.raises(Refused):
        judge.run(0, recipe, list)


def test_accuracy_is_that_on_the_validation_texts_and_the_look_half_way_changes_nothing(base, judge, monkeypatch):
    outcomes = []
    monkeypatch.setattr(judging, "fine_tune", lambda *told: outcomes.append(fine_tune(*told)) or outcomes[-1])
    recipe = replace(base, cache=None, freeze=None, lr=1e-2)
    looked = []
    monkeypatch.setattr(judging, "is_behind", lambda *told: looked.append(told))
    point = judge.run(0, recipe, lambda: [SearchPoint(1, recipe, 0.5, 0, 0.0)])
    plain = fine_tune(recipe, judge.corpus)
    assert judge.corpus.test == judge.corpus.validation
    assert point.accuracy == plain.accuracy
    assert torch.equal(torch.tensor(outcomes[0].logits), torch.tensor(plain.logits))
    [(half_way, rival)] = looked
    assert rival == 0.5 and half_way in {number / 6 for number in range(7)}


@pytest.mark.parametrize(
    ("accuracy", "trainable", "seconds", "ends"),
    [(1.0, 0, 0.0, True), (1.0, 10**9, 0.0, False), (1.0, 0, 1e9, False), (0.1, 0, 0.0, False)],
    ids=["better, smaller, faster", "larger", "slower", "worse"],
)
def test_a_run_ends_half_way_behind_one_that_is_better_smaller_and_faster(
    accuracy, trainable, seconds, ends, base, judge
):
    rival = SearchPoint(7, base, accuracy, trainable, seconds)
    poor = replace(base, lr=1e-9)  # half of the texts are good
    if ends:
        with pytest.raises(Behind, match=r"half-way, after .* s, behind trial 7$"):
            judge.run(8, poor, lambda: [rival])
    else:
        assert judge.run(8, poor, lambda: [rival]).number == 8


def test_after_a_run_that_was_ended_the_cache_is_free_for_the_next(base, judge):
    with pytest.raises(Behind):
        judge.run(0, replace(base, lr=1e-9), lambda: [SearchPoint(1, base, 1.0, 0, 0.0)])
    judge.pace = Pace(LAYERS, 100.0, 100.0)
    assert judge.run(1, base, list).seconds > 100  # rows of the first one are found


def test_rows_that_an_earlier_trial_has_cached_count_as_if_they_were_computed(base, judge):
    judge.pace = Pace(LAYERS, 100.0, 100.0)
    recipe = replace(base, unfreeze=None)
    first, second = (judge.run(number, recipe, list) for number in range(2))
    assert first.seconds < 100
    assert second.seconds == pytest.approx(100 * len(judge.corpus.train.texts), abs=99)
    assert second.accuracy == first.accuracy


def test_the_pace_is_measured(base, judge):
    pace = judge.measure()
    assert pace.layers == LAYERS
    assert 0 <= pace.shallow <= pace.deep < 1
    assert Judge(replace(base, cache=None), None, judge.folder).measure() == Pace(LAYERS, 0.0, 0.0)


# The study


def asked(folder: Path, trials: int | None = 5, **others) -> Desk:
    return Desk(folder, {"recipe": "a", "space": {}}, SearchBudget(trials), **others)


def draw(trial: optuna.Trial) -> float:
    return trial.suggest_float("lr", 0.0, 1.0)


def test_what_a_worker_was_at_that_is_gone_is_tried_by_another(tmp_path):
    with asked(tmp_path) as lost:
        value = draw(lost.take())
    with asked(tmp_path) as other:
        again = other.take()
        assert draw(again) == value
    assert [own.state for own in trials_in(tmp_path)] == [TrialState.FAIL, TrialState.RUNNING]


def test_what_was_in_line_and_lost_before_anything_was_drawn_is_not_lost(tmp_path):
    with asked(tmp_path) as lost:
        lost.begin(lambda: {"lr": 0.25}, lambda: Pace(1, 0.0, 0.0))
        lost.take()
    with asked(tmp_path) as other:
        assert draw(other.take()) == 0.25


def test_what_a_worker_is_at_that_lives_is_left_to_it(tmp_path):
    with asked(tmp_path) as one, asked(tmp_path) as other:
        first, second = draw(one.take()), draw(other.take())
        assert first != second
        assert one.cache != other.cache
        assert [own.state for own in trials_in(tmp_path)] == [TrialState.RUNNING] * 2


def test_a_worker_that_ended_inside_its_claim_leaves_a_trial_that_is_tried_again(tmp_path):
    with asked(tmp_path) as lost:
        draw(lost.study.ask())  # and never came to write its number down
    with asked(tmp_path) as other:
        draw(other.take())
    assert [own.state for own in trials_in(tmp_path)] == [TrialState.FAIL, TrialState.RUNNING]


def test_no_more_trials_begin_than_there_are(tmp_path):
    point = SearchPoint(0, Recipe(), 0.5, 1, 1.0)
    with asked(tmp_path, trials=2) as desk:
        for _ in range(2):
            desk.finish(desk.take(), point)
        assert desk.take() is None
    with asked(tmp_path, trials=3) as more:
        more.end(more.take(), REFUSED, "too large")  # which does not count
        more.finish(more.take(), point)
        assert more.take() is None


def test_a_worker_waits_for_the_last_trials_of_others_and_takes_over_what_they_lose(tmp_path, monkeypatch):
    with ExitStack() as stays:
        other = stays.enter_context(asked(tmp_path, trials=1))
        value = draw(other.take())
        monkeypatch.setattr("time.sleep", lambda _: stays.close())  # the other one is gone meanwhile
        turns = iter([True, True])  # and no third: it would wait for ever
        with asked(tmp_path, trials=1, alive=lambda: next(turns, False)) as desk:
            assert draw(desk.take()) == value


def test_no_trial_begins_once_the_seconds_are_spent(tmp_path):
    with Desk(tmp_path, {}, SearchBudget(seconds=1e-9)) as desk:
        trial = desk.take()
        desk.finish(trial, SearchPoint(0, Recipe(), 0.5, 1, 1.0))
        assert desk.take() is None


def test_a_worker_whose_parent_is_gone_takes_no_trial(tmp_path):
    with asked(tmp_path, alive=lambda: False) as desk:
        assert desk.take() is None


def test_the_draws_are_seeded(tmp_path):
    drawn = []
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        with asked(tmp_path / name, seed=seed) as desk:
            drawn.append([])
            for _ in range(2):
                drawn[-1].append(draw(trial := desk.take()))
                desk.finish(trial, SearchPoint(0, Recipe(), 0.5, 1, 1.0))
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({*drawn[0], *drawn[2]}) == 4


def test_draws_go_on_where_most_recipes_were_refused_or_stopped(tmp_path):
    space, point = SearchSpace(), SearchPoint(0, Recipe(), 0.5, 1, 1.0)
    with asked(tmp_path, trials=99) as desk:
        for number in range(16):  # Optuna's sampler looks at what came before from the eleventh on
            trial = desk.take()
            space.draw(trial, Recipe(), LAYERS, WIDTH)
            desk.finish(trial, point) if number == 3 else desk.end(trial, STOPPED if number % 2 else REFUSED, "why")
    assert len(trials_in(tmp_path)) == 16


def test_a_space_in_which_nothing_runs_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_freeze.searching.study.REFUSALS", 3)
    with asked(tmp_path) as desk:
        for _ in range(3):
            desk.end(desk.take(), REFUSED, "too large")
        with pytest.raises(SearchError, match=r"Of 3 recipes in a row none could be run\. The last: too large Widen"):
            desk.take()


def test_a_search_that_finds_nothing_else_to_run_says_why_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_freeze.searching.study.REFUSALS", 3)
    with asked(tmp_path) as desk:
        desk.finish(desk.take(), SearchPoint(0, Recipe(), 0.5, 1, 1.0))
        for _ in range(3):
            desk.end(desk.take(), REFUSED, "too large")
        with pytest.warns(UserWarning, match="ends before its budget is spent.*The last: too large"):
            assert desk.take() is None


def test_the_seconds_of_recipes_that_were_not_run_do_not_count(tmp_path):
    with Desk(tmp_path, {}, SearchBudget(seconds=0.5)) as desk:
        trial = desk.take()
        time.sleep(0.6)
        desk.end(trial, REFUSED, "too large")
        assert desk.take() is not None


def test_a_recipe_that_kills_its_process_is_not_tried_for_ever(tmp_path):
    drawn = []
    for _ in range(MOST_TRIES + 1):
        with asked(tmp_path) as lost:  # and is gone
            drawn.append(draw(lost.take()))
    assert len({*drawn[:MOST_TRIES]}) == 1
    assert drawn[MOST_TRIES] != drawn[0]


def test_any_seed_that_a_recipe_may_have_will_do(tmp_path):
    with asked(tmp_path, seed=2**32 - 1) as desk:
        assert 0 <= draw(desk.take()) <= 1


def test_what_a_user_keeps_beside_a_search_stays(tmp_path):
    with asked(tmp_path) as desk:
        mine = [desk.cache.parent / "huggingface" / "model", tmp_path / "front" / "mine.yaml"]
        own = [desk.cache / "rows", tmp_path / "front" / "07.yaml"]
        for file in (*mine, *own):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("")
        desk.note(trial := desk.take(), Recipe())
        desk.finish(trial, SearchPoint(0, Recipe(), 0.5, 1, 1.0))
        desk.tidy()
    write(read_result(tmp_path))
    assert [file.exists() for file in (*mine, *own)] == [True, True, False, False]
    assert Recipe.load(tmp_path / "front" / "00.yaml").name == "trial-0"


def test_a_search_that_has_not_begun_can_be_asked_for_anew(tmp_path):
    Desk(tmp_path, {"recipe": "a slip"}, SearchBudget())
    late = asked(tmp_path)
    Desk(tmp_path, {"recipe": "a third"}, SearchBudget())
    with pytest.raises(SearchError, match="holds a search with another recipe"):
        late.begin(lambda: None, lambda: Pace(1, 0.0, 0.0))


def test_folders_in_which_nothing_can_be_kept_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "study.db").write_text("no database, and long enough to be none" * 9)
    for folder in ("file/search", "broken"):
        with pytest.raises(SearchError, match=r"can't be kept in .* Free space, or name another folder"):
            asked(tmp_path / folder)
    optuna.create_study(storage=f"sqlite:///{tmp_path / 'study.db'}", study_name="mine")
    with pytest.raises(SearchError, match="holds 'mine', a study of your own"):
        asked(tmp_path)


def test_another_search_or_other_files_in_the_folder_are_refused(tmp_path):
    asked(tmp_path / "search").begin(lambda: None, lambda: Pace(1, 0.0, 0.0))
    (tmp_path / "cached" / "cache").mkdir(parents=True)
    with pytest.raises(SearchError, match="is not empty, and holds no search"):
        asked(tmp_path / "cached")
    with pytest.raises(SearchError, match="holds a search with another space"):
        Desk(tmp_path / "search", {"recipe": "a", "space": {"lr": 1}}, SearchBudget())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(SearchError, match="is not empty, and holds no search"):
        asked(tmp_path / "mine")
    with pytest.raises(SearchError, match="is a file"):
        asked(tmp_path / "mine" / "notes.txt")


# All of it


def test_a_search_from_python_and_from_the_command_line(base, home, tmp_path, monkeypatch, capsys):
    Path(tmp_path / "base.yaml").write_text(base.to_yaml())
    Path(tmp_path / "space.yaml").write_text(json.dumps(SMALL.to_dict()))
    folder = tmp_path / "out"
    found = search(base, SMALL, SearchBudget(trials=4), folder)
    lines = capsys.readouterr().err.splitlines()
    assert found.study == folder / "study.db"
    assert len(found.front) + len(found.others) + found.stopped == 4 == sum(line.startswith("trial ") for line in lines)
    first = next(own for own in (*found.front, *found.others) if own.number == 0)
    assert replace(first.recipe, freeze=base.freeze) == base
    assert sorted(path.name for path in folder.iterdir()) == [
        "claim.lock",
        "front",
        "pareto.png",
        "study.db",
        "workers",
    ]
    files = sorted((folder / "front").iterdir())
    assert len(files) == len(found.front)
    for file, point in zip(files, found.front, strict=True):
        recipe = Recipe.load(file)
        assert replace(recipe, name=point.recipe.name, about=point.recipe.about) == point.recipe
        assert fine_tune(recipe).trainable == point.trainable
    assert all(f"{own.trainable:,}" in str(found) for own in found.front)

    def command(*options: str) -> dict:
        told = ["--recipe", tmp_path / "base.yaml", "--space", tmp_path / "space.yaml", "--output", folder, *options]
        monkeypatch.setattr(sys, "argv", ["hf-freeze", "search", *map(str, told), "--json"])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert not exit.value.code
        return json.loads(capsys.readouterr().out)

    assert command("--trials", "4") == found.to_dict()
    more = command("--trials", "5")
    numbers = {own["number"] for name in ("front", "others") for own in more[name]}
    assert {own.number for own in (*found.front, *found.others)} <= numbers
    assert len(numbers) + more["stopped"] == 5


def test_no_recipe_over_the_budget_of_parameters_is_run_or_found(base, tmp_path):
    found = search(base, SMALL, SearchBudget(trials=3, parameters=2000), tmp_path / "out")
    assert found.refused > 0  # the recipe that it begins with
    assert all(own.trainable <= 2000 for own in (*found.front, *found.others))
    assert len(found.front) + len(found.others) + found.stopped == 3


def test_a_trial_that_fails_is_told_of_and_not_tried_again(base, tmp_path, monkeypatch):
    def fail(*told: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(judging, "fine_tune", fail)
    with pytest.raises(MemoryError):
        search(base, SMALL, SearchBudget(trials=1), tmp_path)
    monkeypatch.undo()
    found = search(base, SMALL, SearchBudget(trials=1), tmp_path)
    assert [own.state for own in trials_in(tmp_path) if REFUSED not in own.user_attrs] == [
        TrialState.FAIL,
        TrialState.COMPLETE,
    ]
    assert len(found.front) == 1


def test_a_recipe_that_does_not_fit_into_the_accelerators_memory_is_passed_over(base, tmp_path, monkeypatch):
    def fail_once(*told: object):
        monkeypatch.undo()
        raise torch.OutOfMemoryError("out of memory")  # no test has an accelerator

    monkeypatch.setattr(judging, "fine_tune", fail_once)
    found = search(base, SMALL, SearchBudget(trials=1), tmp_path)
    assert (len(found.front), found.refused >= 1) == (1, True)


def test_a_draw_that_does_not_go_with_the_recipe_is_passed_over(base, tmp_path):
    told = replace(base, freeze="base", adapter=BottleneckConfig(placement="houlsby", cross_attention=True))
    space = replace(SMALL, adapter=("pfeiffer", "none"))
    found = search(told, space, SearchBudget(trials=2), tmp_path)
    assert len(found.front) + len(found.others) + found.stopped == 2


def test_texts_that_are_gone_end_a_search(base, judge, monkeypatch):
    monkeypatch.setattr(judging, "fine_tune", lambda *told: load_corpus("/nowhere/at/all.csv"))
    with pytest.raises(DataError):
        judge.run(0, base, list)


def test_an_interrupted_trial_is_tried_again(base, tmp_path, monkeypatch):
    def interrupt(*told: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(judging, "fine_tune", interrupt)
    with pytest.raises(KeyboardInterrupt):
        search(base, SMALL, SearchBudget(trials=1), tmp_path)
    monkeypatch.undo()
    search(base, SMALL, SearchBudget(trials=1), tmp_path)
    lost, again = trials_in(tmp_path)
    assert lost.params == again.params
    assert again.state == TrialState.COMPLETE


def test_without_optuna_the_mend_is_named(base, tmp_path, monkeypatch):
    monkeypatch.setattr(searcher, "find_spec", lambda name: None)
    with pytest.raises(SearchError, match=r"pip install 'hf-freeze\[search\]'"):
        search(base, folder=tmp_path)


def test_wrong_input_is_refused_before_anything_is_made(base, tmp_path):
    with pytest.raises(SearchError, match="workers is 0"):
        search(base, folder=tmp_path / "out", workers=0)
    with pytest.raises(RecipeError, match=r"'fats' is no recipe and no file\. Did you mean 'fast'"):
        search("fats", folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_worker_that_has_failed_is_told_of(base, tmp_path, monkeypatch):
    failing = [sys.executable, "-c", "raise SystemExit(3)"]
    monkeypatch.setattr(searcher, "_helper", lambda asked: subprocess.Popen(failing))
    with pytest.raises(SearchError, match="A worker has ended with exit code 3"):
        search(base, SMALL, SearchBudget(trials=1), tmp_path, workers=2)


def test_what_all_workers_share_is_measured_once(tmp_path):
    with asked(tmp_path) as one, asked(tmp_path) as other:
        assert one.begin(lambda: None, lambda: Pace(2, 1.0, 2.0)) == Pace(2, 1.0, 2.0)
        assert other.begin(lambda: pytest.fail(), lambda: pytest.fail()) == Pace(2, 1.0, 2.0)
        assert PACE in one.study.user_attrs
        assert one.take().user_attrs[WORKER] != other.take().user_attrs[WORKER]


def test_the_pace_is_measured_without_a_bar_which_a_notebook_would_keep(monkeypatch):
    monkeypatch.setattr("hf_freeze.cache.callback.tqdm", None)
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=2, hidden_size=12, vocab_size=9))
    rows = [{"input_ids": [1 + row % 7, 2 + row % 5, row % 3]} for row in range(80)]
    assert measure(model, 2, Cache(), rows, default_data_collator, batch_size=16).deep > 0
