"""Bad files in AdapterHub's format: each is refused in one line that names the mend, runs nothing, changes no model."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_freeze import load_adapterhub, save_adapterhub, writing
from hf_freeze.errors import AdapterError
from tests.adapters.hub import adapter, base_model, output

CASE = "bert/static_head"
CONFIG, WEIGHTS, HEAD = "adapter_config.json", "pytorch_adapter.bin", "pytorch_model_head.bin"
KEY = "bert.encoder.layer.0.output.adapters.ref.adapter_down.0.weight"


class Exploit:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.mkdir, (self.mark,)


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def options(**changes):
    """Changes options of the adapter; one that is None is removed."""

    def spoil(folder):
        meta = json.loads((folder / CONFIG).read_text())
        meta["config"] = {k: v for k, v in (meta["config"] | changes).items() if v is not None or k not in changes}
        (folder / CONFIG).write_text(json.dumps(meta))

    return spoil


def meta(**changes):
    return lambda folder: (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))


def tensors(change, name=WEIGHTS):
    """Changes the tensors in a file by a function of their dictionary."""

    def spoil(folder):
        content = torch.load(folder / name, weights_only=True)
        changed = change(content)
        torch.save(content if changed is None else changed, folder / name)

    return spoil


def without(found, key):
    return {name: tensor for name, tensor in found.items() if name != key}


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def exploit(name, protocol=None):
    """Puts code into a pickle: as torch writes it, or as plain pickle does."""

    def spoil(folder):
        content = {KEY: Exploit(folder / "was_run")}
        if protocol is None:
            torch.save(content, folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps(content, protocol))

    return spoil


def safe(change):
    """Has the weights as safetensors beside, their bytes changed."""

    def spoil(folder):
        path = folder / "adapter.safetensors"
        save_file(torch.load(folder / WEIGHTS, weights_only=True), path)
        path.write_bytes(change(path.read_bytes()))

    return spoil


SPOILT = {
    # code
    "code in the adapter": (exploit(WEIGHTS), "more than tensors, which could run code"),
    "code in a plain pickle": (exploit(WEIGHTS, protocol=2), "more than tensors, which could run code"),
    "code in the head": (exploit(HEAD), "more than tensors, which could run code"),
    # damage
    "no folder": (shutil.rmtree, f"{CONFIG} is missing"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), f"{CONFIG} is missing"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"neither adapter.safetensors nor {WEIGHTS}"),
    "no head weights": (lambda folder: (folder / HEAD).unlink(), f"neither model_head.safetensors nor {HEAD}"),
    "config cut short": (cut(CONFIG, 300), f"{CONFIG} is no JSON"),
    "config of noise": (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe\x00\x9c"), f"{CONFIG} is no JSON"),
    "config nested without end": (text(CONFIG, "[" * 100_000), f"{CONFIG} is no JSON"),
    "config that is a list": (text(CONFIG, "[]"), "holds a JSON list"),
    "head config that is a number": (text("head_config.json", "3"), "holds a JSON int"),
    "pickle cut short": (cut(WEIGHTS, 2000), f"{WEIGHTS} can't be read"),
    "empty pickle": (cut(WEIGHTS, 0), f"{WEIGHTS} can't be read"),
    "pickle of text": (text(WEIGHTS, "<html>not found</html>"), f"{WEIGHTS} is damaged, or holds more"),
    "safetensors cut short": (safe(lambda data: data[:-8]), "adapter.safetensors can't be read"),
    "safetensors with a header beyond the file": (
        safe(lambda data: struct.pack("<Q", 2**63) + data[8:]),
        "adapter.safetensors can't be read",
    ),
    # other contents
    "a list of tensors": (tensors(lambda found: list(found.values())), "no mapping of names to tensors"),
    "a number for a tensor": (tensors(lambda found: found.update({KEY: 3.0})), "no plain tensor"),
    "whole numbers": (tensors(lambda found: found.update({KEY: found[KEY].long()})), "no plain tensor"),
    "a sparse tensor": (tensors(lambda found: found.update({KEY: found[KEY].to_sparse()})), "no plain tensor"),
    "a tensor is missing": (tensors(lambda found: without(found, KEY)), "1 of 8 tensors are missing"),
    "a tensor too many": (tensors(lambda found: found.update({"x.y": torch.ones(1)})), "have no place in this model"),
    "a tensor of another shape": (tensors(lambda found: found.update({KEY: torch.ones(3, 32)})), r"\(3, 32\) there"),
    "a tensor that claims to be huge": (
        tensors(lambda found: found.update({KEY: torch.ones(1).expand(2**40)})),
        r"\(1099511627776,\) there",
    ),
    "a head of another size": (
        tensors(lambda found: found.update({"classifier.weight": torch.ones(5, 32)}), HEAD),
        r"'classifier.weight' is \(5, 32\) in the file, \(3, 32\) here",
    ),
    "a head with less": (tensors(lambda found: without(found, "classifier.bias"), HEAD), "is absent in the file"),
    # other configs
    "an unknown option": (options(mh_adapters=True), "'mh_adapters' is unknown.* Did you mean 'mh_adapter'"),
    "an option is missing": (
        options(reduction_factor=None),
        "missing 1 required positional argument: 'reduction_factor'",
    ),
    "an option of another type": (options(reduction_factor="16"), "reduction_factor='16' is no float or dict"),
    "a list of another type": (options(leave_out=["0"]), "leave_out='0' is no int"),
    "a factor of another type": (options(reduction_factor={"default": None}), "reduction_factor=None is no float"),
    "no factor": (options(reduction_factor={"7": 16}), "reduction_factor"),
    "a factor of nothing": (options(reduction_factor=0), "makes no bottleneck"),
    "a factor that is no number": (options(reduction_factor=float("nan")), "makes no bottleneck"),
    "a bottleneck without bounds": (options(reduction_factor=1e-300), "makes no bottleneck"),
    "a rule without bounds": (options(phm_layer=True, phm_dim=2**40), "phm_dim=1099511627776"),
    "a rank without bounds": (options(phm_layer=True, phm_rank=2**40), "phm_rank=1099511627776"),
    "a dropout of everything": (options(dropout=1.0), "dropout=1.0: write a probability"),
    "an unknown activation": (options(non_linearity="os.system"), "activation='os.system' is unknown"),
    "no options": (meta(config=None), "'config' is None, not an object"),
    "another method": (meta(config={"architecture": "lora", "r": 8}), "no bottleneck but 'lora'"),
    # another model
    "another architecture": (meta(model_type="gpt2"), "made for a 'gpt2' model, and this is a 'bert'"),
    "another width": (meta(hidden_size=768), "hidden states of width 768, and this model has 32"),
    # names
    "no name": (meta(name=None), "calls the adapter None"),
    "a name that climbs": (meta(name="../up"), r"'\.\./up'"),
    "a name with a slash": (meta(name="a/b"), "'a/b'"),
    "a name with a backslash": (meta(name="a\\b"), r"'a\\\\b'"),
    "a name with a dot": (meta(name="a.b"), r"'a\.b'"),
    "an empty name": (meta(name=""), "Adapter name ''"),
    "a name of the model's own parts": (meta(name="encoder"), "'encoder' is also the name of a part of the model"),
}


def state(model):
    """All that loading an adapter could change."""
    hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks), m.training) for m in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    marks = (hasattr(model, "peft_config"), model._hf_peft_config_loaded)
    return [name for name, _ in model.named_modules()], hooks, trainable, marks, model.config.to_dict()


@pytest.mark.parametrize("name", SPOILT)
def test_a_bad_file_is_refused_and_the_model_is_as_it_was(name, tmp_path):
    spoil, words = SPOILT[name]
    folder = shutil.copytree(adapter(CASE), tmp_path / "adapter")
    spoil(folder)
    model = base_model(CASE)
    before, answer = state(model), output(model, CASE)

    with pytest.raises(AdapterError, match=words) as error:
        load_adapterhub(model, folder)

    assert not (folder / "was_run").exists()
    assert state(model) == before
    assert torch.equal(output(model, CASE), answer)
    assert str(error.value).count("\n") == 0


def test_the_exploit_would_run_if_it_were_let(tmp_path):
    exploit(WEIGHTS)(tmp_path)
    torch.load(tmp_path / WEIGHTS, weights_only=False)
    assert (tmp_path / "was_run").exists()


def test_a_name_that_is_loaded_already_is_refused():
    model = base_model(CASE)
    load_adapterhub(model, adapter(CASE))
    before, answer = state(model), output(model, CASE)

    with pytest.raises(AdapterError, match="'ref' is loaded already"):
        load_adapterhub(model, adapter(CASE))

    assert state(model) == before
    assert torch.equal(output(model, CASE), answer)


def test_a_deeper_models_adapter_is_refused(tmp_path):
    def add_a_layer(found):
        return found | {key.replace("layer.1.", "layer.2."): t for key, t in found.items() if "layer.1." in key}

    folder = shutil.copytree(adapter(CASE), tmp_path / "adapter")
    tensors(add_a_layer)(folder)

    with pytest.raises(AdapterError, match="4 tensors have no place in this model"):
        load_adapterhub(base_model(CASE), folder)


def test_a_write_that_fails_leaves_the_adapter_that_was_there(tmp_path, monkeypatch):
    def fail(source, target):  # the disk is full, say: there is no other way to have it so
        raise OSError("No space left on device")

    folder = shutil.copytree(adapter(CASE), tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = base_model(CASE)
    load_adapterhub(model, folder)
    monkeypatch.setattr(writing.os, "replace", fail)

    with pytest.raises(OSError, match="No space left"):
        save_adapterhub(model, folder, "ref")

    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_safetensors_are_preferred_to_a_pickle(tmp_path):
    folder = shutil.copytree(adapter(CASE), tmp_path / "adapter")
    safe(lambda data: data)(folder)
    exploit(WEIGHTS)(folder)

    load_adapterhub(base_model(CASE), folder)

    assert load_file(folder / "adapter.safetensors").keys() > set()
    assert not (folder / "was_run").exists()
