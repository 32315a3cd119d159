"""read(merge(file)) is fold(read(file)), for every architecture that is read, and every type."""

import numpy as np
import pytest
import torch
from gguf_files import CONVERTED
from merged_gguf import folded, toy, weights

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.errors import BaseModelError
from propulsion_export.pipeline.merge_gguf import merge_gguf

SETTINGS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "nemotron": {"attention_bias": True, "mlp_bias": True},
    "stablelm": {"use_qkv_bias": True},
    "falcon": {"bias": True},
    "qwen3": {"attention_bias": True},
}
MORE = {
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "llama-head-size": ("llama", {"head_dim": 24}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
}
KINDS = {kind: (kind, SETTINGS.get(kind, {})) for kind in CONVERTED} | MORE
# What one rounding moves a number, of its magnitude; two for a scale and a minimum.
ROUNDING = {None: 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 2.0**-11}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
TYPES += ["IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"]
TYPES += ["TQ1_0", "TQ2_0"]


@pytest.mark.parametrize("quantisation", ROUNDING)
@pytest.mark.parametrize("name", KINDS)
def test_a_merged_file_is_the_folded_model(name, quantisation, every_module, saved, tmp_path):
    kind, settings = KINDS[name]
    file, model = toy(tmp_path, kind, quantisation, **settings)
    adapter = saved(every_module(model))

    merged = weights(merge_gguf(adapter, tmp_path / "merged.gguf", model=str(file)))

    expected, before = folded(file, Adapter.read(adapter)), weights(file)
    assert merged.keys() == expected.keys()
    for tensor, values in expected.items():
        added = 1 if kind in ("gemma2", "gemma3_text", "nemotron") and "norm" in tensor else 0
        rounding = ROUNDING[quantisation]
        allowed = rounding * 1.001 * (values + added).abs() + bool(rounding) * 2.0**-24
        assert ((merged[tensor] - values).abs() <= allowed + 2e-7 * added).all(), tensor
    assert any(not torch.equal(merged[tensor], before[tensor]) for tensor in before)


@pytest.mark.parametrize("kind", ["llama", "bloom", "falcon"])
def test_factors_in_another_order_are_not_the_folded_model(kind, every_module, saved, tmp_path):
    """The rows of q and k, or of q, k and v together, lie in another order in the file."""
    file, model = toy(tmp_path, kind)
    adapter = every_module(model)
    wrong = {
        path: Scale(np.roll(scale.values, 1)) if "q" in path.rpartition(".")[2] else scale
        for path, scale in adapter.scales.items()
    }
    directory = saved(Adapter("wrong", wrong))

    merged = weights(merge_gguf(directory, tmp_path / "merged.gguf", model=str(file)))

    expected = folded(file, adapter)
    assert any(not torch.allclose(merged[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "mixtral"])
def test_embeddings_and_inputs_are_scaled_in_float_files(kind, random_adapter, saved, tmp_path):
    file, model = toy(tmp_path, kind, "F16", tie_word_embeddings=False)
    adapter = saved(random_adapter(model))
    assert any("emb" in path or "wte" in path for path in Adapter.read(adapter).scales)

    merged = weights(merge_gguf(adapter, tmp_path / "merged.gguf", model=str(file)))

    for name, values in folded(file, Adapter.read(adapter)).items():
        assert ((merged[name] - values).abs() <= 2.0**-11 * 1.001 * values.abs() + 2.0**-25).all()


def test_a_scale_along_the_rows_of_quantised_blocks_is_refused(random_adapter, saved, tmp_path):
    file, model = toy(tmp_path, "llama", "Q8_0")
    adapter = saved(random_adapter(model))

    with pytest.raises(BaseModelError, match=r"token_embd.weight is quantised \(Q8_0\).*F16 or F3"):
        merge_gguf(adapter, tmp_path / "merged.gguf", model=str(file))

    assert not (tmp_path / "merged.gguf").exists()


@pytest.mark.parametrize("kind", TYPES)
def test_a_file_of_every_type_is_the_folded_model(kind, every_module, saved, tmp_path):
    file, model = toy(tmp_path, "llama", kind, **WIDE)
    adapter = saved(every_module(model))

    merged = weights(merge_gguf(adapter, tmp_path / "merged.gguf", model=str(file)))

    for name, values in folded(file, Adapter.read(adapter)).items():
        largest = values.abs().amax(-1, keepdim=True)
        assert ((merged[name] - values).abs() <= 1.5e-3 * largest).all(), name


@pytest.mark.parametrize("kind", ["MXFP4", "NVFP4"])
@pytest.mark.parametrize("factor", [2.0, 1.1])
def test_small_floats_take_exact_factors_only(kind, factor, saved, tmp_path):
    file, _ = toy(tmp_path, "llama", kind, intermediate_size=128)
    scales = {"model.layers.0.mlp.up_proj": Scale(np.full(128, factor))}
    adapter = saved(Adapter("double", scales))

    if factor == 2:
        merged = weights(merge_gguf(adapter, tmp_path / "merged.gguf", model=str(file)))
        expected = folded(file, Adapter.read(adapter))
        assert all(torch.equal(merged[name], expected[name]) for name in expected)
    else:
        with pytest.raises(Exception, match=rf"blk.0.ffn_up.weight, channel 0, .*that {kind} has"):
            merge_gguf(adapter, tmp_path / "merged.gguf", model=str(file))
