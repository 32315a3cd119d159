"""Which tensors of a GGUF file an adapter changes, and by which factors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.base_model.gguf.block_types import BLOCK_TYPES
from propulsion_export.base_model.gguf.configuration import EMBEDDING, OUTPUT, embedding_of
from propulsion_export.base_model.gguf.conversions import conversion_of
from propulsion_export.base_model.gguf.entries import FileTensor
from propulsion_export.base_model.gguf.header import Header, TensorPlace, type_name
from propulsion_export.base_model.gguf.parameters import Parameters
from propulsion_export.base_model.tensor_files import Array
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.merging.gguf.blocks import FLOATS, can_scale_rows
from propulsion_export.merging.gguf.spreading import (
    check_shape,
    is_embedding,
    moved,
    on_axes,
    spread,
)
from propulsion_export.merging.gguf.written import Written

_F32 = 0
_HEAD = "lm_head"
# llama.cpp computes the output of these with the token embedding, whatever else a file has.
_NO_OUTPUT = ("gemma", "gemma2", "gemma3", "command-r", "cohere2")
# Biases that llama.cpp adds where a file has them, by architecture.
_OPTIONAL_BIASES = {
    "llama": ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
}
_ELSEWHERE = "Merge into the model's safetensors checkpoint, and convert that with llama.cpp."


@dataclass(frozen=True)
class Plan:
    """What becomes of a file's tensors; those that are in neither mapping stay as they are."""

    changed: Mapping[str, Written]
    added: Mapping[str, Written]


def plan_merge(parameters: Parameters, adapter: Adapter, *, untie: bool) -> Plan:
    """Decide what is written for each tensor that an adapter changes.

    Raises:
        AdapterError: the adapter does not fit the file, or brings what a GGUF file has no place
            for.
        BaseModelError: a factor has no exact place in a tensor's type, or a tied weight would
            have to be untied.
    """
    _refuse_modules(adapter)
    header = parameters.header
    written: dict[str, Written] = {}
    misfits: list[str] = []
    for path, scale in adapter.scales.items():
        try:
            written |= {each.name: each for each in _of_scale(parameters, adapter, path, scale)}
        except AdapterError as error:
            misfits += error.findings
    if misfits:
        raise AdapterError(
            *(f"adapter {adapter.name}: {misfit}" for misfit in misfits),
            remedy="Was it trained on this base model?",
        )
    if parameters.is_tied and EMBEDDING in written and OUTPUT not in written:
        written[OUTPUT] = Written(OUTPUT, embedding_of(header))
    _refuse_types(header, written)
    if parameters.is_tied and OUTPUT in written:
        _check_untied(header, untie=untie)
    return Plan(
        {name: each for name, each in written.items() if name in header.tensors},
        {name: each for name, each in written.items() if name not in header.tensors},
    )


def _refuse_modules(adapter: Adapter) -> None:
    if adapter.modules:
        raise AdapterError(
            f"adapter {adapter.name}: brings {next(iter(adapter.modules))} whole, which a GGUF "
            "file gets only from llama.cpp's converter",
            remedy=_ELSEWHERE,
        )


def _of_scale(
    parameters: Parameters, adapter: Adapter, path: str, scale: Scale
) -> Iterator[Written]:
    """The tensors that one scale changes: of its weight, and of its bias."""
    experts = scale.values.ndim > 1
    output = _is_output(parameters, path)
    weight = _weight(parameters, path if experts else f"{path}.weight", output=output)
    if weight is None:
        raise AdapterError(f"{path}: the file has no tensor for it")
    factors = on_axes(path, weight, scale, embedding=not output and is_embedding(weight))
    channels = np.arange(factors.size).reshape(factors.shape)
    for each in spread(weight, factors, channels):
        yield replace(each, name=OUTPUT) if output else each
    if not experts:
        yield from _of_bias(parameters, adapter, path, scale)


def _is_output(parameters: Parameters, path: str) -> bool:
    """Whether a module is the head; llama.cpp's table has none where it is always tied."""
    return path == _HEAD or parameters.tensor_name(f"{path}.weight") == OUTPUT


def _weight(parameters: Parameters, name: str, *, output: bool) -> FileTensor | None:
    """The tensors of a weight; of a tied model the output is made of the embedding."""
    if not output or not parameters.is_tied:
        return parameters.find(name)
    header = parameters.header
    conversion = conversion_of(header.architecture, OUTPUT, parameters.settings)
    return FileTensor(header, (EMBEDDING,), conversion, embedding_of(header).shape)


def _of_bias(
    parameters: Parameters, adapter: Adapter, path: str, scale: Scale
) -> Iterator[Written]:
    """The bias of a scaled module: (x W^T + b) * s."""
    name, trained = f"{path}.bias", adapter.biases.get(path)
    bias, channels = parameters.find(name), np.arange(scale.values.size)
    if trained is None:
        if bias is not None and scale.side == "output":
            check_shape(name, scale.values.shape, bias.shape)
            yield from spread(bias, scale.values, channels)
        return
    product = trained.astype(np.float64) * scale.values
    if bias is None:
        yield _added_bias(parameters, name, product)
        return
    check_shape(name, product.shape, bias.shape)
    for each in spread(bias, product, channels):
        yield replace(each, factors=None, given=each.factors)


def _added_bias(parameters: Parameters, parameter: str, values: Array) -> Written:
    """A bias that the file lacks, where llama.cpp adds one if it is there; in float32.

    Raises:
        AdapterError: llama.cpp would not read it.
    """
    header, name = parameters.header, parameters.tensor_name(parameter) or parameter
    kinds = _OPTIONAL_BIASES.get(header.architecture, ())
    if not any(name.endswith(f".{kind}.bias") for kind in kinds):
        raise AdapterError(
            f"{parameter}: was trained, and llama.cpp reads no such bias of a {header.architecture}"
        )
    conversion = conversion_of(header.architecture, name, parameters.settings)
    arranged = conversion.arranged([np.arange(values.size)])
    return Written(
        name, TensorPlace(values.shape, _F32, 0, 4 * values.size), given=moved(values, arranged)
    )


def _refuse_types(header: Header, written: Mapping[str, Written]) -> None:
    """Refuse factors that have no exact place in a tensor's type.

    Raises:
        BaseModelError: naming all of them.
    """
    findings = []
    for name, each in written.items():
        kind = type_name(each.place.kind)
        if each.factors is None or kind in FLOATS:
            continue
        if each.factors.shape[-1] != 1:
            findings.append(
                f"{header.file}: {name} is quantised ({kind}), and a scale along its rows "
                "has no place in blocks of them"
            )
        elif not can_scale_rows(kind):
            findings.append(
                f"{header.file}: {name} is of the type {kind}, expected one of "
                f"{', '.join((*FLOATS, *BLOCK_TYPES))}"
            )
    if findings:
        raise BaseModelError(
            *findings,
            remedy="Merge into an F16 or F32 file, and quantise that with llama.cpp.",
        )


def _check_untied(header: Header, *, untie: bool) -> None:
    """Refuse to give the output a tensor of its own where that is impossible or not wanted."""
    subject = f"{header.file}: has one tensor, {EMBEDDING}, for the embedding and the output"
    if header.architecture in _NO_OUTPUT:
        raise BaseModelError(
            f"{subject}, and llama.cpp reads no other output of a {header.architecture}, so a "
            "scale on one of them changes both",
            remedy="Train without a scale there.",
        )
    if not untie:
        size = embedding_of(header).size / 2**20
        raise BaseModelError(
            f"{subject}, which the adapter scales apart; untying them adds {size:.1f} MiB",
            remedy="Accept that with --untie.",
        )
