"""Merges into quantised checkpoints, by the command, as plain transformers loads them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compressed_modules import config_of, quantised
from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.errors import BaseModelError, UsageError
from propulsion_export.pipeline import merge as pipeline
from propulsion_export.pipeline import merge_by_model
from propulsion_export.pipeline.merge import merge
from propulsion_export.scaling.attach import attached
from quantised_checkpoints import (
    fp8_module,
    gptq_dequantised,
    gptq_module,
    of_module,
    quantised_checkpoint,
    save,
)

IDS = torch.arange(1, 21).reshape(2, 10)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8}


@pytest.fixture
def base_of(tiny_model, tmp_path):
    """Write a quantised Llama; returns its directory and the float model."""

    def make(form, seed=0, settings=None, **config):
        model = tiny_model("llama", seed=seed, intermediate_size=64, **config)
        directory = tmp_path / f"{form}-{seed}"
        directory.mkdir()
        rng = np.random.default_rng(0)
        if form == "gptq":
            make_module, found = gptq_module, GPTQ
        elif form == "fp8":
            make_module, found = fp8_module, {"quant_method": "fp8", "weight_block_size": [4, 8]}
        else:
            found = config_of(quantised(form, torch.ones(32, 32))[1])
        by_hand = form in ("gptq", "fp8")
        quantised_checkpoint(
            directory,
            model,
            lambda weight: (
                make_module(rng, *weight.shape, weight=weight.numpy())[0]
                if by_hand
                else quantised(form, weight)[0]
            ),
            {**found, **(settings or {})},
        )
        return directory, model

    return make


@pytest.fixture
def folded(tmp_path):
    """Fold an adapter into a base model, by the command."""

    def run(adapter, base, name="out", **options):
        (tmp_path / f"{name}-adapter").mkdir()
        adapter.write(tmp_path / f"{name}-adapter")
        output = tmp_path / name
        merge(
            tmp_path / f"{name}-adapter",
            output,
            model=str(base),
            task="text-generation",
            **options,
        )
        return output

    return run


def logits(directory, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        if adapter is None:
            return model(IDS).logits
        with attached(model, adapter):
            return model(IDS).logits


@pytest.mark.parametrize("form", ["int8-channel", "int4-group", "fp8-tensor", "fp8-block", "fp8"])
@pytest.mark.parametrize("shards", [None, "10KB"])
def test_plain_transformers_computes_with_it_as_with_the_scales_attached(
    form, shards, base_of, folded, random_adapter
):
    base, model = base_of(form)
    adapter = replace(random_adapter(model), fingerprint=fingerprint_of_model(model))

    output = folded(adapter, base, max_shard_size=shards)

    expected = logits(base, adapter)
    torch.testing.assert_close(logits(output), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(base)).abs().max() > 0.1
    assert (output / "model.safetensors.index.json").is_file() == (shards is not None)


def test_integers_and_what_is_not_scaled_stay_byte_for_byte(base_of, folded, random_adapter):
    base, model = base_of("gptq")
    adapter = random_adapter(model, embeddings=False, only="layers.0")

    output = folded(adapter, base)

    before, after = (load_file(each / "model.safetensors") for each in (base, output))
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{path}.scales" for path in adapter.scales}
    for path, scale in adapter.scales.items():
        weights = [gptq_dequantised(of_module(path, each), 4) for each in (before, after)]
        np.testing.assert_allclose(weights[1], weights[0] * scale.values[:, None], rtol=2**-11)
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"] == GPTQ


@pytest.mark.parametrize("form", ["int4-group", "fp8", "gptq"])
def test_names_alone_prepare_what_the_model_without_weights_does(
    form, base_of, folded, random_adapter, monkeypatch
):
    base, model = base_of(form)
    (base / "generation_config.json").write_text("{}")
    adapter = replace(random_adapter(model), fingerprint=fingerprint_of_model(model))
    asked = []
    monkeypatch.setattr(merge_by_model, "prepare_by_model", asked.append)
    by_names = folded(adapter, base, "fast")
    monkeypatch.undo()
    monkeypatch.setattr(pipeline, "prepare_by_names", lambda request: None)

    by_model = folded(adapter, base, "slow")

    assert asked == []
    files = [each / "model.safetensors" for each in (by_names, by_model)]
    assert files[0].read_bytes() == files[1].read_bytes()
    both = [json.loads((each / "config.json").read_text()) for each in (by_names, by_model)]
    assert both[0]["quantization_config"] == both[1]["quantization_config"]
    assert both[0]["dtype"] == both[1]["dtype"] == "float32"


def test_another_model_is_refused(base_of, folded, random_adapter):
    base, _ = base_of("int4-group")
    _, stranger = base_of("int8-channel", seed=1)
    adapter = replace(random_adapter(stranger), fingerprint=fingerprint_of_model(stranger))

    with pytest.raises(BaseModelError, match="is not the base model of adapter"):
        folded(adapter, base)


def test_a_merge_of_a_merge_is_refused(base_of, folded, random_adapter):
    base, model = base_of("int4-group")
    output = folded(random_adapter(model), base)

    with pytest.raises(BaseModelError, match="holds the adapter"):
        folded(random_adapter(model), output, "again")


@pytest.mark.parametrize("method", ["hqq", "quanto", "higgs"])
def test_a_method_without_a_layout_is_refused_by_name(method, base_of, folded, random_adapter):
    base, model = base_of("int4-group", settings={"quant_method": method})

    with pytest.raises(BaseModelError) as refused:
        folded(random_adapter(model), base)

    assert f"quantised by {method}, expected one of compressed-tensors, gptq" in str(refused.value)
    assert str(refused.value).startswith(str(base))


def test_another_dtype_is_refused(base_of, folded, random_adapter):
    base, model = base_of("int4-group")

    with pytest.raises(UsageError, match=r"--dtype float16: .* is quantised, expected keep"):
        folded(random_adapter(model), base, dtype="float16")


@pytest.mark.parametrize("ignored", [["lm_head"], []])
def test_a_scaled_embedding_that_the_head_shares_is_untied_when_asked(
    ignored, base_of, folded, random_adapter
):
    base, model = base_of("int8-channel", settings={"ignore": ignored}, tie_word_embeddings=True)
    adapter = random_adapter(model, only="embed_tokens", tied=True)

    with pytest.raises(BaseModelError, match=r"shares its weight with lm_head.*adds 0.0 MiB"):
        folded(adapter, base, "refused")
    output = folded(adapter, base, untie=True)

    config = json.loads((output / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    after = load_file(output / "model.safetensors")
    own = model.model.embed_tokens.weight
    scale = torch.from_numpy(adapter.scales["model.embed_tokens"].values)
    assert torch.equal(after["lm_head.weight"], own)
    torch.testing.assert_close(after["model.embed_tokens.weight"], (own * scale).float())
    assert logits(output).isfinite().all()


def test_square_layers_and_norms_that_are_not_quantised_are_scaled_by_their_class(base_of, folded):
    base, model = base_of("int8-channel")
    state = load_file(base / "model.safetensors")
    path = "model.layers.0.self_attn.o_proj"  # 32 x 32
    own = {name: value for name, value in state.items() if not name.startswith(path)}
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["lm_head", path]
    weight = model.get_submodule(path).weight
    save(base, {**own, f"{path}.weight": weight}, config)
    scale = Scale(np.linspace(-2, 2, 32).astype(np.float32).astype(np.float64))
    adapter = Adapter("tuned", {path: scale, "model.norm": scale})

    after = load_file(folded(adapter, base) / "model.safetensors")

    factors = torch.from_numpy(scale.values)
    expected = (weight.double() * factors[:, None]).float()
    assert torch.equal(after[f"{path}.weight"], expected)
    norm = (model.model.norm.weight.double() * factors).float()
    assert torch.equal(after["model.norm.weight"], norm)
