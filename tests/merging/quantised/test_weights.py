import numpy as np
import pytest
import torch

from compressed_modules import config_of, quantised
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.merging.quantised.weights import fingerprint_of_quantised
from quantised_checkpoints import (
    awq_module,
    compensated,
    fp8_module,
    gptq_module,
    quantised_checkpoint,
    read,
)

COMPRESSED = ["int8-channel", "int8-asymmetric", "fp8-channel", "fp8-tensor", "fp8-block"]
COMPRESSED += ["int4-group", "int4-asymmetric", "nvfp4", "mxfp4"]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8}
FP8 = {"quant_method": "fp8", "weight_block_size": [4, 8]}


def quantiser(form):
    """What quantises a weight, and the configuration."""
    rng = np.random.default_rng(0)
    by_hand = {"gptq": (gptq_module, GPTQ), "awq": (awq_module, AWQ), "fp8": (fp8_module, FP8)}
    if form == "gptq compensated":
        return lambda weight: compensated(rng, weight.numpy(), 8), GPTQ
    if form in by_hand:
        make, config = by_hand[form]
        return lambda w: make(rng, *w.shape, weight=w.numpy())[0], config
    _, scheme = quantised(form, torch.ones(32, 32))
    return lambda weight: quantised(form, weight)[0], config_of(scheme)


@pytest.mark.parametrize("form", [*COMPRESSED, "gptq", "gptq compensated", "fp8"])
def test_the_float_model_is_recognised_in_its_quantised_checkpoint(form, tiny_model, tmp_path):
    # The format of fp4 needs rows that 32 divides.
    model, stranger = (tiny_model("llama", seed=seed, intermediate_size=64) for seed in (0, 1))
    quantised_checkpoint(tmp_path, model, *quantiser(form))
    recorded, other = fingerprint_of_model(model), fingerprint_of_model(stranger)

    found = fingerprint_of_quantised(*read(tmp_path), recorded)

    assert found.entries.keys() == recorded.entries.keys()
    assert found.vectors.keys() == recorded.vectors.keys()
    assert recorded.difference(found) is None
    assert "holds" in other.difference(found)


def test_awq_is_recognised_by_what_lies_outside_of_its_layers(tiny_model, tmp_path):
    """Before it quantises, it moves factors between the weights of a layer and its norms."""
    model, stranger = (tiny_model("llama", seed=seed, intermediate_size=64) for seed in (0, 1))
    recorded, other = fingerprint_of_model(model), fingerprint_of_model(stranger)
    moved = torch.linspace(0.5, 2, 32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight /= moved
            for name in ("q_proj", "k_proj", "v_proj"):
                layer.self_attn.get_submodule(name).weight *= moved
    quantised_checkpoint(tmp_path, model, *quantiser("awq"))

    found = fingerprint_of_quantised(*read(tmp_path), recorded)

    assert {*found.entries, *found.vectors} == {"embed_tokens.weight", "norm.weight"}
    assert recorded.difference(found) is None
    assert "holds" in other.difference(found)


def test_a_bfloat16_models_fingerprint_is_that_of_its_quantised_form(tiny_model, tmp_path):
    model = tiny_model("llama", intermediate_size=64)
    quantised_checkpoint(tmp_path, model, *quantiser("int4-group"))

    recorded = fingerprint_of_model(model.to(torch.bfloat16))

    assert recorded.difference(fingerprint_of_quantised(*read(tmp_path), recorded)) is None


def test_the_other_norms_of_a_like_model_are_noticed(tiny_model, tmp_path):
    model = tiny_model("llama", intermediate_size=64)
    quantised_checkpoint(tmp_path, model, *quantiser("int4-group"))
    with torch.no_grad():
        model.model.norm.weight += 0.01

    recorded = fingerprint_of_model(model)

    assert "norm.weight" in recorded.difference(fingerprint_of_quantised(*read(tmp_path), recorded))


def test_without_names_to_compare_with_the_prefix_is_what_nearly_all_names_share(
    tiny_model, tmp_path
):
    model = tiny_model("llama", intermediate_size=64)
    quantised_checkpoint(tmp_path, model, *quantiser("int8-channel"))

    found = fingerprint_of_quantised(*read(tmp_path))

    assert found.entries.keys() == fingerprint_of_model(model).entries.keys()
    assert Fingerprint.from_json(found.to_json()) == found
