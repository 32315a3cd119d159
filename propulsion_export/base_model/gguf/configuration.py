"""The configuration that the metadata of a GGUF file describes, or why it is refused.

Each key under the architecture's name sets something, or says what the configuration says anyway.
A key that does neither would be lost without a word, and the model computed wrong, so the file is
refused.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from propulsion_export.base_model.gguf.architectures import (
    ARCHITECTURES,
    Architecture,
    architecture_of,
)
from propulsion_export.base_model.gguf.header import Header, TensorPlace
from propulsion_export.base_model.gguf.rotary import (
    FREQUENCIES,
    LONG,
    SHORT,
    Factors,
    local_rope_parameters,
    rope_parameters,
)
from propulsion_export.errors import BaseModelError

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
# Layers of the models whose attention is scaled by the width of all heads, as in llama.cpp.
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
_SCALINGS = ("none", "linear", "yarn")
_FULL, _SLIDING = "full_attention", "sliding_attention"
_EVERY = 6  # of Gemma 3's layers, which sees the whole text
_OPTIONAL = {
    "attention.head_count_kv",
    "attention.key_length",
    "attention.sliding_window",
    "attn_logit_softcapping",
    "expert_feed_forward_length",
    "final_logit_softcapping",
    "rope.scaling.original_context_length",
    "use_parallel_residual",
}
_SAFETENSORS = "Give the model's safetensors checkpoint with -m."


class Keys:
    """The metadata under the architecture's name; knows which of it was taken.

    Args:
        header: of the file.
    """

    def __init__(self, header: Header) -> None:
        self.header = header
        self.values = {key: _plain(value) for key, value in header.own().items()}
        self.taken: set[str] = set()

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default."""
        self.taken.add(key)
        return self.values.get(key, default)

    def need(self, key: str) -> Any:
        """The value of a key that the file must have.

        Raises:
            BaseModelError: it has none.
        """
        if key not in self.values:
            raise BaseModelError(
                f"{self.header.file}: has no {self.header.architecture}.{key}, expected its value"
            )
        return self.take(key)


def model_settings(header: Header, factors: Factors) -> dict[str, Any]:
    """What config.json has to say for the model in a GGUF file.

    Args:
        header: of the file.
        factors: gives the numbers of a tensor by its name; none where there is no such tensor.

    Raises:
        BaseModelError: the architecture is not read, a key is missing, or a key says something
            that the configuration cannot.
    """
    keys = Keys(header)
    experts = bool(keys.values.get("expert_count", 0))
    read = architecture_of(header.architecture, experts=experts)
    if read is None:
        raise BaseModelError(
            f"{header.file}: is of the architecture {header.architecture}, expected one of "
            f"{', '.join(ARCHITECTURES)}",
            remedy=_SAFETENSORS,
        )
    settings = {"model_type": read.model_type, **read.fixed, **_sizes(keys, read)}
    for tensor, name in read.switches.items():
        settings[name] = f"blk.0.{tensor}" in header.tensors
    settings["vocab_size"] = embedding_of(header).shape[0]
    settings["tie_word_embeddings"] = OUTPUT not in header.tensors
    settings["dtype"] = "float32"
    natural = _width_of_a_head(keys)
    head = keys.take("attention.key_length", natural)
    if head != natural or "attention.key_length" in read.keys:
        settings["head_dim"] = head
    if read.rotary:
        settings["rope_parameters"] = _rotary(keys, read, factors, head)
    settings |= _SPECIAL.get(header.architecture, _nothing)(keys, settings, head)
    _refuse_unread(keys, settings, head)
    return settings | _tokens(header, settings["vocab_size"])


def embedding_of(header: Header) -> TensorPlace:
    """Where the token embedding lies.

    Raises:
        BaseModelError: the file has none.
    """
    if EMBEDDING not in header.tensors:
        raise BaseModelError(f"{header.file}: has no tensor {EMBEDDING}, expected a language model")
    return header.tensors[EMBEDDING]


def _sizes(keys: Keys, read: Architecture) -> dict[str, Any]:
    found = {}
    for key, name in read.keys.items():
        if key not in keys.values and key in _OPTIONAL:
            continue
        found[name] = _one(keys, key, keys.need(key))
    groups = read.keys.get("attention.head_count_kv")
    if groups is not None:
        found.setdefault(groups, found["num_attention_heads"])
    if found.get("sliding_window") == 0:
        found["sliding_window"] = None
    return found


