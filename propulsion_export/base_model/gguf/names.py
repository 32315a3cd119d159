"""Which tensors of a GGUF file make a parameter of a transformers model, by their names."""

import re
from typing import Any

from propulsion_export.base_model.gguf.header import Header

# What transformers' language models put before the names of the model without the head.
_PREFIXES = ("model.", "transformer.")
_EXPERTS = re.compile(r"(?:.*\.)?layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")
_KINDS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


def name_map(header: Header) -> Any:
    """llama.cpp's table of the names of an architecture's tensors, by transformers' names."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    layers = int(header.own().get("block_count", 0))
    (number,) = (key for key, name in MODEL_ARCH_NAMES.items() if name == header.architecture)
    return get_tensor_name_map(number, layers)


def tensor_names(names: Any, parameter: str) -> tuple[str, ...]:
    """The names that the tensors of a parameter have, whether or not the file has them.

    Args:
        names: of `name_map`.
        parameter: transformers' name, with or without the prefix of the model with a head.

    Returns:
        Two for the fused weights of experts, which are apart in the file; one for others; none
        where the table has none.
    """
    if match := _EXPERTS.fullmatch(parameter):
        return tuple(f"blk.{match[1]}.ffn_{kind}_exps.weight" for kind in _KINDS[match[2]])
    for spelling in _spellings(parameter):
        path, _, kind = spelling.rpartition(".")
        if found := names.get_name(path):
            return (f"{found}.{kind}",)
    return ()


def _spellings(parameter: str) -> list[str]:
    """The name with and without the prefix, the one with it first."""
    for prefix in _PREFIXES:
        if parameter.startswith(prefix):
            return [parameter, parameter.removeprefix(prefix)]
    return [*(prefix + parameter for prefix in _PREFIXES), parameter]
