"""One state of a model with everything that PyTorch computes for it."""

from dataclasses import dataclass

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Tensors


@dataclass(frozen=True)
class Continuation:
    """PyTorch's greedy continuation of some prompts.

    Attributes:
        prompt: `input_ids` and `attention_mask`, padded, int64 [prompts, length].
        tokens: tokens of the float64 oracle, every prompt alone; int64 [prompts, steps]. Behind the
            first that is not the candidate's, if it is given: what the oracle chooses after the
            candidate's.
        margins: difference of the oracle's two best logits; float64 [prompts, steps].
        reference: tokens of PyTorch at the artifact's precision; int64 [prompts, steps]. None where
            the candidate's are known to be the oracle's, so that there is nothing to explain.
        candidate: the candidate's tokens and margins, see `generation.continue_greedily`; None
            where it has yet to be run.
    """

    prompt: Tensors
    tokens: Array
    margins: Array
    reference: Array | None = None
    candidate: tuple[Array, Array] | None = None

    @property
    def may_part(self) -> bool:
        """Whether the candidate's tokens are others than the oracle's, or not known yet."""
        return self.candidate is None or not np.array_equal(self.candidate[0], self.tokens)


@dataclass(frozen=True)
class Subject:
    """One adapter, or the base model, with everything that PyTorch computes for it.

    Attributes:
        name: the name of the adapter, or `base`.
        oracle: outputs in float64, one entry per batch of inputs.
        reference: outputs of PyTorch at the artifact's precision.
        unscaled: the oracle with the scales and trained biases taken away; None for the base.
        feeds: inputs of the adapter, fed to the candidate with the batch.
        continuation: PyTorch's continuation of prompts; None unless the model generates.
        inside: the oracle's logits of a causal language model for the first batch, padded as by
            `generation.padded_inside`; None where they are not finite in PyTorch, as for some
            models with a window shorter than the padding, or where the artifact reads no such rows.
        padding_effect: how much the padding of a batch changes an output in float64, where the
            model depends on it; `oracle` is then that of the padded batches. None where it does
            not, and `oracle` has every row alone.
    """

    name: str
    oracle: tuple[Tensors, ...]
    reference: tuple[Tensors, ...]
    unscaled: tuple[Tensors, ...] | None
    feeds: Tensors
    continuation: Continuation | None = None
    inside: Array | None = None
    padding_effect: float | None = None
