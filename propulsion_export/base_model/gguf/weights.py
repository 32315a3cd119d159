"""The weights of a GGUF file as the parameters of a transformers model, each read when needed.

Every tensor of the file has to be taken by a parameter, and every parameter has to be made of
tensors: what is left over on either side would make another model of it, so the file is refused.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from propulsion_export.base_model.gguf.entries import FileTensor, conversion_for
from propulsion_export.base_model.gguf.files import small_files
from propulsion_export.base_model.gguf.header import Header, read_header
from propulsion_export.base_model.gguf.names import name_map, tensor_names
from propulsion_export.base_model.gguf.rotary import FREQUENCIES, LONG, SHORT
from propulsion_export.base_model.gguf.source import find_gguf
from propulsion_export.environment.quiet import quiet
from propulsion_export.errors import BaseModelError

# In the configuration, not in a parameter.
_ROTARY = frozenset({FREQUENCIES, SHORT, LONG})
# Biases that llama.cpp leaves out where they are all zero, or the model has none there.
_ZERO = re.compile(r"\.(self_attn|attn|self_attention|mlp)\.[^.]+\.bias$")


@dataclass(frozen=True, eq=False)
class GgufTensor(FileTensor):
    """A parameter that tensors of a GGUF file make; its numbers are computed when it is read."""

    dtype: torch.dtype = torch.float32  # type: ignore[assignment]

    def read(self) -> torch.Tensor:
        """The whole parameter, in memory of its own."""
        return torch.from_numpy(self.array()).contiguous()

    def __getitem__(self, place: Any) -> Any:
        """One entry, by its position on every axis; the whole parameter for `...`."""
        return self.read() if place is Ellipsis else super().__getitem__(place)


def gguf_tensors(source: str) -> dict[str, GgufTensor] | None:
    """The parameters of the language model in a GGUF file, by transformers' names.

    Returns:
        None where the source means no GGUF file.

    Raises:
        BaseModelError: a tensor of the file fits no parameter, or has another shape; a parameter
            has no tensor; or the file is refused for what it says of itself.
    """
    file = find_gguf(source)
    if file is None:
        return None
    status = file.stat()
    return dict(_tensors(file.resolve(), status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=2)
def _tensors(file: Path, _: int, __: int) -> Mapping[str, GgufTensor]:
    header = read_header(file)
    with quiet():
        config = AutoConfig.from_pretrained(small_files(str(file)))
    model = _empty(config)
    sources = _sources(header, model)
    _refuse_left_over(header, sources, config)
    settings = config.to_dict()
    return {
        name: _made(header, name, tuple(parameter.shape), sources, settings)
        for name, parameter in _wanted(model).items()
    }


def _empty(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"), quiet():
        return transformers.AutoModelForCausalLM.from_config(config)


def _wanted(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's parameters, without those that are tied to another."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: value for name, value in model.named_parameters() if name not in tied}


def _sources(header: Header, model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """The tensors of the file that each parameter is made of, by its name."""
    names = name_map(header)
    found = {parameter: tensor_names(names, parameter) for parameter in _wanted(model)}
    # Several tensors make one parameter together: one that is missing there is an error.
    return {
        parameter: each
        for parameter, each in found.items()
        if len(each) > 1 or all(name in header.tensors for name in each)
    }


def _refuse_left_over(
    header: Header, sources: Mapping[str, tuple[str, ...]], config: PretrainedConfig
) -> None:
    """Refuse tensors that no parameter takes.

    Raises:
        BaseModelError: naming some of them.
    """
    taken = {name for names in sources.values() for name in names}
    if left := [name for name in header.tensors if name not in taken | _in_configuration(config)]:
        kinds = {re.sub(r"blk\.\d+\.", "", name): name for name in reversed(left)}
        raise BaseModelError(
            *(
                f"{header.file}: has the tensor {name}, which the model of transformers has no "
                "place for"
                for name in kinds.values()
            ),
            remedy="Give the model's safetensors checkpoint with -m.",
        )


def _in_configuration(config: PretrainedConfig) -> frozenset[str]:
    """Tensors that the configuration holds, if it has rotary embeddings."""
    return _ROTARY if getattr(config, "rope_parameters", None) else frozenset()


def _made(
    header: Header,
    parameter: str,
    shape: tuple[int, ...],
    sources: Mapping[str, tuple[str, ...]],
    config: Mapping[str, Any],
) -> GgufTensor:
    names = sources.get(parameter, ())
    if missing := [name for name in names if name not in header.tensors]:
        raise _lacks(header, missing[0])
    if not names and not _ZERO.search(parameter):
        raise _lacks(header, parameter)
    conversion = conversion_for(header.architecture, names, config)
    if names:
        found = conversion.shape([header.tensors[name].shape for name in names])
        if found != shape:
            raise BaseModelError(
                f"{header.file}: {names[0]} has {math.prod(found)} numbers in the shape "
                f"{list(found)}, expected {list(shape)} by its metadata"
            )
    return GgufTensor(header, names, conversion, shape)


def _lacks(header: Header, name: str) -> BaseModelError:
    return BaseModelError(
        f"{header.file}: has no tensor for {name}, expected a whole language model",
        remedy="Copy or convert the file again.",
    )
