"""How many tokens a model can be given at once."""

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
# MPNet's model has this padding index whatever its configuration says.
_FIXED_PADDING = {"mpnet": 1}


def longest_input(config: Any, tokenizer: Any | None = None) -> int:
    """The most tokens, special ones included, that a model takes: as many as it has positions.

    At most what the tokenizer says, too; 512 where neither says anything.

    Args:
        config: of the model.
        tokenizer: of the model; None when texts play no part.
    """
    positions = known_positions(config) or _UNKNOWN
    # A tokenizer that was told no limit has 1e30.
    limit = int(getattr(tokenizer, "model_max_length", None) or positions)
    return min(positions, limit)


def known_positions(config: Any) -> int | None:
    """For how many tokens the model has positions, as its configuration says; None: it does not."""
    told = (getattr(config, name, None) for name in _LIMITS)
    rows = next((value for value in told if isinstance(value, int) and value > 0), None)
    if rows is None:
        return None
    kind = getattr(config, "model_type", "")
    if kind not in BEHIND_PADDING:
        return rows
    padding = _FIXED_PADDING.get(kind, getattr(config, "pad_token_id", None) or 0)
    return rows - padding - 1
