"""`hf-freeze audit`: models, recipes and scripts, what is printed, and the exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from hf_freeze import (
    AutoFreezeModelForSequenceClassification,
    BottleneckConfig,
    Stage,
    StagedUnfreezing,
    cli,
)
from hf_freeze.data import embedded_model_path
from hf_freeze.errors import DataError
from hf_freeze.targets import audit_target

SCRIPT = """
import sys
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from beside import LABELS

for lr in map(float, sys.argv[1:]):
    model = BertForSequenceClassification(
        BertConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=16, vocab_size=9)
    )
    model.accepts_loss_kwargs = False
    rows = [{"input_ids": torch.tensor([1, 2, 3]), "labels": label} for label in LABELS]
    args = TrainingArguments("out", max_steps=3, learning_rate=lr, report_to=[], use_cpu=True, save_strategy="no")
    Trainer(model, args, train_dataset=rows).train()
"""
RECIPE = """
unfreeze:
  stages:
  - {start: 0, unfreeze: head, lr: 1e-3}
  - {start: "50%", unfreeze: "layers[-1]", lr: 3.0}
epochs: 2
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A BERT with the embedded model's words and random weights, of which the lower half was frozen when saved."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=2, intermediate_size=32)
    config.num_hidden_layers = 2
    BertForSequenceClassification(config).save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder)
    frozen = AutoFreezeModelForSequenceClassification.from_pretrained(folder / "plain", freeze="embeddings, layers[0]")
    frozen.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working folder with a few texts and a script."""
    monkeypatch.chdir(tmp_path)
    texts = [f"the film was {word} {number},{word}" for number in range(15) for word in ("good", "bad")]
    Path("films.csv").write_text("\n".join(["text,label", *texts]))
    Path("own").mkdir()
    Path("own/script.py").write_text(SCRIPT)
    Path("own/beside.py").write_text("LABELS = [0, 1]\n")
    return tmp_path


@pytest.fixture
def hf_freeze(monkeypatch, capsys):
    """Runs a command line in this process; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-freeze", "audit", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capsys.readouterr()

    return run


def test_a_model_is_audited_as_it_was_saved(here, model):
    (audited,) = audit_target(model, dataset="films.csv", symptom="accuracy")

    assert audited.report.codes == ("HF022",)
    assert {row.segment for row in audited.report.figures if not row.trainable} == {"embeddings", "layers[0]"}


STAGES = [Stage(0, "head"), Stage("2 steps", "layers[-1]", lr=0.5), Stage("4 steps", "layers[0]", lr=1e-3)]


@pytest.mark.parametrize(("step", "stage", "too_high"), [(1, 1, False), (3, 2, True), (4, 3, True)])
def test_a_checkpoint_of_a_staged_run_is_audited_in_its_stage(here, model, step, stage, too_high):
    tokenizer = AutoTokenizer.from_pretrained(model)
    own = BertForSequenceClassification.from_pretrained(model)
    rows = [{**tokenizer("the film was good"), "labels": 1}] * 10
    args = TrainingArguments(
        "out", max_steps=5, save_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True
    )
    callbacks, collator = [StagedUnfreezing(STAGES)], DataCollatorWithPadding(tokenizer)
    Trainer(own, args, train_dataset=rows, data_collator=collator, callbacks=callbacks).train()

    (audited,) = audit_target(f"out/checkpoint-{step}", dataset="films.csv", symptom="loss")

    assert audited.subject == f"out/checkpoint-{step}, stage {stage} of 3, from step {2 * (stage - 1)}"
    trains = {row.segment for row in audited.report.figures if row.trainable}
    assert trains == {"head", *(["layers[1]"] if step > 1 else []), *(["layers[0]"] if step > 3 else [])}
    assert ("HF010" in audited.report.codes) == too_high


