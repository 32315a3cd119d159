"""Forward passes that the oracle asks a torch model for, and the ordinary way to compute them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import DynamicCache

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.artifacts.tensor_names import LOGITS
from propulsion_export.base_model.dtypes import cast_
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.parity.float64 import float64_throughout
from propulsion_export.parity.prefixes import Prefixes
from propulsion_export.runners.decoding import pieces_of
from propulsion_export.runners.padding import positions
from propulsion_export.runners.pytorch import (
    output_arrays,
    tensors_on,
    torch_candidate,
    torch_errors,
    torch_step,
)
from propulsion_export.scaling.attach import attached


@dataclass(frozen=True, eq=False)
class Forwards:
    """Forward passes one behind the other, each of which reads the cache of those before.

    Attributes:
        pieces: the inputs of each pass. A decoder's are `input_ids` and `position_ids` [rows, new]
            and `attention_mask` [rows, read + new]; only a decoder may have more than one piece.
    """

    pieces: tuple[Tensors, ...]


# Passes that are known beforehand, or what to do with the model as a generator.
Item = Forwards | Callable[[Any], Tensors]


@dataclass(frozen=True)
class Work:
    """What one state of the model computes: an adapter to attach, and what to run with it."""

    adapter: Adapter
    items: Sequence[Item]


class Compute(Protocol):
    """A way to compute passes.

    It leaves the base model as it was or at the dtype computed in. In float64 everything is, see
    `parity.float64`; in other dtypes PyTorch is left to itself.
    """

    def __call__(
        self, base: BaseModel, works: Sequence[Work], dtype: torch.dtype
    ) -> list[list[Tensors]]:
        """The outputs of every item of every work; logits of several pieces are joined."""


def compute_whole(device: str) -> Compute:
    """Compute with the whole model in memory, on `device`.

    A pass begins at the first layer that its adapter changes, where another state has run the same
    pass before with all layers before it unchanged.
    """

    def compute(base: BaseModel, works: Sequence[Work], dtype: torch.dtype) -> list[list[Tensors]]:
        cast_(base.model, dtype, device)
        prefixes = Prefixes.of(base.model, [work.adapter for work in works])
        results = []
        with precision(dtype):
            for work in works:
                with attached(base.model, work.adapter):
                    results.append([_run(base, work, item, prefixes) for item in work.items])
        return results

    return compute


def decoder_pass(tokens: Array, mask: Array, *, stepwise: bool = False) -> Forwards:
    """Passes over whole sequences, int64 [rows, length]: one, or as many as in generation."""
    length = tokens.shape[1]
    ends = pieces_of(length) if stepwise else [(0, length)]
    return Forwards(
        tuple(
            {
                "input_ids": tokens[:, start:end],
                "attention_mask": mask[:, :end],
                "position_ids": positions(mask[:, :end])[:, start:],
            }
            for start, end in ends
        )
    )


@contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """Compute in float64 throughout, or as PyTorch does, but never in TF32.

    TF32 would make PyTorch's own error, and with it the tolerance, a thousand times larger.
    """
    before: Any = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with float64_throughout() if dtype == torch.float64 else nullcontext():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def forward(base: BaseModel, piece: Tensors, cache: DynamicCache | None) -> dict[str, Any]:
    """One forward pass: a decoder's logits, otherwise every output; a cache is lengthened in place.

    Raises:
        ToolError: the model fails on its inputs.
    """
    with torch_errors(base.model, piece), torch.inference_mode():
        if cache is not None:
            return {LOGITS: torch_step(base.model)(piece, cache)}
        outputs: dict[str, Any] = base.model(**tensors_on(base.model.device, piece))
        return outputs


def new_cache(base: BaseModel) -> DynamicCache | None:
    """An empty cache that keeps all positions; None unless the model is a decoder."""
    return DynamicCache() if TASKS[base.task].architecture == "decoder" else None


def collected(outputs: Sequence[dict[str, Any]]) -> Tensors:
    """The outputs of all pieces as arrays; logits of several pieces are joined."""
    arrays = [output_arrays(each) for each in outputs]
    if len(arrays) == 1:
        return arrays[0]
    return {LOGITS: np.concatenate([each[LOGITS] for each in arrays], axis=1)}


def _run(base: BaseModel, work: Work, item: Item, prefixes: Prefixes) -> Tensors:
    if not isinstance(item, Forwards):
        return item(torch_candidate(base.model, base.task))

    def compute() -> Tensors:
        cache = new_cache(base)
        return collected([forward(base, piece, cache) for piece in item.pieces])

    return compute() if len(item.pieces) > 1 else prefixes.run(compute, item, work.adapter)
