"""Read texts as a sentence pipeline wants them: prompt, letter case and length."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from propulsion_export.base_model.config import read_settings
from propulsion_export.base_model.positions import as_config, longest_input
from propulsion_export.base_model.sentences.files import read_sentence_pipeline
from propulsion_export.base_model.sentences.pipeline import Array, SentencePipeline
from propulsion_export.errors import UsageError


@dataclass(frozen=True)
class SentenceTexts:
    """How texts are read for a pipeline, and embedded.

    Attributes:
        pipeline: the pipeline.
        limit: the most tokens of a text, its prompt included.
        prompt_tokens: how many of a text's first tokens the pooling leaves out.
    """

    pipeline: SentencePipeline
    limit: int
    prompt_tokens: int

    def with_prompt(self, texts: Sequence[str]) -> list[str]:
        """The texts, each behind the prompt."""
        return [self.pipeline.prompt + text for text in texts]

    def embed(self, hidden: Array) -> Array:
        """The embedding of one text's token vectors without padding, float64 [width]."""
        return self.pipeline.embed(hidden, self.prompt_tokens)


def open_sentence_texts(directory: Path, tokenizer: Any) -> SentenceTexts | None:
    """How texts are read for the pipeline in a directory; None without one.

    Sets the tokenizer to lower case where the pipeline says so.

    Raises:
        UsageError: the tokenizer is no fast one, and so cannot be set; the prompt leaves no room.
        BaseModelError: the pipeline cannot be computed here, or is damaged.
    """
    pipeline = read_sentence_pipeline(directory)
    if pipeline is None:
        return None
    if pipeline.lower_case:
        _lower_case_(tokenizer)
    config = as_config(read_settings(directory))
    # The pipeline's own number takes the tokenizer's place, which may be lower.
    limit = longest_input(config, None if pipeline.longest else tokenizer)
    limit = min(pipeline.longest or limit, limit)
    tokens = _prompt_tokens(pipeline, tokenizer, limit)
    if tokens >= limit:
        raise UsageError(
            f"{directory}: its prompt has {tokens} tokens, expected fewer than the {limit} that a "
            "text may have"
        )
    return SentenceTexts(pipeline, limit, tokens)


def _lower_case_(tokenizer: Any) -> None:
    if not tokenizer.is_fast:
        raise UsageError(
            "sentence_bert_config.json: do_lower_case is set for a tokenizer without "
            "tokenizer.json, expected a fast one"
        )
    from tokenizers.normalizers import Lowercase
    from tokenizers.normalizers import Sequence as Normalizers

    # Not the text itself: special tokens such as [MASK] keep their capitals.
    backend = tokenizer.backend_tokenizer
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = Normalizers([Lowercase(), *own])


def _prompt_tokens(pipeline: SentencePipeline, tokenizer: Any, limit: int) -> int:
    """How many tokens the prompt has, without a special token behind it; 0 if all count."""
    if not pipeline.skips_prompt:
        return 0
    ids = tokenizer(pipeline.prompt, truncation=True, max_length=limit)["input_ids"]
    return len(ids) - (ids[-1] in _special(tokenizer))


def _special(tokenizer: Any) -> set[int]:
    """The numbers of the special tokens."""
    if not tokenizer.is_fast:
        return set(tokenizer.all_special_ids)
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {number for number, token in added.items() if token.special}
