"""What a user reads after a mistake: the value that was wrong, what was expected, and the mend, in one or two lines."""

import ast
import functools
import json
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

import hf_freeze
from hf_freeze import (
    BottleneckConfig,
    FreezeError,
    Stage,
    UnfreezeSchedule,
    attach_schedule,
    errors,
    freeze,
    freeze_until,
    layer_map,
    on_plateau,
    select,
    unfreeze,
)
from hf_freeze.certify import Seal
from hf_freeze.data import Split, check_model, check_output_dir, load_corpus, tokenize
from hf_freeze.engine import StageEngine
from hf_freeze.optim import require_steps
from hf_freeze.recipes import Recipe
from hf_freeze.stages import Sample
from hf_freeze.timetable import plan
from tests.tiny import tiny_model

TWO_LINES = 240  # characters
ERRORS = [name for name in vars(errors) if name.endswith("Error")]
PARTS = "embeddings, layers[0:2], pooler, head"  # of the model that the mistakes are made on

# What the user did -> what the message must say: the wrong value, what was expected or the mend.


def quantised(model):
    linear = model.bert.pooler.dense
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    return model


def planned(model, *stages, total_steps=10, steps_per_epoch=5):
    rates = {name: 1.0 for name, _ in model.named_parameters()}
    return plan(model, stages, rates, total_steps, steps_per_epoch)


def attached(model, parameters, lr=1.0, scheduler=None):
    optimizer = torch.optim.SGD(parameters, lr=lr)
    scheduler = (scheduler or torch.optim.lr_scheduler.LambdaLR)(optimizer, lambda step: 1.0)
    StageEngine(model, [Stage(0, "head")]).attach(optimizer, scheduler, 10, 5)


def waiting(model, start):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return attach_schedule(UnfreezeSchedule([Stage(0, "head"), Stage(start, "all")]), model, optimizer, scheduler, 10)


def broken(model):
    freeze(model, "pooler")
    with hf_freeze.certify_frozen(model):
        model.bert.pooler.dense.bias.data += 1


