"""How the tensors of a GGUF file become a parameter: the inverse of llama.cpp's converter.

Rows of q and k are permuted back per head, fused projections regrouped, norms that the file holds
as 1 + w get their w again. Reference: `conversion/` of ggml-org/llama.cpp.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
_CONV1D = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
_ONE_MORE = ("gemma2", "gemma3", "nemotron")


@dataclass(frozen=True)
class Conversion:
    """One way to make a parameter.

    Attributes:
        arranged: gives the parameter's entries, from the tensors' entries; only moves them, so
            that their last axis may have the length 1 where each row moves as a whole.
        shape: gives its shape, from the tensors' shapes.
        added: what the file has added to every entry.
        transposed: whether the rows of the file are the columns of the parameter.
    """

    arranged: Callable[[Sequence[Array]], Array]
    shape: Callable[[Sequence[Shape]], Shape] = lambda shapes: shapes[0]
    added: float = 0.0
    transposed: bool = False

    def values(self, arrays: Sequence[Array]) -> Array:
        """The parameter, from the tensors' numbers."""
        arranged = self.arranged(arrays)
        return arranged - np.float32(self.added) if self.added else arranged


def conversion_of(architecture: str, name: str, config: Mapping[str, Any]) -> Conversion:
    """How a tensor becomes a parameter on its own.

    Args:
        architecture: llama.cpp's name of it.
        name: the tensor's name in the file.
        config: the content of config.json, at least what the file's metadata gives.
    """
    if architecture == "llama" and (heads := _rotary_heads(name)):
        return Conversion(lambda arrays: _unpermuted(arrays[0], config[heads]))
    if architecture in _ONE_MORE and name.endswith("norm.weight"):
        return Conversion(lambda arrays: arrays[0], added=1.0)
    if architecture == "gpt2" and name.endswith(_CONV1D):
        return Conversion(
            lambda arrays: arrays[0].T, lambda shapes: shapes[0][::-1], transposed=True
        )
    if architecture == "bloom" and ".attn_qkv." in name:
        return Conversion(lambda arrays: _by_heads(arrays[0], config["n_head"]))
    if architecture == "falcon" and ".attn_qkv." in name:
        return Conversion(lambda arrays: _by_groups(arrays[0], config))
    if name.endswith("ffn_gate_inp_shexp.weight"):
        return Conversion(lambda arrays: arrays[0][None], lambda shapes: (1, *shapes[0]))
    return Conversion(lambda arrays: arrays[0])


def _joined(shapes: Sequence[Shape]) -> Shape:
    """[experts, rows, columns] of both, their rows one behind the other."""
    experts, _, columns = shapes[0]
    return experts, sum(shape[1] for shape in shapes), columns


GATE_AND_UP = Conversion(lambda arrays: np.concatenate(arrays, axis=1), _joined)


def _rotary_heads(name: str) -> str | None:
    """The setting with the number of heads that a permuted tensor has; None for another."""
    if ".attn_q." in name:
        return "num_attention_heads"
    return "num_key_value_heads" if ".attn_k." in name else None


def _unpermuted(array: Array, heads: int) -> Array:
    """From the pairs of each rotation side by side to the first of all pairs before the second."""
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _by_heads(array: Array, heads: int) -> Array:
    """BLOOM's fused projection, from all q, all k, all v to each head's q, k and v."""
    parts = array.reshape(3, heads, -1, *array.shape[1:])
    return parts.swapaxes(0, 1).reshape(array.shape)


def _by_groups(array: Array, config: Mapping[str, Any]) -> Array:
    """Falcon's fused projection, from all q, all k, all v to each group's q, k and v."""
    heads, groups = config["num_attention_heads"], config["num_kv_heads"]
    size = config["hidden_size"] // heads
    parts = np.split(array, [heads * size, (heads + groups) * size])
    grouped = [part.reshape(groups, -1, size, *array.shape[1:]) for part in parts]
    return np.concatenate(grouped, axis=1).reshape(array.shape)
