"""Write tiny models as GGUF files, as llama.cpp's converter does.

`write_gguf(file, model)` takes a transformers model of one of `CONVERTED` and writes its metadata,
its tensors and a tokenizer. What a test wants otherwise it gives as `keys` (None drops a key) and
`tensors` (None drops a tensor). Follows the layout of the converter (`conversion/` of
ggml-org/llama.cpp), not from the code under test.
"""

import math

import gguf
import numpy as np
import torch
import transformers

VOCABULARY = 300
_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
_TOKENS = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_EXPERTS = {"num_experts_per_tok": 2, "decoder_sparse_step": 1}
_OWN = {
    "qwen2_moe": {
        **_EXPERTS,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 96,
    },
    "qwen3_moe": {
        **_EXPERTS,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "head_dim": 24,
        "norm_topk_prob": True,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 16},
    "gemma3_text": {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 16},
    "qwen3": {"head_dim": 24},
    "falcon": {"ffn_hidden_size": 96},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 96},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
}
# llama.cpp's name of each of transformers' types.
CONVERTED = {
    "llama": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "phi3": "phi3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
    "nemotron": "nemotron",
    "falcon": "falcon",
    "bloom": "bloom",
    "gpt2": "gpt2",
}
_PERMUTED = ("llama", "mixtral")
_ONE_MORE = ("gemma2", "gemma3_text", "nemotron")


def tiny_language_model(kind, seed=0, **settings):
    """A random language model of one of CONVERTED; its norms and biases are random too."""
    sizes = {} if kind in ("gpt2", "bloom") else _SIZES
    given = _TOKENS | sizes | _OWN.get(kind, {}) | settings
    config = transformers.AutoConfig.for_model(kind, **given)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                about = 1.0 if name.endswith("weight") and kind not in _ONE_MORE else 0.0
                parameter.copy_(about + 0.2 * torch.randn_like(parameter))
    return model


def write_gguf(file, model, *, keys=(), tensors=(), quantisation=None, tokenizer=True):
    """Write a model; `quantisation` is the type of its matrices, such as `Q8_0`."""
    kind = model.config.model_type
    architecture = CONVERTED[kind]
    writer = gguf.GGUFWriter(file, architecture)
    metadata = {f"{architecture}.{key}": value for key, value in _metadata(model).items()}
    metadata |= _tokenizer() if tokenizer else {}
    for key, value in (metadata | dict(keys)).items():
        if value is not None:
            _write_key(writer, key, value)
    for name, values in (_tensors(model) | dict(tensors)).items():
        if values is not None:
            _write_tensor(writer, name, np.asarray(values), quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _write_key(writer, key, value):
    if key == "general.alignment":
        writer.add_custom_alignment(value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _write_tensor(writer, name, values, quantisation):
    values = np.ascontiguousarray(values, np.float32)
    if quantisation is None or values.ndim < 2 or "ffn_gate_inp" in name:
        writer.add_tensor(name, values)
        return
    kind = gguf.GGMLQuantizationType[quantisation]
    packed = quantised(values, quantisation)
    if quantisation == "F16":
        writer.add_tensor(name, packed)
    else:
        writer.add_tensor(name, packed, raw_dtype=kind)


def quantised(values, kind):
    """The bytes of float32 values in a quantised type; llama.cpp's own where gguf has none."""
    try:
        return gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    except NotImplementedError:
        from running_llama_cpp import quantised_by_llama_cpp

        return quantised_by_llama_cpp(values, kind)


def _tokenizer():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<pad>", "<s>", "</s>", "<|user|>", *bytes_to_unicode().values(), "th", "the"]
    tokens += [f"[unused{index}]" for index in range(VOCABULARY - len(tokens))]
    kinds = [3] * 4 + [1] * 258 + [5] * (VOCABULARY - 262)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": ["t h", "th e"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": _TEMPLATE,
    }


def _metadata(model):
    config = model.config
    heads = getattr(config, "num_attention_heads", None) or config.n_head
    found = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "attention.head_count": heads,
        "feed_forward_length": _inner(config),
        "context_length": getattr(config, "max_position_embeddings", 128),
        "vocab_size": config.vocab_size,
    }
    for name in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps"):
        if hasattr(config, name):
            rms = "_rms" if name == "rms_norm_eps" else ""
            found[f"attention.layer_norm{rms}_epsilon"] = getattr(config, name)
    if hasattr(config, "layer_norm_epsilon"):
        found["attention.layer_norm_epsilon"] = config.layer_norm_epsilon
    groups = getattr(config, "num_kv_heads", getattr(config, "num_key_value_heads", None))
    if config.model_type == "falcon" and config.multi_query and not config.new_decoder_architecture:
        groups = 1
    if groups is not None:
        found["attention.head_count_kv"] = groups
    if config.model_type == "bloom":
        found["attention.head_count_kv"] = heads
    return found | _rotary(config) | _special(config)