def attached_twice(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for _ in range(2):
        StageEngine(model, [Stage(0, "head")]).attach(optimizer, scheduler, 10, 5)


def plateau(optimizer, _):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


def extended(model, stage, attach=True):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    engine = StageEngine(model, [Stage(0, "layers")], grows=True)
    if attach:
        engine.attach(optimizer, scheduler, 10, 5)
    engine.extend(stage)


SELECTING = [
    (lambda m: layer_map(m)["heads"], "'heads' names no segment", "Did you mean 'head'", PARTS),
    (lambda m: select(nn.Linear(2, 2), "layers"), "Linear has no stack of layers", "It has: other"),
    (lambda m: layer_map(nn.ReLU()), "ReLU has no parameters", "nothing to map"),
    (lambda m: select(m, "layers[7]"), "layers[7]", "2 layers, indices -2 to 1"),
    (lambda m: select(m, "layers[a]"), "[a] is no Python index or slice", "Write [3], [-2:]"),
    (lambda m: select(m, "layers[1:1]"), "'layers[1:1]'", "empty slice", PARTS),
    (lambda m: select(m, "embedings"), "'embedings' names no segment", "Did you mean 'embeddings'?", PARTS),
    (lambda m: select(m, "layers -bias"), "'layers -bias'", "A minus stands between spaces", PARTS),
    (lambda m: select(m, "*.keys.*"), "'*.keys.*' matches no parameter", "such as 'bert.embeddings.", PARTS),
    (lambda m: select(m, "head - head"), "'head - head' names no parameter", PARTS),
    (lambda m: select(m, "re:*"), "'re:*' is no regular expression", "nothing to repeat", "'*.query.*'"),
    (lambda m: select(m, "head,,"), "'head,,': a term is missing", "Write 'a, b' or 'a - b'"),
    (lambda m: select(m, 3), "a string, not int: 3"),
    (lambda m: select(m, ["head", None]), "a string, not NoneType: None"),
    (lambda m: unfreeze(quantised(m), "all"), "'bert.pooler.dense.weight' holds torch.int8", "train adapters"),
    (lambda m: freeze_until(m, "embeddings"), "Nothing stands before 'embeddings'", "Name what comes later", PARTS),
    (lambda m: freeze_until(m, "poler"), "'poler' names no segment", "Did you mean 'pooler'", PARTS),
    (lambda m: freeze(m, ""), "'': a term is missing", "'embeddings, layers[:8]'"),
]
SCHEDULING = [
    (lambda m: Stage("soon", "head"), "start='soon'", "'100 steps' or '30%'"),
    (lambda m: Stage(-1, "head"), "start=-1", "epochs (2 or 0.5)"),
    (lambda m: Stage("130%", "head"), "start='130%'", "at most 100%"),
    (lambda m: Stage("1.5 steps", "head"), "start='1.5 steps'", "whole steps"),
    (lambda m: Stage(0), "The stage at 0 neither unfreezes nor freezes", "Name one"),
    (lambda m: Stage(0, "head,"), "'head,': a term is missing", "Write 'a, b'"),
    (lambda m: Stage(0, "head", lr=0.0), "lr=0.0 in the stage at 0", "positive rate"),
    (lambda m: Stage(0, "head", layer_decay=-1), "layer_decay=-1", "e.g. 0.9"),
    (lambda m: Stage(0, "head", warmup=-5), "warmup=-5", "a number of steps"),
    (lambda m: Stage(0, "head", lr={"head": 0}), "lr={'head': 0} in the stage at 0", "positive rate"),
    (lambda m: Stage(0, "all", sample=2), "sample=2 in the stage at 0", "Write unfreeze='all', sample=Sample("),
    (lambda m: Sample(layers=0), "layers=0 in a sample", "a whole number from 1"),
    (lambda m: planned(m, Stage(0, "all", sample=Sample(9))), "samples 9 layers", "'all' names 2", "Sample fewer"),
    (
        lambda m: planned(m, Stage(0, "head", lr={"layers": 0.1})),
        "'layers' is nothing of what the stage at 0 unfreezes, 'head'",
        "Unfreeze it there, or leave out its rate",
    ),
    (lambda m: UnfreezeSchedule(preset="lisa"), "'lisa' is no preset", "UnfreezeSchedule.gradual()", "chain_thaw"),
    (
        lambda m: UnfreezeSchedule.lp_ft().stages_for(m.bert),
        "no head of BertModel trains",
        "Take a class with a head, or unfreeze it",
    ),
    (lambda m: UnfreezeSchedule(), "has stages or a preset", "Write UnfreezeSchedule([Stage(0, 'head')"),
    (lambda m: UnfreezeSchedule(["head"]), "'head' is no stage", "Write Stage(0, 'head')"),
    (lambda m: UnfreezeSchedule([Stage(1, "head")]), "Nothing trains at step 0", "Start with Stage(0, 'head')"),
    (
        lambda m: UnfreezeSchedule([Stage(0, "head"), Stage(2, "pooler"), Stage(1, "layers")]),
        "out of order: they start at [0.0, 2.0, 1.0]",
        "Write them ascending",
    ),
    (lambda m: UnfreezeSchedule.gradual(epochs_per_stage=0), "epochs_per_stage=0", "a positive number"),
    (lambda m: UnfreezeSchedule.gradual(layers_per_stage=0), "layers_per_stage=0", "at least 1 layer"),
    (
        lambda m: UnfreezeSchedule.gradual().stages_for(m.requires_grad_(False)),
        "nothing is left to unfreeze",
        "Leave some layers unfrozen",
    ),
    (lambda m: UnfreezeSchedule.from_yaml(Path("no.yaml")), "can't be read", "no.yaml"),
    (lambda m: UnfreezeSchedule.from_yaml("stages: {"), "can't be read", "line 1"),
    (lambda m: UnfreezeSchedule.from_yaml("stage: []"), "one key: 'stages'", "{start: 0, unfreeze: head}"),
    (lambda m: UnfreezeSchedule.from_yaml("preset: {name: gradul}"), "Unknown preset 'gradul'", "'gradual'"),
    (lambda m: UnfreezeSchedule.from_yaml("stages: [head]"), "'head' is no stage", "{start: 0, unfreeze: head}"),
    (
        lambda m: UnfreezeSchedule.from_yaml("stages: [{start: 0, unfreze: head}]"),
        "Unknown field 'unfreze'",
        "Did you mean 'unfreeze'",
        "There are: start",
    ),
    (
        lambda m: planned(m, Stage(0, "head"), Stage("2 steps", "pooler"), Stage("10%", "layers")),
        "'10%' (step 1) does not come after '2 steps' (step 2)",
        "Write them ascending",
    ),
    (
        lambda m: planned(m, Stage(0, "head"), Stage(3, "layers")),
        "The stage at 3 would start at step 15, and the run ends at step 10",
        "Start it earlier",
    ),
    (
        lambda m: planned(m, Stage(0, "head"), Stage(1, freeze="head")),
        "Nothing trains in the stage at 1",
        "Unfreeze something, 'head'",
    ),
    (
        lambda m: planned(m, Stage(0, "head"), Stage(1, "layers"), steps_per_epoch=None),
        "The stage at 1 counts epochs",
        "Write '100 steps' or '30%'",
    ),
    (lambda m: on_plateau(""), "metric=''", "e.g. 'eval_loss'"),
    (lambda m: on_plateau("eval_loss", patience=0), "patience=0", "a number of evaluations from 1"),
    (lambda m: on_plateau("eval_loss", min_delta=-1), "min_delta=-1", "a number from 0"),
    (lambda m: on_plateau("eval_loss", restore_best=1), "restore_best=1", "write True or False"),
    (
        lambda m: UnfreezeSchedule([Stage(0, "head"), Stage(on_plateau("eval_loss"), "layers"), Stage(2, "all")]),
        "The stage at 2 stands behind one at on_plateau('eval_loss')",
        "Put it before that one, or start it on a plateau too",
    ),
    (
        lambda m: UnfreezeSchedule.from_yaml("stages: [{start: {plateu: eval_loss}, unfreeze: head}]"),
        "start={'plateu': 'eval_loss'}",
        "{plateau: eval_loss, patience: 2}",
    ),
    (
        lambda m: waiting(m, on_plateau("eval_loss")).report({"loss": 1.0}),
        "A stage waits for 'eval_loss', and loss was reported",
        "Report it, or name in on_plateau what you report",
    ),
    (
        lambda m: waiting(m, on_plateau("eval_loss", restore_best=True)),
        "restore_best in the stage at on_plateau('eval_loss', restore_best=True) needs the Trainer's checkpoints",
        "Leave it out, and load the best weights yourself",
    ),
    (lambda m: planned(m, Stage(0, "hat")), "'hat' names no segment", PARTS),
    (
        lambda m: extended(m, Stage("3 steps", "layers[0]"), attach=False),
        *("The stage at '3 steps' comes when no run goes on", "Attach the engine first"),
    ),
    (
        lambda m: extended(m, Stage("10 steps", "layers[0]")),
        *("The stage at '10 steps' (step 10) does not come between", "the last, at step 0, and the end at step 10"),
    ),
    (
        lambda m: extended(m, Stage("3 steps", "head")),
        *("'classifier.bias' and 1 more are to train from step 3 on", "Unfreeze them before the run"),
    ),
    (attached_twice, "Another schedule is carried out with this optimizer", "Use one StagedUnfreezing"),
    (
        lambda m: require_steps(LayerWiseDummyOptimizer({}, lr=1.0)),
        "LayerWiseDummyOptimizer takes its steps within backward",
        "optim='galore_adamw'",
    ),
    (
        lambda m: attached(m, m.classifier.parameters(), scheduler=plateau),
        "ReduceLROnPlateau can't be given a rate",
        "'linear', 'cosine' or 'constant'",
    ),
    (
        lambda m: attached(m, m.bert.parameters()),
        "'classifier.bias' and 1 more are scheduled but not in the optimizer",
        "`callbacks=`",
    ),
    (lambda m: attached(m, m.parameters(), lr=0.0), "rate of 'classifier.bias' is 0.0", "Give a positive one"),
]
ADAPTING = [
    (lambda m: BottleneckConfig(bottleneck_size=0), "bottleneck_size=0", "at least 1"),
    (lambda m: BottleneckConfig(phm_dim=0), "phm_dim=0", "at least 1"),
    (lambda m: BottleneckConfig(reduction_factor=0), "reduction_factor=0", "a positive number, such as 16"),
    (lambda m: BottleneckConfig(reduction_factor={}), "reduction_factor={}", "{'layers[:6]': 32"),
    (lambda m: BottleneckConfig(dropout=1.0), "dropout=1.0", "a probability"),
    (lambda m: BottleneckConfig(activation="rellu"), "activation='rellu'", "Did you mean 'relu'"),
    (lambda m: BottleneckConfig(placement="pfeifer"), "placement='pfeifer'", "Did you mean 'pfeiffer'?"),
    (lambda m: BottleneckConfig(scaling="big"), "scaling='big'", "a number, 'learned' or 'channel'"),
    (lambda m: BottleneckConfig(fusion=["a"]), "fusion=['a']", "two loaded adapters or more"),
    (lambda m: BottleneckConfig(layers="layers,"), "'layers,': a term is missing", "Write"),
    (lambda m: m.add_adapter(BottleneckConfig(layers="head")), "layers='head' names 'head'", "Write e.g. 'layers[4:]'"),
    (
        lambda m: m.add_adapter(BottleneckConfig(layers="layers - layers")),
        "layers='layers - layers'",
        "leaves no layer to put an adapter behind",
    ),
    (lambda m: m.add_adapter(BottleneckConfig(layers="layers[9]")), "layers[9]", "indices -2 to 1"),
    (
        lambda m: m.add_adapter(BottleneckConfig(reduction_factor={"layers[0]": 4})),
        "no factor for 'layers[1]'",
        "{'layers': 16}",
    ),
    (lambda m: Recipe(unfreeze="gradul"), "Unknown preset 'gradul'", "Did you mean 'gradual'", "chain_thaw"),
    (
        lambda m: Recipe(adapter=BottleneckConfig(), unfreeze=UnfreezeSchedule.gradual()),
        "A preset stages what trains",
        "stages in a YAML file",
    ),
    (lambda m: Recipe(lr=0.0), "lr is 0.0", "positive number"),
]


def classifier():
    return tiny_model("bert", AutoModelForSequenceClassification)


def written(folder, files):
    """Writes files, by path; an object as JSON."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / path).write_text(text, encoding="utf-8")


def texts(*labels, each=3):
    return "text,label\n" + "".join(f"word {n},{label}\n" for label in labels for n in range(each))


class OneToken:
    """Stands in for a tokenizer, of which `tokenize` asks only how many special tokens it adds before it refuses."""

    def num_special_tokens_to_add(self):
        return 2


# files -> what the user did -> what the message must say
AUDITING = [
    (lambda m: hf_freeze.audit(m), "No parameter of BertForSequenceClassification has a gradient", "loss.backward()"),
    (lambda m: hf_freeze.audit(m, symptom="los"), "'los' is no symptom", "Did you mean 'loss'?", "memory, accuracy"),
    (lambda m: hf_freeze.audit(m, symptom="memory"), "symptom='memory' is measured on a batch", "Pass batch="),
    (
        lambda m: hf_freeze.audit(m, symptom="accuracy", batch={"input_ids": torch.tensor([[1]])}),
        "BertForSequenceClassification gives no loss for a batch of input_ids",
        "Put labels into it",
    ),
    (lambda m: hf_freeze.Finding("HF1"), "'HF1' is no code of an audit", "HF001 is the first"),
    (lambda m: hf_freeze.AuditCallback(every=0), "every=0 in AuditCallback", "a number of steps, from 1"),
    (broken, "'bert.pooler.dense.bias' was frozen and has changed, and 0 more of 2", "audit(model, optimizer)"),
    (lambda m: Seal(freeze(m.to("meta"), "head") and m), "'classifier.weight' has no data here", "Load its weights"),
]
READING = [
    ({}, lambda: load_corpus("no.csv"), "No such file or folder: 'no.csv'", "Check the path"),
    ({"news.csv": ""}, lambda: load_corpus("new.csv"), "'new.csv'", "Did you mean 'news.csv'?"),
    ({"a.csv": texts("x", "y")}, lambda: load_corpus("a.csv", text_column="txt"), "'txt'", "Did you mean 'text'?"),
    (
        {"a.csv": texts("x", "y")},
        lambda: load_corpus("a.csv", label_column="z"),
        "'z'",
        "label_column to one of: 'text'",
    ),
    ({"a.csv": texts("x", "y")}, lambda: load_corpus("a.csv", limit=1), "limit of 1", "2 classes"),
    ({"a.csv": texts("x")}, lambda: load_corpus("a.csv"), "1 label(s), 'x'", "two or more classes"),
    ({"a.csv": texts("x", "y", each=2)}, lambda: load_corpus("a.csv"), "'x' has 2 text(s)", "3 or more"),
    ({"a.csv": "text,label\n"}, lambda: load_corpus("a.csv"), "'a.csv' holds no rows", "add some"),
    (
        {"a.csv": "text,label\na,b,c\n"},
        lambda: load_corpus("a.csv"),
        "'a.csv', line 2: not 2 fields",
        "quote the field",
    ),
    ({"a.csv": "text,label\n,x\na,y\n"}, lambda: load_corpus("a.csv"), "1 empty text(s) in 2 rows", "remove or fill"),
    ({"a.csv": "text,label\na,\nb,y\n"}, lambda: load_corpus("a.csv"), "1 row(s) of 2 without a label", "label or"),
    ({"a.txt": "text"}, lambda: load_corpus("a.txt"), "'a.txt' is not a table", ".csv, .tsv, .json"),
    ({"a.json": "{"}, lambda: load_corpus("a.json"), "'a.json', line 1: malformed JSON", "mend the line"),
    ({"a.json": [1]}, lambda: load_corpus("a.json"), "a row is not an object", '{"text": ..., "label": ...}'),
    (
        {"a.json": [{"text": "a", "label": 1.5}]},
        lambda: load_corpus("a.json"),
        "the label 1.5",
        "strings or integers",
    ),
    ({"d/x/.keep": "", "d/y/1.txt": "a"}, lambda: load_corpus("d"), "'d/x' holds no text", "add .txt files"),
    ({"d/x/1.txt": "", "d/x/2.txt": "a"}, lambda: load_corpus("d"), "'d/x' has 1 empty text(s)", "remove or fill"),
    ({"d/test.csv": texts("x")}, lambda: load_corpus("d"), "'d' has no training split", "'train'"),
    (
        {"d/train.csv": texts("x", "y"), "d/test.csv": texts("x", "z")},
        lambda: load_corpus("d"),
        "differ in the label(s) 'y', 'z'",
        "both the same labels",
    ),
    (
        {"d/train.csv": texts("x", "y"), "d/dev.csv": texts("x"), "d/val.csv": texts("x")},
        lambda: load_corpus("d"),
        "two validation splits",
        "remove or rename",
    ),
    ({}, lambda: tokenize(Split((), ()), OneToken(), 2), "max_length of 2", "use 3 or more"),
    ({}, lambda: check_model("./no"), "No such model folder: 'no'", "Check the path"),
    ({"m/x": ""}, lambda: check_model("m"), "'m' holds no config.json", "save_pretrained()"),
    ({"m": ""}, lambda: check_model("./m"), "'./m' is a file", "name the model's folder"),
    ({"out": ""}, lambda: check_output_dir(Path("out"), False), "'out' is a file", "name a folder"),
    ({"out/x": ""}, lambda: check_output_dir(Path("out"), False), "'out' is not empty", "--overwrite"),
]


def check(message, fragments):
    for fragment in fragments:
        assert fragment in message
    assert "\n" not in message and len(message) <= TWO_LINES


def error_of(mistake, *arguments):
    with pytest.raises(FreezeError) as caught:
        mistake(*arguments)
    return caught.value


@pytest.mark.parametrize(
    "mistake, fragments",
    [pytest.param(row[0], row[1:], id=row[1]) for row in SELECTING + SCHEDULING + ADAPTING + AUDITING],
)
def test_a_message_names_the_value_and_the_mend(mistake, fragments):
    check(str(error_of(mistake, classifier())), fragments)


@pytest.mark.parametrize(
    "files, mistake, fragments", [pytest.param(row[0], row[1], row[2:], id=row[2]) for row in READING]
)
def test_a_message_about_files_names_them_and_the_mend(files, mistake, fragments, tmp_path, monkeypatch):
    written(tmp_path, files)
    monkeypatch.chdir(tmp_path)

    check(str(error_of(mistake)), fragments)


# No error without a row.


def raised_in(room):
    """Returns the lines of a file of the package at which it raises one of its own errors."""
    file = Path(hf_freeze.__file__).with_name(f"{room}.py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    own = tuple(f"raise {name}(" for name in ERRORS)
    raises = [node for node in ast.walk(tree) if isinstance(node, ast.Raise) and ast.unparse(node).startswith(own)]
    return {(str(file), node.lineno) for node in raises}


@functools.cache
def provoked():
    """Returns the lines of the package at which the rows end."""
    frames = [
        traceback.extract_tb(error_of(mistake, classifier()).__traceback__)[-1]
        for mistake, *_ in SELECTING + SCHEDULING
    ]
    return {(frame.filename, frame.lineno) for frame in frames}


@pytest.mark.parametrize(
    "room",
    [
        *("layers", "selectors", "freezing", "conditions", "stages", "timetable", "presets", "schedules"),
        *("optim", "engine"),
    ],
)
def test_every_error_of_the_core_has_a_row(room):
    assert raised_in(room) and raised_in(room) <= provoked()


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_is_a_freeze_error_and_a_value_error(name):
    assert issubclass(getattr(errors, name), FreezeError) and issubclass(FreezeError, ValueError)


def test_what_resembles_nothing_has_no_nearest():
    assert errors.nearest("xyz", ["head", "pooler"]) == ""
    assert errors.nearest("hed", ["head", "head", "heads"]) == " Did you mean 'head' or 'heads'?"
