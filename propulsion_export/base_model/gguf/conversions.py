"""How the tensors of a GGUF file become a parameter: the inverse of llama.cpp's converter.

Rows of q and k are permuted back per head, fused projections regrouped, norms that the file holds
as 1 + w get their w again. References: `conversion/` of ggml-org/llama.cpp and transformers'
`modeling_gguf_pytorch_utils`, whose processors are used where they are right.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from propulsion_export.base_model.gguf.values import Array

Shape = tuple[int, ...]
_PROCESSED = ("llama", "bloom", "gemma2", "gemma3", "nemotron")
_CONV1D = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")


@dataclass(frozen=True)
class Conversion:
    """One way to make a parameter.

    Attributes:
        values: gives the parameter, from the tensors' numbers.
        shape: gives its shape, from the tensors' shapes.
    """

    values: Callable[[Sequence[Array]], Array]
    shape: Callable[[Sequence[Shape]], Shape] = lambda shapes: shapes[0]


def conversion_of(architecture: str, name: str, config: Mapping[str, Any]) -> Conversion:
    """How a tensor becomes a parameter on its own.

    Args:
        architecture: llama.cpp's name of it.
        name: the tensor's name in the file.
        config: the content of config.json.
    """
    if architecture in _PROCESSED:
        return Conversion(lambda arrays: _processed(architecture, name, config, arrays[0]))
    if architecture == "gpt2" and name.endswith(_CONV1D):
        return Conversion(lambda arrays: arrays[0].T, lambda shapes: shapes[0][::-1])
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


def _processed(architecture: str, name: str, config: Mapping[str, Any], array: Array) -> Array:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS

    given = TENSOR_PROCESSORS[architecture](config=config).process(array, name)
    values: Array = given.weights
    return values


def _by_groups(array: Array, config: Mapping[str, Any]) -> Array:
    """Falcon's fused projection, from all q, all k, all v to each group's q, k and v."""
    heads, groups = config["num_attention_heads"], config["num_kv_heads"]
    size = config["hidden_size"] // heads
    parts = np.split(array, [heads * size, (heads + groups) * size])
    grouped = [part.reshape(groups, -1, size, *array.shape[1:]) for part in parts]
    return np.concatenate(grouped, axis=1).reshape(array.shape)
