"""One state of a model with all that PyTorch says of it."""

from dataclasses import dataclass

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Tensors


@dataclass(frozen=True)
class Continuation:
    """How PyTorch goes on behind some prompts, choosing the likeliest token each time.

    Attributes:
        prompt: `input_ids` and `attention_mask`, padded, int64 [prompts, length].
        tokens: of the float64 oracle, every prompt alone; int64 [prompts, steps].
        margins: by how much the oracle's best logit exceeds the next; float64 [prompts, steps].
        reference: tokens of PyTorch at the artifact's precision; int64 [prompts, steps].
    """

    prompt: Tensors
    tokens: Array
    margins: Array
    reference: Array


@dataclass(frozen=True)
class Subject:
    """One adapter, or the base model, with all that PyTorch says of it.

    Attributes:
        name: of the adapter, or `base`.
        oracle: outputs in float64, one entry per batch of inputs.
        reference: outputs of PyTorch at the artifact's precision.
        unscaled: the oracle with the scales and trained biases taken away; None for the base.
        feeds: what to feed the candidate besides the inputs.
        continuation: of generative models.
        inside: the oracle's logits of a causal language model for the first batch as
            `generation.padded_inside` has it; None where PyTorch has none in float64, as some
            models with a window shorter than the padding.
    """

    name: str
    oracle: tuple[Tensors, ...]
    reference: tuple[Tensors, ...]
    unscaled: tuple[Tensors, ...] | None
    feeds: Tensors
    continuation: Continuation | None = None
    inside: Array | None = None
