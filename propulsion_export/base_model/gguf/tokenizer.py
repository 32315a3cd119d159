"""The tokenizer that a GGUF file holds, as transformers builds it, or why it is refused."""

import json
from collections.abc import Mapping
from typing import Any

from propulsion_export.base_model.gguf.header import Header
from propulsion_export.errors import BaseModelError, first_line

_TOKENS = "tokenizer.ggml.tokens"
_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator"}
# How texts are cut before merging, by llama.cpp's name, as GPT-2 does: what transformers builds.
_AS_GPT2 = frozenset({"gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion"})
# As GPT-2, with each digit on its own.
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})

# llama.cpp cuts these texts alike; transformers knows the second name.
_SAME_CUTS = {"stablelm2": "qwen2", "hunyuan": "qwen2", "solar-open": "qwen2"}


def build_tokenizer(header: Header) -> Any | None:
    """The tokenizer in a file; None where it holds none.

    Raises:
        BaseModelError: it is of a kind that transformers does not build.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer

    if not isinstance(header.metadata.get(_TOKENS), list):
        return None
    given = _given(header.metadata)
    try:
        backend, _ = convert_gguf_tokenizer(header.architecture, given)
    except Exception as error:  # whatever transformers raises for what the file holds
        raise BaseModelError(
            f"{header.file}: its tokenizer cannot be read ({first_line(error)})",
            remedy="Give the model's safetensors checkpoint with -m.",
        ) from error
    backend = _without_others(backend, header)
    _cut_(backend, header)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **_settings(header))


def _without_others(backend: Any, header: Header) -> Any:
    """The tokenizer without tokens that its class adds behind those of the file."""
    from tokenizers import Tokenizer

    content = json.loads(backend.to_str())
    count = len(header.metadata[_TOKENS])
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < count]
    return Tokenizer.from_str(json.dumps(content))


def _given(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of the tokenizer, by transformers' names of it."""
    from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING

    names = GGUF_TOKENIZER_MAPPING["tokenizer"]
    given = {
        name: metadata[f"tokenizer.{key}"]
        for key, name in names.items()
        if f"tokenizer.{key}" in metadata
    }
    kind = given.get("pre_tokenizer_type", "")
    return given | {"pre_tokenizer_type": _SAME_CUTS.get(kind, kind)}


def _cut_(backend: Any, header: Header) -> None:
    """Cut texts as the file says, where transformers leaves GPT-2's way."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    usual = "gpt-2" if header.architecture == "gpt2" else "default"
    kind = header.metadata.get("tokenizer.ggml.pre", usual)
    kind = _SAME_CUTS.get(kind, kind)
    if header.metadata.get("tokenizer.ggml.model") != "gpt2" or kind in GGUF_PRE_TOKENIZER_SPLITS:
        return
    if kind in _SINGLE_DIGITS:
        pieces = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = Sequence(pieces)
    elif kind not in _AS_GPT2:
        raise BaseModelError(
            f"{header.file}: its tokenizer cuts texts as {kind!r} does, expected one of those that "
            "transformers builds, such as gpt-2, llama-bpe and qwen2",
            remedy="Give the model's safetensors checkpoint with -m.",
        )


def _settings(header: Header) -> dict[str, Any]:
    """What tokenizer_config.json says: special tokens, the chat template, what is put around."""
    metadata = header.metadata
    tokens = metadata[_TOKENS]
    found: dict[str, Any] = {}
    for name, key in _NAMED.items():
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            found[f"{name}_token"] = tokens[number]
    sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
    adds = metadata.get("tokenizer.ggml.add_bos_token", sentencepiece)
    found["add_bos_token"] = bool(adds and "bos_token" in found)
    found["add_eos_token"] = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    if template := metadata.get("tokenizer.chat_template"):
        found["chat_template"] = template
    if context := header.own().get("context_length"):
        found["model_max_length"] = context
    return found
