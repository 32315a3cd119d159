"""Attention that is another function in long rows: BigBird's, which attends to blocks of tokens."""

from typing import Any

from propulsion_export.base_model.positions import known_positions
from propulsion_export.errors import BaseModelError


def check_one_attention(config: Any, where: str) -> None:
    """Refuse a model that attends otherwise in long rows.

    A graph holds one kind of attention. transformers' model attends in full once it has seen a
    short row, so that its answer to a long one depends on what came before.

    Raises:
        BaseModelError: it does, in rows of a length that it has positions for.
    """
    if getattr(config, "attention_type", None) != "block_sparse":
        return
    full = (5 + 2 * config.num_random_blocks) * config.block_size
    if (known_positions(config) or full + 1) > full:
        raise BaseModelError(
            f"{where}: attends to blocks of tokens in rows of more than {full} tokens, expected "
            "one kind of attention for all lengths",
            remedy='Set "attention_type": "original_full" in its config.json.',
        )
