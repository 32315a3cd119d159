"""The architectures that are read from GGUF files: what each key of the metadata sets.

The keys are llama.cpp's (gguf-py/gguf/constants.py), the settings transformers'. What llama.cpp
computes without a key for it is in `fixed`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_HEAD = {"attention.key_length": "head_dim"}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_ATTENTION = {"attn_q.bias": "attention_bias"}


@dataclass(frozen=True)
class Architecture:
    """How one architecture is read.

    Attributes:
        model_type: transformers' name of it.
        keys: the setting that each metadata key gives, by the key without the architecture's name.
        switches: settings that are true if and only if the first layer has this tensor.
        fixed: settings that no key gives.
        rotary: whether positions are rotary embeddings.
        partial: whether only a share of each head may be rotated.
    """

    model_type: str
    keys: Mapping[str, str]
    switches: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rotary: bool = True
    partial: bool = False


_MIXTRAL = Architecture(
    "mixtral",
    _SIZES
    | _RMS
    | _HEAD
    | {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    fixed={"sliding_window": None},
)
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", _SIZES | _RMS | _HEAD, _ATTENTION | {"ffn_up.bias": "mlp_bias"}),
    "qwen2": Architecture("qwen2", _SIZES | _RMS),
    "qwen3": Architecture("qwen3", _SIZES | _RMS | _HEAD, _ATTENTION),
    "qwen2moe": Architecture(
        "qwen2_moe",
        _SIZES
        | _RMS
        | _EXPERTS
        | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        {"attn_q.bias": "qkv_bias"},
        {"norm_topk_prob": False},
    ),
    "qwen3moe": Architecture(
        "qwen3_moe", _SIZES | _RMS | _HEAD | _EXPERTS, _ATTENTION, {"norm_topk_prob": True}
    ),
    "phi3": Architecture(
        "phi3",
        _SIZES
        | _RMS
        | _WINDOW
        | {"rope.scaling.original_context_length": "original_max_position_embeddings"},
        fixed={"sliding_window": None},
        partial=True,
    ),
    "gemma2": Architecture("gemma2", _SIZES | _RMS | _HEAD | _WINDOW | _SOFTCAPS, _ATTENTION),
    "gemma3": Architecture(
        "gemma3_text",
        _SIZES | _RMS | _HEAD | _WINDOW | _SOFTCAPS,
        _ATTENTION,
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "stablelm": Architecture(
        "stablelm",
        _SIZES
        | {
            "attention.layer_norm_epsilon": "layer_norm_eps",
            "use_parallel_residual": "use_parallel_residual",
        },
        {"attn_q.bias": "use_qkv_bias"},
        partial=True,
    ),
    "starcoder2": Architecture(
        "starcoder2",
        _SIZES | _WINDOW | {"attention.layer_norm_epsilon": "norm_epsilon"},
        {"attn_q.bias": "use_bias"},
        {"sliding_window": None},
    ),
    "nemotron": Architecture(
        "nemotron",
        _SIZES | _HEAD | {"attention.layer_norm_epsilon": "norm_eps"},
        _ATTENTION | {"ffn_up.bias": "mlp_bias"},
        partial=True,
    ),
    "falcon": Architecture(
        "falcon",
        _SIZES
        | {
            "attention.head_count_kv": "num_kv_heads",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "feed_forward_length": "ffn_hidden_size",
        },
        {"attn_qkv.bias": "bias", "attn_norm_2.weight": "new_decoder_architecture"},
        {"alibi": False, "parallel_attn": True, "multi_query": True},
    ),
    "bloom": Architecture(
        "bloom",
        {
            "block_count": "n_layer",
            "embedding_length": "hidden_size",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "context_length": "seq_length",
        },
        rotary=False,
    ),
    "gpt2": Architecture(
        "gpt2",
        {
            "block_count": "n_layer",
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        rotary=False,
    ),
}


def architecture_of(name: str, *, experts: bool) -> Architecture | None:
    """How an architecture is read; None for one that is not.

    Args:
        name: llama.cpp's name of it.
        experts: whether the file has a mixture of experts; llama.cpp calls a Mixtral `llama` too.
    """
    return _MIXTRAL if experts and name == "llama" else ARCHITECTURES.get(name)
