"""Merged checkpoints in plain transformers, against the base with the scales attached."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from compressed_modules import config_of, quantised
from propulsion_export.scaling.attach import attached
from quantised_checkpoints import fp8_module, merge_into, quantised_checkpoint

IDS = torch.arange(1, 21).reshape(2, 10)
FORMS = [
    "int8-channel",
    "int8-tensor",
    "int8-group",
    "fp8-channel",
    "fp8-tensor",
    "fp8-block",
    "int4-group",
    "int4-channel",
]
FP8 = {"quant_method": "fp8", "weight_block_size": [4, 8], "modules_to_not_convert": ["lm_head"]}


@pytest.fixture
def llama(tiny_model):
    return tiny_model("llama", intermediate_size=64)


def checkpoint(directory, model, form):
    directory.mkdir()
    if form == "fp8":
        rng = np.random.default_rng(0)
        quantised_checkpoint(directory, model, lambda w: fp8_module(rng, *w.shape)[0], FP8)
        return
    _, scheme = quantised(form, torch.ones(16, 16))
    quantised_checkpoint(directory, model, lambda w: quantised(form, w)[0], config_of(scheme))


def logits(model, adapter=None):
    with torch.no_grad():
        if adapter is None:
            return model(IDS).logits
        with attached(model, adapter):
            return model(IDS).logits


def loaded(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()


# transformers warns that of the configuration given only `dequantize` is used, which is the point.
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("form", FORMS)
def test_it_computes_what_the_base_computes_with_its_scales_attached(
    form, llama, random_adapter, tmp_path
):
    checkpoint(tmp_path / "base", llama, form)
    adapter = random_adapter(llama)
    (tmp_path / "out").mkdir()

    merge_into(tmp_path / "base", adapter, tmp_path / "out")

    expected = logits(loaded(tmp_path / "base"), adapter)
    without = logits(loaded(tmp_path / "base"))
    for options in ({}, {"quantization_config": CompressedTensorsConfig(dequantize=True)}):
        found = logits(loaded(tmp_path / "out", **options))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (found - without).abs().max() > 0.1


def test_fine_grained_fp8_loads_everywhere_and_computes_the_same(llama, random_adapter, tmp_path):
    checkpoint(tmp_path / "base", llama, "fp8")
    adapter = random_adapter(llama)
    (tmp_path / "out").mkdir()

    merge_into(tmp_path / "base", adapter, tmp_path / "out")

    expected = logits(loaded(tmp_path / "base"), adapter)
    found = logits(loaded(tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - logits(loaded(tmp_path / "base"))).abs().max() > 0.1


def test_another_adapter_is_told_apart(llama, random_adapter, tmp_path):
    """The tolerance above would not let a wrong merge pass."""
    checkpoint(tmp_path / "base", llama, "int4-group")
    (tmp_path / "out").mkdir()

    merge_into(tmp_path / "base", random_adapter(llama, seed=2), tmp_path / "out")

    expected = logits(loaded(tmp_path / "base"), random_adapter(llama, seed=1))
    assert (logits(loaded(tmp_path / "out")) - expected).abs().max() > 0.1