def _one(keys: Keys, key: str, value: Any) -> Any:
    """The value of all layers, where a file gives one for each."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise _refused(keys, key, "one value for all layers")
    return value[0]


def _width_of_a_head(keys: Keys) -> int:
    heads = _one(keys, "attention.head_count", keys.need("attention.head_count"))
    return int(keys.need("embedding_length") // heads)


def _rotary(keys: Keys, read: Architecture, factors: Factors, head: int) -> dict[str, Any]:
    rotated = keys.take("rope.dimension_count", head)
    if rotated != head and not read.partial:
        raise _refused(keys, "rope.dimension_count", f"{head}, the size of a head")
    share = rotated / head
    if int(head * share) != rotated:  # transformers rounds down
        share = (rotated + 0.5) / head
    kind = keys.take("rope.scaling.type", "none")
    if kind not in _SCALINGS and not (kind == "longrope" and SHORT in keys.header.tensors):
        raise _refused(keys, "rope.scaling.type", f"one of {', '.join(_SCALINGS)}")
    _check_factors(keys.header, rotated // 2)
    context = keys.need("context_length")
    given = share if read.partial else None
    whole = rope_parameters(keys.take, factors, share=given, context=context)
    if keys.header.architecture != "gemma3":
        return whole
    return {_FULL: whole, _SLIDING: local_rope_parameters(keys.take)}


def _check_factors(header: Header, count: int) -> None:
    """Refuse factors of frequencies that are no pair of sets, or not as many as frequencies."""
    if (SHORT in header.tensors) != (LONG in header.tensors):
        raise BaseModelError(f"{header.file}: has one of {SHORT} and {LONG}, expected both or none")
    for name in (FREQUENCIES, SHORT, LONG):
        found = math.prod(header.tensors[name].shape) if name in header.tensors else count
        if found != count:
            raise BaseModelError(f"{header.file}: {name} has {found} numbers, expected {count}")


def _gemma2(keys: Keys, settings: Mapping[str, Any], head: int) -> dict[str, Any]:
    scale = keys.take("attention.scale", 0.0)
    if scale:
        return {"query_pre_attn_scalar": round(scale**-2)}
    largest = settings["num_hidden_layers"] == _LARGEST_GEMMA[keys.header.architecture]
    width = settings["hidden_size"] // settings["num_attention_heads"]
    return {"query_pre_attn_scalar": width if largest else head}


def _gemma3(keys: Keys, settings: Mapping[str, Any], head: int) -> dict[str, Any]:
    layers = settings["num_hidden_layers"]
    pattern = keys.take("attention.sliding_window_pattern", _EVERY)
    if not isinstance(pattern, list):
        pattern = [bool((index + 1) % (pattern or 1)) for index in range(layers)]
    slides = bool(settings.get("sliding_window"))
    kinds = [_SLIDING if slides and sliding else _FULL for sliding in pattern[:layers]]
    return _gemma2(keys, settings, head) | {"layer_types": kinds}


def _stablelm(keys: Keys, settings: Mapping[str, Any], head: int) -> dict[str, Any]:
    parallel = "blk.0.ffn_norm.weight" not in keys.header.tensors
    return {"use_parallel_residual": settings.get("use_parallel_residual", parallel)}


def _falcon(keys: Keys, settings: Mapping[str, Any], head: int) -> dict[str, Any]:
    if settings["num_kv_heads"] != 1 and not settings["new_decoder_architecture"]:
        raise _refused(keys, "attention.head_count_kv", "1 for a Falcon with one norm a layer")
    return {}


def _phi3(keys: Keys, settings: Mapping[str, Any], head: int) -> dict[str, Any]:
    context = settings["max_position_embeddings"]
    own = "original_max_position_embeddings"
    return {own: settings.get(own, context)}


def _nothing(keys: Keys, settings: Mapping[str, Any], head: int) -> dict[str, Any]:
    return {}


_SPECIAL: Mapping[str, Callable[[Keys, Mapping[str, Any], int], dict[str, Any]]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "stablelm": _stablelm,
    "falcon": _falcon,
    "phi3": _phi3,
}


def _refuse_unread(keys: Keys, settings: Mapping[str, Any], head: int) -> None:
    """Refuse keys that say what the configuration does not.

    Raises:
        BaseModelError: naming all of them.
    """
    said = _said(keys, settings, head)
    wrong = [
        f"{keys.header.file}: {keys.header.architecture}.{key} is {value!r}, which the "
        f"{settings['model_type']} of transformers cannot do"
        for key, value in keys.values.items()
        if key not in keys.taken and not said.get(key, _no)(value)
    ]
    if wrong:
        raise BaseModelError(*wrong, remedy=_SAFETENSORS)


def _said(
    keys: Keys, settings: Mapping[str, Any], head: int
) -> Mapping[str, Callable[[Any], bool]]:
    """For keys that set nothing, whether a value says what holds anyway."""
    context = keys.values.get("context_length", math.inf)
    kind = keys.values.get("rope.scaling.type", "none")
    usual = head**-0.5
    wide = 4 * keys.values["embedding_length"]
    return {
        "attention.value_length": lambda value: value == head,
        "attention.key_length": lambda value: value == head,
        "attention.head_count_kv": lambda value: value == keys.values["attention.head_count"],
        "attention.sliding_window": lambda value: not 0 < value < context,
        "attention.causal": lambda value: value is True,
        "attention.scale": lambda value: not value or math.isclose(value, usual, rel_tol=1e-6),
        "attention.max_alibi_bias": lambda value: settings["model_type"] == "bloom" and value == 8,
        "vocab_size": lambda value: value == settings["vocab_size"],
        "feed_forward_length": lambda value: value == wide,
        "rope.scaling.finetuned": lambda value: True,
        "rope.scaling.original_context_length": lambda value: kind != "yarn",
        "rope.scaling.attn_factor": lambda value: value == 1,
        "rope.scaling.yarn_ext_factor": lambda value: kind != "yarn" or value == 1,
        "rope.scaling.yarn_attn_factor": lambda value: kind != "yarn" or value == 1,
        "rope.freq_base_swa": lambda value: not settings.get("sliding_window"),
        "tensor_data_layout": lambda value: value in ("Meta AI original pth", "jploski"),
        "expert_weights_norm": lambda value: value is settings.get("norm_topk_prob", True),
        "expert_gating_func": lambda value: value == 1,  # softmax
        **dict.fromkeys(("embedding_scale", "residual_scale", "logit_scale"), _is_one_or_none),
        **dict.fromkeys(("expert_weights_scale",), _is_one_or_none),
        **dict.fromkeys(_ABSENT, lambda value: not value),
    }


# What the architectures here do not have.
_ABSENT = (
    "attention.clamp_kqv",
    "attn_logit_softcapping",
    "expert_count",
    "expert_group_count",
    "expert_shared_count",
    "expert_used_count",
    "final_logit_softcapping",
    "leading_dense_block_count",
    "nextn_predict_layers",
    "pooling_type",
    "rope.scaling.yarn_log_multiplier",
    "use_parallel_residual",
)


def _no(value: Any) -> bool:
    return False


def _is_one_or_none(value: Any) -> bool:
    return value in (0, 1)


def _tokens(header: Header, rows: int) -> dict[str, Any]:
    """The numbers of the tokens that begin, end and pad a text; None without one.

    Raises:
        BaseModelError: the file names a special token that the embedding has no row for.
    """
    for key, value in header.metadata.items():
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id") and value >= rows:
            raise BaseModelError(f"{header.file}: {key} is {value}, expected a number below {rows}")
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {
        f"{name}_token_id": header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in names.items()
    }


def _refused(keys: Keys, key: str, expected: str) -> BaseModelError:
    found = keys.values.get(key)
    return BaseModelError(
        f"{keys.header.file}: {keys.header.architecture}.{key} is {found!r}, expected {expected}",
        remedy=_SAFETENSORS,
    )


def _plain(value: Any) -> Any:
    """The shortest number that float32 stores as this one: files hold 1e-5 as 9.99999975e-06."""
    if not isinstance(value, float) or float(np.float32(value)) != value:
        return value
    return float(str(np.float32(value)))
