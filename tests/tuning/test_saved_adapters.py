"""An adapter that is saved comes back, into its own base model only."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.errors import BaseModelError
from propulsion_export.tuning import PropulsionConfig

from . import FROM_PEFT, IDS, layers, logits, randomize, tiny_bert, tiny_gpt2, tiny_llama, tuned
from .models import CLOSE, outputs

pytestmark = pytest.mark.filterwarnings(FROM_PEFT)


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama, tiny_gpt2])
def test_saved_adapter_comes_back_bit_for_bit(build, tmp_path):
    peft_model = tuned(build(), train_bias=True)
    peft_model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(build(), tmp_path).eval()

    assert outputs(loaded).equal(outputs(peft_model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_saved_adapter_holds_its_own_tensors_only(tmp_path):
    peft_model = tuned(tiny_llama().bfloat16(), task_type="CAUSAL_LM")
    peft_model.save_pretrained(tmp_path)

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())

    assert "base_model.model.model.layers.0.self_attn.q_proj.propulsion_z" in tensors
    assert {name.rpartition(".")[2] for name in tensors} == {"propulsion_z"}
    assert {values.dtype for values in tensors.values()} == {torch.float32}
    assert all(values.ndim == 1 for values in tensors.values())
    assert config["peft_type"] == "PROPULSION"
    assert config["target_modules"] == "all"
    assert config["base_fingerprint"]["entries"]


def test_saved_adapter_is_what_the_exporter_reads(tmp_path):
    peft_model = tuned(tiny_bert(), degree=3, train_bias=True, task_type="SEQ_CLS")
    peft_model.save_pretrained(tmp_path)

    adapter = Adapter.read(tmp_path)

    prefix = "base_model.model."
    for path, layer in layers(peft_model).items():
        z = layer.propulsion_z["default"].detach().double()
        scale = torch.from_numpy(adapter.scales[path.removeprefix(prefix)].values)
        torch.testing.assert_close(scale, z**3, rtol=1e-14, atol=0)
        if layer.propulsion_bias:
            bias = torch.from_numpy(adapter.biases[path.removeprefix(prefix)])
            assert bias.equal(layer.propulsion_bias["default"])
    assert set(adapter.modules) == {"classifier.weight", "classifier.bias"}
    assert adapter.fingerprint is not None


def test_adapter_that_the_exporter_writes_is_what_peft_reads(tmp_path):
    peft_model = tuned(tiny_llama())
    peft_model.save_pretrained(tmp_path)
    (tmp_path / "copy").mkdir()
    Adapter.read(tmp_path).write(tmp_path / "copy")

    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "copy").eval()

    torch.testing.assert_close(outputs(loaded), outputs(peft_model), **CLOSE)
    assert not torch.allclose(outputs(loaded), outputs(tiny_llama()), **CLOSE)


def test_tied_embedding_as_a_module_to_save_still_warns():
    with pytest.warns(UserWarning, match="a tied layer is part of the adapter"):
        get_peft_model(tiny_llama(), PropulsionConfig(modules_to_save=["embed_tokens"]))


def test_adapter_can_be_injected_without_peft_model():
    model = tiny_bert()
    before = logits(model)
    injected = inject_adapter_in_model(PropulsionConfig(target_modules="attention"), model)
    randomize(injected)

    assert len(layers(injected)) == 6
    assert not logits(injected).equal(before)


def test_trained_head_comes_back_with_the_adapter(tmp_path):
    peft_model = tuned(tiny_bert(), task_type="SEQ_CLS")
    head = peft_model.get_base_model().classifier.modules_to_save["default"]
    nn.init.normal_(head.weight)
    peft_model.save_pretrained(tmp_path)
    base = tiny_bert()
    nn.init.normal_(base.classifier.weight)  # what a load makes up is replaced

    loaded = PeftModel.from_pretrained(base, tmp_path).eval()

    assert logits(loaded).equal(logits(peft_model))


def test_adapter_loads_without_allocating_it_twice(tmp_path):
    peft_model = tuned(tiny_bert().bfloat16(), train_bias=True)
    peft_model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(
        tiny_bert().bfloat16(), tmp_path, low_cpu_mem_usage=True, autocast_adapter_dtype=False
    ).eval()

    assert logits(loaded).equal(logits(peft_model))
    assert all(
        layer.propulsion_z["default"].dtype == torch.float32 for layer in layers(loaded).values()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapter_loads_onto_its_base_in_half_precision(dtype, tmp_path):
    tuned(tiny_bert()).save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(tiny_bert().to(dtype), tmp_path).eval()

    assert logits(loaded).dtype == dtype


def further(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(input_ids=IDS).logits.square().mean().backward()
    optimizer.step()
    return model


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: tiny_bert(seed=1), id="same-shape"),
        pytest.param(lambda: further(tiny_bert()), id="trained-a-step-further"),
    ],
)
def test_adapter_of_another_base_is_refused(other, tmp_path):
    tuned(tiny_bert()).save_pretrained(tmp_path)
    model = other()

    with pytest.raises(BaseModelError, match="belongs to another base model"):
        PeftModel.from_pretrained(model, tmp_path)
    assert not layers(model)


def test_second_adapter_of_another_base_is_refused_and_leaves_the_first(tmp_path):
    tuned(tiny_bert(seed=1)).save_pretrained(tmp_path)
    peft_model = tuned(tiny_bert())
    before = logits(peft_model)

    with pytest.raises(BaseModelError, match="belongs to another base model"):
        peft_model.load_adapter(tmp_path, "second")

    assert list(peft_model.peft_config) == ["default"]
    assert logits(peft_model).equal(before)