@pytest.mark.parametrize("kind", ["peft", "ours"])
def test_a_checkpoint_of_adapters_is_audited_in_the_model_that_they_name(here, model, kind):
    own = BertForSequenceClassification.from_pretrained(model)
    if kind == "peft":
        own = get_peft_model(own, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    else:
        own.add_adapter(BottleneckConfig(bottleneck_size=2, modules_to_save=["classifier"]))
    own.save_pretrained("out/checkpoint-3")

    (audited,) = audit_target("out/checkpoint-3", dataset="films.csv", symptom="loss")

    assert audited.report.codes == ()
    trains = {row.segment for row in audited.report.figures if row.trainable}
    assert "head" in trains and any("adapters" in name or "layers" in name for name in trains)
    assert "embeddings" not in trains


def test_adapters_for_other_texts_or_of_no_model_are_refused(here, model):
    own = get_peft_model(
        BertForSequenceClassification.from_pretrained(model, num_labels=3, ignore_mismatched_sizes=True),
        LoraConfig(target_modules=["query"], task_type="SEQ_CLS"),
    )
    own.save_pretrained("out")

    with pytest.raises(DataError, match=r"can't be put into .* for texts of 2 classes: .*Name the texts"):
        audit_target("out", dataset="films.csv")
    config = json.loads(Path("out/adapter_config.json").read_text())
    Path("out/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(DataError, match="does not name the base model: write it there"):
        audit_target("out", dataset="films.csv")


def test_a_recipe_is_audited_in_each_of_its_stages(here, model):
    Path("mine.yaml").write_text(f"model: {model}\ndataset: films.csv\n{RECIPE}")

    found = audit_target("mine.yaml")

    assert [own.report.codes for own in found] == [(), ("HF010",)]
    assert found[1].report.findings[0].names == ("layers[1]",)
    assert found[1].subject == "fine-tuning, stage 2 of 2, from step 2"


def test_a_recipe_without_stages_is_audited_once(here, model):
    Path("mine.yaml").write_text(f"model: {model}\ndataset: films.csv\nfreeze: all\n")

    (audited,) = audit_target("mine.yaml")

    assert audited.report.codes == ("HF001",)


def test_the_folder_of_a_run_is_audited_by_its_recipe(here, model, hf_freeze):
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(f"model: {model}\ndataset: films.csv\nadapter: {{bottleneck_size: 2}}\n")

    (audited,) = audit_target("run")

    assert audited.report.findings == ()


def test_each_trainer_of_a_script_is_audited(here, hf_freeze):
    code, out, _ = hf_freeze("own/script.py", "--json", "--", "1e-4", "0.0")

    reports = json.loads(out)["reports"]
    assert code == 1
    assert [own["subject"] for own in reports] == ["Trainer 1 of 2", "Trainer 2 of 2"]
    assert [[found["code"] for found in own["findings"]] for own in reports] == [[], ["HF009"]]
    assert json.loads(Path("out/audit.json").read_text())["findings"][0]["code"] == "HF009"


@pytest.mark.parametrize(("status", "code"), [("", 1), ("0", 1), ("None", 1), ("3", 3), ("'wrong'", 1)])
def test_a_script_that_ends_by_itself_is_audited_all_the_same(here, hf_freeze, status, code):
    Path("own/ends.py").write_text(f"{SCRIPT}\nsys.exit({status})\n")

    ended, out, _ = hf_freeze("own/ends.py", "--", "0.0")

    assert ended == (code if status != "'wrong'" else "wrong")
    assert ("HF009" in out) == (status in ("", "0", "None"))


def test_afterwards_all_is_as_it_was(here):
    before = [*sys.argv], [*sys.path], [*transformers.trainer.DEFAULT_CALLBACKS]
    Path("own/fails.py").write_text("raise KeyError\n")

    with pytest.raises(KeyError):
        audit_target("own/fails.py")

    assert ([*sys.argv], [*sys.path], [*transformers.trainer.DEFAULT_CALLBACKS]) == before


def test_a_sound_model_ends_with_exit_code_0(here, model, hf_freeze):
    code, out, _ = hf_freeze(model, "--dataset", "films.csv", "--symptom", "loss")

    assert code == 0
    assert "What trains is in order" in out and "nothing found" in out


def test_json_alone_is_printed_where_it_is_asked_for(here, model, hf_freeze):
    code, out, _ = hf_freeze(model, "--dataset", "films.csv", "--symptom", "memory", "--json")

    (report,) = json.loads(out)["reports"]
    assert code == 0 and report["symptom"] == "memory" and "Frozen segments keep 0 B" in report["answer"]
    assert {row["segment"]: row["saved"] for row in report["figures"]}["layers[1]"] > 0


MISTAKES = [
    (["nowhere.py"], "No such script: 'nowhere.py'", "Check the path"),
    (["own/beside.py"], "makes no Trainer", "Call audit(model, optimizer) in it"),
    (["own/idle.py"], "trains nothing that could be audited", "take a step"),
    (["own/script.py", "--symptom", "memory"], "is measured on a batch", "Name a model folder or a recipe"),
    (["gradual", "--", "more"], "Arguments are for a script", "leave out 'more'"),
    (["graduall.yaml"], "is no recipe and no file", "'gradual'"),
    (["own"], "holds no config.json", "save_pretrained"),
    (["embedded", "--dataset", "filmss.csv"], "No such file", "films.csv"),
]


@pytest.mark.parametrize(("arguments", "wrong", "mend"), MISTAKES)
def test_a_mistake_ends_in_one_line_with_exit_code_2(here, hf_freeze, arguments, wrong, mend):
    Path("own/idle.py").write_text(SCRIPT.replace(".train()\n", "\n").replace("sys.argv[1:]", "['1e-3']"))

    code, _, error = hf_freeze(*arguments)

    assert code == 2
    assert wrong in error and mend in error and "Traceback" not in error


def test_an_unknown_symptom_is_refused(here, hf_freeze):
    code, _, error = hf_freeze("embedded", "--symptom", "speed")

    assert code == 2 and "memory" in error


def test_a_target_that_is_nothing_is_a_data_error(here):
    with pytest.raises(DataError):
        audit_target("./nothing")
