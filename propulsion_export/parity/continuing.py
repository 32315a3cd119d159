"""The oracle's greedy continuation of prompts, from a draft that another has generated.

A draft's tokens are given to the oracle as if they were its own, and one pass over the whole says
what it would have chosen at every step. Up to the first step where it would have chosen otherwise,
this is the oracle's own greedy continuation; the verdict needs no more, because it judges a
continuation by the first step at which it parts from the oracle. Later tokens are the oracle's
choices after the draft's.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.graph.sample_inputs import padding_token
from propulsion_export.parity.generation import greedy_choice
from propulsion_export.parity.inputs import judged_length
from propulsion_export.parity.subject import Continuation
from propulsion_export.runners.decoding import EncoderDecoder, Generator

# Generates: the prompts with an adapter's inputs, and how many tokens. See `continue_greedily`.
Draft = Callable[[Tensors, int], tuple[Array, Array]]
_PROMPTS = (5, 12, 9)  # lengths, in tokens, of the prompts that are continued


@dataclass(frozen=True)
class Drafted:
    """Prompts with a draft of their continuation.

    Attributes:
        rows: the prompts without padding, int64 [length] each.
        prompt: the prompts padded, see `Generator.pad`.
        tokens: the draft, int64 [prompts, steps], all of them in the oracle's vocabulary.
        start: the token that the decoder of an encoder-decoder begins with.
        candidate: the tokens as they were drafted and the margins, if the candidate drafted them.
    """

    rows: Sequence[Array]
    prompt: Tensors
    tokens: Array
    start: int = 0
    candidate: tuple[Array, Array] | None = None

    @property
    def whole(self) -> list[Array]:
        """Every prompt with its draft but for the last token, which nothing follows."""
        pairs = zip(self.rows, self.tokens, strict=True)
        return [np.concatenate([row, draft[:-1]]) for row, draft in pairs]

    @property
    def padded(self) -> Tensors:
        """The same padded as the prompts are."""
        behind = self.tokens[:, :-1]
        mask = self.prompt["attention_mask"]
        return {
            "input_ids": np.concatenate([self.prompt["input_ids"], behind], axis=1),
            "attention_mask": np.concatenate([mask, np.ones_like(behind)], axis=1),
        }

    @property
    def begun(self) -> Tensors:
        """The prompts and, for an encoder-decoder, the draft behind its first token."""
        first = np.full((len(self.tokens), 1), self.start, np.int64)
        return {
            **self.prompt,
            "decoder_input_ids": np.concatenate([first, self.tokens[:, :-1]], axis=1),
        }

    def continuation(self, oracle: Iterable[Array]) -> Continuation:
        """What the oracle chooses, from its logits, [length, vocabulary] for each prompt."""
        steps = self.tokens.shape[1]
        chosen = [greedy_choice(logits[-steps:]) for logits in oracle]
        tokens, margins = (np.stack(parts) for parts in zip(*chosen, strict=True))
        return Continuation(self.prompt, tokens, margins, candidate=self.candidate)

    def chosen(self, logits: Array) -> Array:
        """The tokens chosen, int64 [prompts, steps], of the logits of `padded` or `begun`."""
        tokens, _ = greedy_choice(logits[:, -self.tokens.shape[1] :])
        return tokens


def prompts_of(batch: Tensors) -> list[Array]:
    """The beginnings of three rows, int64 [length] each."""
    real = batch["attention_mask"] == 1
    return [
        tokens[seen][:length]
        for tokens, seen, length in zip(batch["input_ids"], real, _PROMPTS, strict=False)
    ]


def drafted(
    base: BaseModel, generator: Generator, batch: Tensors, draft: Draft, steps: int
) -> Drafted:
    """A draft of at most `steps` tokens, fewer where the model takes fewer; see `Drafted`."""
    rows = prompts_of(batch)
    prompt = generator.pad(rows, padding_token(base.model.config))
    steps = min(steps, judged_length(base.model.config) - max(map(len, rows)))
    found = draft(prompt, steps)
    known = base.model.get_input_embeddings().weight.shape[0]
    start = generator.start if isinstance(generator, EncoderDecoder) else 0
    return Drafted(rows, prompt, np.clip(found[0], 0, known - 1), start, found)