def _inner(config):
    names = ("ffn_hidden_size", "intermediate_size", "n_inner")
    given = (getattr(config, name, None) for name in names)
    return next((size for size in given if size), 4 * config.hidden_size)


def _rotary(config):
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return {}
    local = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = {
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1.0)),
    }
    if local:
        found["rope.freq_base_swa"] = float(local["rope_theta"])
    if head != config.hidden_size // config.num_attention_heads:
        found |= {"attention.key_length": head, "attention.value_length": head}
    if rope["rope_type"] in ("linear", "yarn"):
        found["rope.scaling.type"] = rope["rope_type"]
        found["rope.scaling.factor"] = float(rope["factor"])
    if rope["rope_type"] == "yarn":
        original = rope["original_max_position_embeddings"]
        found["rope.scaling.original_context_length"] = original
    return found


def _special(config):
    kind = config.model_type
    found = {}
    if kind in ("mixtral", "qwen2_moe", "qwen3_moe"):
        found["expert_count"] = (
            config.num_local_experts if kind == "mixtral" else config.num_experts
        )
        found["expert_used_count"] = config.num_experts_per_tok
    if kind in ("qwen2_moe", "qwen3_moe"):
        found["expert_feed_forward_length"] = config.moe_intermediate_size
    if kind == "qwen2_moe":
        found["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    if kind in ("gemma2", "gemma3_text"):
        found["attention.sliding_window"] = config.to_dict()["sliding_window"]
    if kind == "gemma2":
        found["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        found["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if kind == "stablelm":
        found["use_parallel_residual"] = config.use_parallel_residual
    if kind == "phi3":
        found |= _phi3(config)
    return found


def _phi3(config):
    original, context = config.original_max_position_embeddings, config.max_position_embeddings
    found = {
        "rope.scaling.original_context_length": original,
        "attention.sliding_window": config.sliding_window or 0,
    }
    if config.rope_parameters["rope_type"] == "longrope":
        factor = math.sqrt(1 + math.log(context / original) / math.log(original))
        found["rope.scaling.attn_factor"] = factor
    return found


def _tensors(model):
    config, kind = model.config, model.config.model_type
    (number,) = [k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == CONVERTED[kind]]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tied = set(model.all_tied_weights_keys)
    found = {}
    for name, value in model.state_dict().items():
        if name in tied:
            continue
        path, _, suffix = name.rpartition(".")
        values = value.float().numpy()
        if path.endswith("experts"):
            found |= _experts(path, suffix, values)
            continue
        inner = path.removeprefix(f"{model.base_model_prefix}.")
        new = names.get_name(path) or names.get_name(inner)
        assert new, name
        found[f"{new}.{suffix}"] = _converted(config, name, values)
    return found | _rope_tensors(config)


def _experts(path, suffix, values):
    block = f"blk.{path.split('.')[2]}.ffn"
    if suffix == "down_proj":
        return {f"{block}_down_exps.weight": values}
    gate, up = np.split(values, 2, axis=1)
    return {f"{block}_gate_exps.weight": gate, f"{block}_up_exps.weight": up}


def _converted(config, name, values):
    kind = config.model_type
    if kind in _ONE_MORE and name.endswith("norm.weight"):
        return values + 1
    if kind in _PERMUTED and ".q_proj." in name:
        return _permuted(values, config.num_attention_heads)
    if kind in _PERMUTED and ".k_proj." in name:
        return _permuted(values, config.num_key_value_heads)
    if kind == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return values.T
    if kind == "bloom" and "query_key_value" in name:
        return (
            values.reshape(config.n_head, 3, -1, *values.shape[1:])
            .swapaxes(0, 1)
            .reshape(values.shape)
        )
    if kind == "falcon" and "query_key_value" in name:
        return _falcon(config, values)
    if name.endswith("shared_expert_gate.weight"):
        return values[0]
    return values


def _permuted(values, heads):
    shape = (heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return values.reshape(shape).swapaxes(1, 2).reshape(values.shape)


def _falcon(config, values):
    groups = config.num_kv_heads if config.new_decoder_architecture else 1
    size = config.hidden_size // config.num_attention_heads
    each = values.reshape(groups, config.num_attention_heads // groups + 2, size, *values.shape[1:])
    q, k, v = each[:, :-2], each[:, -2], each[:, -1]
    return np.concatenate([part.reshape(-1, *values.shape[1:]) for part in (q, k, v)])


def _rope_tensors(config):
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return {
            "rope_factors_long.weight": rope["long_factor"],
            "rope_factors_short.weight": rope["short_factor"],
        }
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": _llama3(rope, config.head_dim)}
    return {}


def _llama3(rope, size):
    factors = []
    original = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    for exponent in range(0, size, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (exponent / size)
        smooth = (original / wave - low) / (high - low)
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors.append(1 if wave < original / high else min(between, rope["factor"]))
    return [
        rope["factor"] if 2 * math.pi * rope["rope_theta"] ** (i * 2 / size) > original / low else f
        for i, f in enumerate(factors)
    ]
