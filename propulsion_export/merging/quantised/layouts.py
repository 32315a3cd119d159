"""The layouts of quantised checkpoints that can be merged into."""

from collections.abc import Mapping, Sequence
from typing import Any

from propulsion_export.base_model.tensor_files import StoredTensor
from propulsion_export.errors import BaseModelError
from propulsion_export.merging.quantised import (
    awq,
    bitsandbytes,
    compressed_tensors,
    fp8,
    gptq,
    torchao,
)
from propulsion_export.merging.quantised.layout import Find, Layout

# By transformers' name of the method, `quant_method` in `quantization_config`.
LAYOUTS: tuple[tuple[str, Find], ...] = (
    ("compressed-tensors", compressed_tensors.find),
    ("gptq", gptq.find),
    ("awq", awq.find),
    ("fp8", fp8.find),
    ("bitsandbytes", bitsandbytes.find),
    ("torchao", torchao.find),
)

# What lists the modules that are not quantised, where it is not `modules_to_not_convert`.
_PLAIN = {"compressed-tensors": "ignore", "bitsandbytes": "llm_int8_skip_modules"}


def find_layout(settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Layout:
    """How a quantised checkpoint stores its linear layers.

    Args:
        settings: the `quantization_config` of its config.json.
        tensors: its tensors by name.

    Raises:
        BaseModelError: no layout in the table is that, or its form of it is not read.
    """
    for _, find in LAYOUTS:
        layout = find(settings, tensors)
        if layout is not None:
            return layout
    raise BaseModelError(
        f"quantization_config: its weights are quantised by {settings.get('quant_method')}, "
        f"expected one of {', '.join(name for name, _ in LAYOUTS)}",
        remedy="Merge into the checkpoint that is not quantised.",
    )


def with_plain(settings: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """A `quantization_config` by which the modules at `paths` too are not quantised."""
    changed, method = dict(settings), settings.get("quant_method")
    name = _PLAIN.get(str(method), "modules_to_not_convert")
    # Without such a list, transformers leaves out the head by itself.
    if paths and (method == "compressed-tensors" or isinstance(settings.get(name), list)):
        changed[name] = list(dict.fromkeys([*(settings.get(name) or ()), *paths]))
    return changed
