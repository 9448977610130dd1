"""`hf-freeze plan`: what it prints, and that a mistake ends in one line with exit code 2."""

import json
import sys

import pytest
from transformers import BertConfig

from hf_freeze import BottleneckConfig, Recipe, cli, plan

FROZEN = "embeddings, layers[:1]"


@pytest.fixture
def folder(tmp_path):
    """A model's folder with a config and no weights."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertConfig(vocab_size=99, architectures=["BertForSequenceClassification"], **sizes).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def hf_freeze(monkeypatch, capsys):
    """Runs `hf-freeze plan` in this process; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-freeze", "plan", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capsys.readouterr()

    return run


def test_it_prints_the_plan(hf_freeze, folder):
    code, out, err = hf_freeze(folder, "--freeze", FROZEN, "--batch-size", 3, "--length", 20)
    made = plan(folder, freeze=FROZEN, batch_size=3, length=20)
    assert (code, err) == (0, "")
    assert f"{made.costs.trainable:,}" in out and "3 rows of 20 tokens" in out


def test_json_is_the_plan_as_plain_data(hf_freeze, folder):
    code, out, err = hf_freeze(folder, "--adapter", 4, "--json")
    plain = json.loads(out)
    assert (code, err) == (0, "")
    assert plain["costs"] == plan(folder, adapter=BottleneckConfig(bottleneck_size=4)).costs.to_dict()


def test_stages_from_a_preset_and_from_a_file(hf_freeze, folder, tmp_path):
    file = tmp_path / "stages.yaml"
    file.write_text('stages: [{start: 0, unfreeze: head}, {start: "50%", unfreeze: "layers[-1]"}]')
    assert len(json.loads(hf_freeze(folder, "--unfreeze", "gradual", "--json")[1])["stages"]) == 3
    stages = json.loads(hf_freeze(folder, "--unfreeze", file, "--json")[1])["stages"]
    assert [own["trains"] for own in stages] == ["head", "layers[1], head"]


def test_a_recipe_by_its_name_and_the_options_before_it(hf_freeze, folder):
    told = json.loads(hf_freeze(folder, "--recipe", "head-only", "--batch-size", 5, "--json")[1])
    recipe = Recipe.load("head-only")
    assert (told["batch_size"], told["length"]) == (5, recipe.max_length)
    assert told["trains"] == plan(folder, recipe=recipe).trains != plan(folder).trains


def test_what_fits(hf_freeze, folder):
    code, out, err = hf_freeze(folder, "--fits", "1GiB", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["name"] == "full fine-tuning"
    assert "fits: full fine-tuning" in hf_freeze(folder, "--fits", "1GiB")[1]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--freeze", "layerz"], "'layerz' names no segment"),
        (["--batch-size", "0"], "batch_size is 0: write a whole number from 1."),
        (["--length", "1000"], "length=1000: BertForSequenceClassification reads at most 512 tokens."),
        (["--fits", "lots"], "'lots' is no size of memory"),
        (["--fits", "1KB"], "Nothing fits into 1000 B"),
        (["--fits", "1GiB", "--freeze", "base"], "--fits names what to freeze itself. Leave out --freeze"),
        (["--unfreeze", "gradul"], "'gradul' is no preset and no file. Did you mean 'gradual'?"),
        (["--recipe", "gradul"], "'gradul' is no recipe and no file. Did you mean 'gradual'?"),
        (["--adapter", "0"], "bottleneck_size=0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(options, message, hf_freeze, folder):
    code, out, err = hf_freeze(folder, *options)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err


def test_a_folder_that_is_none(hf_freeze):
    code, _, err = hf_freeze("./no-such-model")
    assert code == 2 and "No such model folder" in err
