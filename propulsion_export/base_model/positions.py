"""How many tokens a model can be given at once."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

_UNKNOWN = 512  # where a configuration does not say
# How a configuration names the size of its position table, most common first.
_LIMITS = ("max_position_embeddings", "n_positions")
# Model types that count positions from behind the padding index, as fairseq's RoBERTa did, so that
# the first rows of the table are never a token's: those of transformers 5.24 whose position
# embedding is made with a `padding_idx`. A test looks for more in the transformers installed.
BEHIND_PADDING = frozenset(
    {
        "altclip_text_model",
        "bridgetower_text_model",
        "camembert",
        "clap_text_model",
        "data2vec-text",
        "esm",
        "ibert",
        "layoutlmv3",
        "lilt",
        "longformer",
        "luke",
        "markuplm",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
# Model types whose config.json has the size of the position table under another name than
# max_position_embeddings, and transformers 5.24 has it under both.
OTHER_NAMES = {
    "bailing_hybrid": "model_max_length",
    "codegen": "n_positions",
    "ctrl": "n_positions",
    "dbrx": "max_seq_len",
    "decision_transformer": "n_positions",
    "gpt-sw3": "n_positions",
    "gpt2": "n_positions",
    "gpt_bigcode": "n_positions",
    "gptj": "n_positions",
    "imagegpt": "n_positions",
    "kimi_linear": "model_max_length",
    "openai-gpt": "n_positions",
    "rwkv": "context_length",
}
# MPNet's model has this padding index whatever its configuration says.
_FIXED_PADDING = {"mpnet": 1}


def as_config(settings: Mapping[str, Any]) -> SimpleNamespace:
    """The settings of a config.json as attributes, positions as transformers names them."""
    config = SimpleNamespace(**settings)
    other = OTHER_NAMES.get(settings.get("model_type", ""))
    if other is not None and other in settings and not hasattr(config, "max_position_embeddings"):
        config.max_position_embeddings = settings[other]
    return config


def longest_input(config: Any, tokenizer: Any | None = None) -> int:
    """The most tokens, special ones included, that a model takes: as many as it has positions.

    The tokenizer may set a lower limit; 512 where neither sets one.

    Args:
        config: the model's configuration, or what `as_config` returns.
        tokenizer: the model's tokenizer; None for inputs that are no texts.
    """
    positions = known_positions(config) or _UNKNOWN
    # A tokenizer without a limit has 1e30.
    limit = int(getattr(tokenizer, "model_max_length", None) or positions)
    return min(positions, limit)


def known_positions(config: Any) -> int | None:
    """How many tokens the model has positions for; None where its configuration does not say."""
    sizes = (getattr(config, name, None) for name in _LIMITS)
    rows = next((value for value in sizes if isinstance(value, int) and value > 0), None)
    if rows is None:
        return None
    kind = getattr(config, "model_type", "")
    if kind not in BEHIND_PADDING:
        return rows
    padding = _FIXED_PADDING.get(kind, getattr(config, "pad_token_id", None) or 0)
    return rows - padding - 1
