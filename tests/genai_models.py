"""Tiny decoders that onnxruntime-genai's builder knows, and how to run its graphs.

Heads have 16 channels, which a CPU graph needs. Norms and biases are random.
"""

import copy

import numpy as np
import onnx_ir as ir
import torch
import transformers

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.runners.onnxruntime import onnxruntime_runner
from propulsion_export.scaling.attach import attached
from propulsion_export.scaling.layer_rules import layer_kind, output_width

VOCABULARY = 259
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 160,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LONG_CONTEXT = {"original_max_position_embeddings": 160}
_WHOLE = {"partial_rotary_factor": 1.0}


def _rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **more}}


_LLAMA3 = _rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
_GRANITE = {
    "attention_bias": True,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.3,
}
_HYBRID = _GRANITE | {
    "attention_bias": False,
    "layer_types": ["attention", "attention"],
    "num_local_experts": 0,
    "shared_intermediate_size": 96,
    "position_embedding_type": "rope",
}
_LONGROPE = _rope(
    "longrope",
    type="longrope",
    short_factor=[1 + index / 10 for index in range(8)],
    long_factor=[2 + index / 10 for index in range(8)],
)
_LFM2 = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
_LFM2_MOE = {
    "layer_types": ["conv", "full_attention"],
    "num_dense_layers": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 10}
# By name: the beginning of the names of the classes, and the settings.
MODELS = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3": ("Llama", _LLAMA3),
    "llama-dynamic": ("Llama", _rope("dynamic", factor=2.0)),
    "llama-linear": ("Llama", _rope("linear", factor=2.0)),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-windowed": ("Mistral", {"sliding_window": 10}),
    "qwen2": ("Qwen2", {}),
    "qwen2-windowed": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"attention_bias": True}),
    "phi": ("Phi", {"num_key_value_heads": 4, **_WHOLE}),
    "phi3": ("Phi3", _LONG_CONTEXT),
    "phi3-windowed": ("Phi3", {"sliding_window": 10, **_LONG_CONTEXT}),
    "phi3-longrope": ("Phi3", {"original_max_position_embeddings": 64, **_LONGROPE}),
    "gemma": ("Gemma", {"hidden_size": 80}),
    "gemma2": ("Gemma2", {"sliding_window": 10, "query_pre_attn_scalar": 16, "hidden_size": 80}),
    "granite": ("Granite", _GRANITE),
    "granite-hybrid": ("GraniteMoeHybrid", _HYBRID),
    "olmo": ("Olmo", {}),
    "nemotron": ("Nemotron", {"mlp_bias": True, "attention_bias": True, **_WHOLE}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 1]}),
    "ernie": ("Ernie4_5", {"use_bias": True}),
    "hunyuan": ("HunYuanDenseV1", {}),
    "lfm2": ("Lfm2", _LFM2),
    "lfm2-moe": ("Lfm2Moe", _LFM2_MOE),
    "gpt-oss": ("GptOss", _GPT_OSS),
}


def make(name, seed=0, **settings):
    """A seeded random model in evaluation mode."""
    prefix, own = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{prefix}Config")(**(SIZES | own | settings))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval().requires_grad_(False)


def base_of(model):
    """The model as a base model."""
    return BaseModel(model, "tiny", "text-generation", frozenset(), frozenset(), ())


def adapter_for(model, seed=1, only="", name=None):
    """A scale, one in eight negative, and a bias where there is one, for each module of a kind."""
    chooser = np.random.default_rng(seed)
    modules = {
        path: module
        for path, module in model.named_modules()
        if layer_kind(module) and only in path
    }
    scales = {}
    for path, module in modules.items():
        width = output_width(module)
        signs = np.where(np.arange(width) % 8 == seed % 8, -1, 1)
        scales[path] = Scale(signs * chooser.uniform(0.5, 1.5, width))
    biases = {
        path: module.bias.double().numpy() + chooser.normal(0, 0.2, module.bias.shape)
        for path, module in modules.items()
        if getattr(module, "bias", None) is not None
    }
    return Adapter(name=name or f"tuned{seed}", scales=scales, biases=biases)


def some_tokens(rows=1, length=24):
    """Random tokens, int64 [rows, length]; longer than the windows above."""
    return np.random.default_rng(0).integers(3, VOCABULARY, (rows, length))


def oracle(model, tokens, adapter=None):
    """The logits of PyTorch in float64, with an adapter attached as in training."""
    model = copy.deepcopy(model).double()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the others have no float64
    with attached(model, adapter or Adapter("none", scales={})), torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def decoded(program, tokens, directory, prompt=12, **extra):
    """The logits of a graph in ONNX Runtime: for a prompt, then one token at a time."""
    directory.mkdir(exist_ok=True)
    ir.save(program, directory / "model.onnx", external_data="model.onnx.data")
    run = onnxruntime_runner(directory / "model.onnx")
    names = [value.name for value in program.graph.inputs]
    sizes = {"batch": len(tokens)}
    cache = {
        value.name: np.zeros(
            [n if isinstance(n, int) else sizes.get(n.value, 0) for n in value.shape], np.float32
        )
        for value in program.graph.inputs
        if value.name.startswith("past")
    }
    logits, begin = [], 0
    for end in range(prompt, tokens.shape[1] + 1):
        feeds = {
            "input_ids": tokens[:, begin:end],
            "attention_mask": np.ones((len(tokens), end), np.int64),
            "position_ids": np.tile(np.arange(begin, end), (len(tokens), 1)),
        }
        found = run({k: v for k, v in (feeds | cache | extra).items() if k in names})
        logits.append(found["logits"])
        cache = {name: found[f"present.{name.split('.', 1)[1]}"] for name in cache}
        begin = end
    return np.concatenate(logits, axis=1)


def distance(found, expected):
    """The largest error relative to the largest expected number."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
