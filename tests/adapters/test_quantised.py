"""Adapters on a quantised base: identity, training, switching off, saving. Skipped without the packages (see
`optimizers` in pyproject.toml)."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, TorchAoConfig

from hf_freeze import BottleneckConfig
from hf_freeze.data import embedded_model_path

WHOLE = ["pooler", "classifier"]  # weights that no file holds can't be quantised: the head is new
IDS = torch.tensor([[101, 2739, 102]])


def torchao():
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=WHOLE)


def bitsandbytes():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=WHOLE)


def load(scheme):
    torch.manual_seed(0)
    folder = embedded_model_path()
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5, quantization_config=scheme).eval()


def answer(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["layer", "pfeiffer", "houlsby", "parallel"])
@pytest.mark.parametrize("scheme", [torchao, bitsandbytes])
def test_an_adapter_on_an_int8_base(scheme, placement, tmp_path):
    scheme = scheme()
    base = load(scheme)
    plain = answer(base)
    model = get_peft_model(base, BottleneckConfig(placement=placement, modules_to_save=["classifier"]))
    assert torch.equal(answer(model), plain)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # the second step reaches what the first could not, behind projections that start at zero
        model.train()(IDS, labels=torch.tensor([2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    trained = answer(model)
    assert not torch.equal(trained, plain)
    with model.disable_adapter():
        assert torch.equal(answer(model), plain)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(PeftModel.from_pretrained(load(scheme), tmp_path)), trained)
