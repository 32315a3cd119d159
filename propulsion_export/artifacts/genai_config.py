"""What `genai_config.json` says about the cache of a graph of onnxruntime-genai's builder."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from propulsion_export.artifacts.file_names import GENAI_CONFIG_FILE
from propulsion_export.artifacts.manifest import TensorSpec
from propulsion_export.artifacts.tensor_names import PAST
from propulsion_export.errors import ArtifactError

_KINDS = ("key", "value")


def read_genai_config(directory: Path) -> dict[str, Any]:
    """The content of `genai_config.json`.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    file = directory / GENAI_CONFIG_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{file}: cannot be read ({error}), expected what onnxruntime-genai's builder wrote",
            remedy="Copy the whole directory again, or export again.",
        ) from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{file}: is a {type(content).__name__}, expected settings by name")
    return content


def with_cache_sizes(inputs: Sequence[TensorSpec], directory: Path) -> tuple[TensorSpec, ...]:
    """The inputs of a graph of the builder, the sizes of its cache filled in.

    The builder leaves the width of keys and values open. The cache of a layer with a sliding window
    never grows: it has room for the window, from the first step on.

    Args:
        inputs: of the graph, as in the manifest.
        directory: where its `genai_config.json` is.

    Raises:
        ArtifactError: the file is damaged, or names no such sizes.
    """
    content = read_genai_config(directory)
    try:
        decoder = content["model"]["decoder"]
        width, window = int(decoder["head_size"]), decoder.get("sliding_window")
        layers = {int(layer) for layer in window["layers"]} if window else set()
        room = int(window["window_size"]) + int(window.get("cache_slack", 0)) if layers else 0
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{directory / GENAI_CONFIG_FILE}: has no sizes of a cache ({error!r})",
            remedy="Copy the whole directory again, or export again.",
        ) from error
    return tuple(_sized(spec, width, room if _layer(spec) in layers else None) for spec in inputs)


def _layer(spec: TensorSpec) -> int | None:
    """The layer whose keys or values an input is; None for other inputs."""
    prefix, _, rest = spec.name.partition(".")
    number, _, kind = rest.partition(".")
    return int(number) if prefix == PAST and kind in _KINDS and number.isdecimal() else None


def _sized(spec: TensorSpec, width: int, room: int | None) -> TensorSpec:
    """The cache of a layer, [batch, heads, past, width]; `room`: its length if it never grows."""
    if _layer(spec) is None:
        return spec
    batch, heads, length, _ = spec.shape
    return replace(spec, shape=(batch, heads, length if room is None else room, width))
