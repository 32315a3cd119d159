"""Each kind of GGUF file against the PyTorch model it was written from, or refused by name."""

import pytest
import torch
from gguf_files import tiny_language_model, write_gguf

from propulsion_export.base_model.loading import load_base
from propulsion_export.errors import BaseModelError

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 50_000.0, "factor": 3.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + 0.1 * index for index in range(8)],
    "long_factor": [2.0 + 0.5 * index for index in range(8)],
    "original_max_position_embeddings": 32,
}


def partial(share):
    return {"rope_type": "default", "rope_theta": 20_000.0, "partial_rotary_factor": share}


RIGHT = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-size": ("llama", {"head_dim": 24}),
    "llama-3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama-3.1-other-ramp": (
        "llama",
        {"rope_parameters": LLAMA3 | {"low_freq_factor": 1.5, "high_freq_factor": 5.0}},
    ),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-linear": ("qwen2", {"rope_parameters": LINEAR}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "qwen2-moe": ("qwen2_moe", {}),
    "qwen3-moe": ("qwen3_moe", {}),
    "phi3": ("phi3", {}),
    "phi3-longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 32}),
    "phi3-partial": ("phi3", {"rope_parameters": partial(0.75)}),
    "phi3-window": ("phi3", {"sliding_window": 8}),
    "gemma2": ("gemma2", {}),
    "gemma2-softcaps": (
        "gemma2",
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 7}),
    "gemma3-linear": (
        "gemma3_text",
        {
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 3_000.0},
            },
        },
    ),
    "stablelm": ("stablelm", {"rope_parameters": partial(0.25)}),
    "stablelm-whole-heads": ("stablelm", {"rope_parameters": partial(1.0)}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    "starcoder2": ("starcoder2", {"rope_parameters": partial(1.0), "norm_epsilon": 1e-3}),
    "nemotron": ("nemotron", {"rope_parameters": partial(0.5)}),
    "nemotron-biases": ("nemotron", {"attention_bias": True, "mlp_bias": True}),
    "falcon-7b": ("falcon", {"layer_norm_epsilon": 1e-2}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "bloom": ("bloom", {}),
    "gpt2": ("gpt2", {}),
}


def logits(model, length=48):
    tokens = torch.arange(2 * length).reshape(2, length) * 7 % 300
    model.set_experts_implementation("eager")  # the other has no float64
    with torch.no_grad():
        return model.double()(tokens).logits


@pytest.mark.parametrize("name", RIGHT)
def test_a_file_computes_what_its_model_does(name, tmp_path):
    kind, settings = RIGHT[name]
    model = tiny_language_model(kind, **settings)
    file = write_gguf(tmp_path / "model.gguf", model)

    loaded = load_base(str(file), task="text-generation")

    expected, found = logits(model), logits(loaded.model)
    assert not loaded.missing
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_short_texts_of_a_longrope_have_their_own_factors(tmp_path):
    kind, settings = RIGHT["phi3-longrope"]
    model = tiny_language_model(kind, **settings)
    file = write_gguf(tmp_path / "model.gguf", model)

    loaded = load_base(str(file), task="text-generation")

    expected, found = logits(model, 20), logits(loaded.model, 20)
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


REFUSED = {
    "unknown-architecture": (
        {"general.architecture": "cohere"},
        {},
        r"is of the architecture cohere, expected one of llama, ",
    ),
    "window": (
        {"llama.attention.sliding_window": 16},
        {},
        r"sliding_window is 16, which the llama",
    ),
    "end-beyond": (
        {"tokenizer.ggml.eos_token_id": 100_000},
        {},
        r"tokenizer.ggml.eos_token_id is 100000, expected a number below",
    ),
    "scale": ({"llama.residual_scale": 0.5}, {}, r"llama.residual_scale is 0.5"),
    "not-causal": ({"llama.attention.causal": False}, {}, r"llama.attention.causal is False"),
    "unknown-key": ({"llama.attention.something": 3}, {}, r"llama.attention.something is 3"),
    "share-of-a-head": (
        {"llama.rope.dimension_count": 8},
        {},
        r"dimension_count is 8, expected 16",
    ),
    "values-otherwise": (
        {"llama.attention.value_length": 8},
        {},
        r"llama.attention.value_length is 8",
    ),
    "yarn-ramp": (
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_log_multiplier": 0.1},
        {},
        r"yarn_log_multiplier is 0.1",
    ),
    "scaling-unknown": (
        {"llama.rope.scaling.type": "dynamic"},
        {},
        r"rope.scaling.type is 'dynamic', expected one of none, linear, yarn",
    ),
    "one-set-of-factors": (
        {},
        {"rope_factors_long.weight": [2.0] * 8},
        r"has one of rope_factors_short.weight and rope_factors_long.weight",
    ),
    "too-few-factors": ({}, {"rope_freqs.weight": [2.0] * 4}, r"has 4 numbers, expected 8"),
    "t5": ({"general.architecture": "t5"}, {}, r"is of the architecture t5"),
    "no-layers": ({"llama.block_count": None}, {}, r"has no llama.block_count"),
    "more-layers": ({"llama.block_count": 3}, {}, r"no tensor for model.layers.2"),
    "fewer-layers": ({"llama.block_count": 1}, {}, r"has the tensor blk.1."),
    "other-width": ({"llama.feed_forward_length": 80}, {}, r"expected \[80, 64\] by its metadata"),
    "layers-that-differ": (
        {"llama.attention.head_count_kv": [2, 1]},
        {},
        r"head_count_kv is \[2, 1\], expected one value for all layers",
    ),
    "tensor-too-many": (
        {},
        {"blk.0.attn_q_norm.weight": [1.0] * 16, "blk.1.attn_q_norm.weight": [1.0] * 16},
        r"has the tensor blk.0.attn_q_norm.weight, which the model of transformers has no place",
    ),
    "tensor-missing": ({}, {"blk.1.ffn_up.weight": None}, r"no tensor for model.layers.1.mlp.up"),
    "no-embedding": ({}, {"token_embd.weight": None}, r"has no tensor token_embd.weight"),
}


LOST = {
    "llama-3.1": ({}, {"rope_freqs.weight": None}),
    "llama-linear": ({"llama.rope.scaling.factor": 1.0}, {}),
    "llama-yarn": ({"llama.rope.scaling.type": "none"}, {}),
    "llama-biases": ({}, {"blk.0.attn_output.bias": None}),
    "phi3-longrope": ({}, {"rope_factors_long.weight": [1.0] * 8}),
    "phi3-partial": ({"phi3.rope.dimension_count": 16}, {}),
    "phi3-window": ({"phi3.attention.sliding_window": 0}, {}),
    "gemma2-softcaps": ({"gemma2.attn_logit_softcapping": None}, {}),
    "gemma3-linear": ({"gemma3.rope.scaling.factor": 1.0}, {}),
    "stablelm": ({"stablelm.rope.dimension_count": 16}, {}),
    "starcoder2": ({"starcoder2.rope.freq_base": None}, {}),
    "nemotron": ({"nemotron.rope.dimension_count": 16}, {}),
    "falcon-7b": ({"falcon.attention.layer_norm_epsilon": 1e-5}, {}),
}


@pytest.mark.parametrize("name", LOST)
def test_the_comparison_sees_what_is_lost(name, tmp_path):
    kind, settings = RIGHT[name]
    keys, tensors = LOST[name]
    model = tiny_language_model(kind, **settings)
    file = write_gguf(tmp_path / "model.gguf", model, keys=keys, tensors=tensors)

    loaded = load_base(str(file), task="text-generation")

    expected, found = logits(model), logits(loaded.model)
    assert (found - expected).abs().max() > 1e-3 * expected.abs().max()


def test_a_bias_that_the_file_leaves_out_is_zero(tmp_path):
    model = tiny_language_model("llama", attention_bias=True)
    without = {f"blk.{layer}.attn_output.bias": None for layer in (0, 1)}
    file = write_gguf(tmp_path / "model.gguf", model, tensors=without)
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias.data.zero_()

    loaded = load_base(str(file), task="text-generation")

    expected, found = logits(model), logits(loaded.model)
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_says_something_else_is_refused(name, tmp_path):
    keys, tensors, message = REFUSED[name]
    model = tiny_language_model("llama")
    file = write_gguf(tmp_path / "model.gguf", model, keys=keys, tensors=tensors)

    with pytest.raises(BaseModelError, match=message):
        load_base(str(file), task="text-generation")


def test_norms_of_q_and_k_of_a_stablelm_are_refused(tmp_path):
    model = tiny_language_model("stablelm")
    norm = {f"blk.{layer}.attn_q_norm.weight": [[1.0] * 16] * 4 for layer in (0, 1)}
    file = write_gguf(tmp_path / "model.gguf", model, tensors=norm)

    with pytest.raises(BaseModelError, match=r"has the tensor blk.0.attn_q_norm.weight"):
        load_base(str(file), task="text-generation")
