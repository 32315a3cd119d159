"""The case `settings`: how text is generated, how chats are rendered, in which dtype weights load.

The first two are what the base model's files, or an adapter's, say.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from propulsion_export.adapters.own_template import own_template
from propulsion_export.adapters.own_tokenizer import has_own_tokenizer
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.chat.templates import read_template, template_in
from propulsion_export.base_model.config import (
    read_settings,
    read_settings_file,
    save_generation_settings,
)
from propulsion_export.base_model.generation_settings import (
    GENERATION_CONFIG,
    first_decoder_token,
)
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.parity.reports.report import Check, Coverage

# What says nothing about the text: versions, and the token that fills up rows, which training and
# batches may change.
_IGNORED = ("transformers_version", "_from_model_config", "pad_token_id", "dtype", "torch_dtype")
_START = "decoder_start_token_id"
_WHAT = "generation settings and chat templates"


def check_settings(
    artifact: Artifact, base: BaseModel, directories: Mapping[str, Path]
) -> tuple[list[Check], list[Coverage]]:
    """Compare what other programs read of an artifact with what it should be.

    Generation settings are compared with the base model's, chat templates with their owners', and
    the dtype that a merged checkpoint is loaded in with that of its weights.

    Args:
        artifact: what is judged.
        base: its base model.
        directories: where the adapters are, by name.

    Returns:
        One check, and what it covers; nothing where there is nothing of these.
    """
    if not TASKS[base.task].generates:
        findings = _dtype(artifact)
        return [Check("settings", "all", False, each) for each in findings], []
    expected = _settings(base.source, base.task)
    found = _settings(str(artifact.directory), base.task)
    findings = [*_dtype(artifact), *_differences(expected, found)]
    findings += _templates(artifact, base.source, directories)
    if TASKS[base.task].architecture == "encoder-decoder":
        findings += _starts(artifact, base, expected)
    detail = "; ".join(findings) or "the artifact generates with the settings of its base model"
    count = f"{len(expected)} settings, and the templates of {1 + len(directories)} states"
    return [Check("settings", "all", not findings, detail)], [Coverage(_WHAT, True, count)]


def _dtype(artifact: Artifact) -> list[str]:
    """What is wrong with the dtype that transformers loads a checkpoint in, by default."""
    settings, expected = read_settings(artifact.directory), artifact.manifest.dtype
    found = settings.get("dtype") or settings.get("torch_dtype") or expected
    if artifact.manifest.kind != "merged" or found == expected:
        return []
    return [f"config.json: transformers loads the weights in {found}, they are {expected}"]


def _settings(source: str, task: str) -> dict[str, Any]:
    """The settings of generation_config.json, or those that config.json stands in for."""
    with tempfile.TemporaryDirectory() as place:
        save_generation_settings(source, task, Path(place))
        values = read_settings_file(Path(place) / GENERATION_CONFIG)
    return {n: v for n, v in values.items() if n not in _IGNORED and v is not None}


def _differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    return [
        f"generation_config.json: {name} is {found.get(name)!r}, expected {expected.get(name)!r}"
        for name in sorted(expected.keys() | found.keys())
        if found.get(name) != expected.get(name)
    ]


def _starts(artifact: Artifact, base: BaseModel, settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with the token that a decoder begins with."""
    expected = settings.get(_START, getattr(base.model.config, _START, None))
    if isinstance(expected, list):
        expected = next(iter(expected), None)
    found = first_decoder_token(artifact.directory)
    if expected is None or found == expected:
        return []
    return [f"config.json: the decoder begins with token {found}, expected {expected}"]


def _templates(artifact: Artifact, base: str, directories: Mapping[str, Path]) -> Iterator[str]:
    """What is wrong with the chat templates that adapters are used with.

    Without one of its own, an adapter has the base model's; where that has none, it is the first
    adapter's, which may have been removed since.
    """
    common, entries = read_template(artifact.directory), artifact.list_adapters()
    brought = any(map(has_own_tokenizer, directories.values()))
    default = None if brought else template_in(base)
    # An artifact that holds no adapter apart has had no other adapter to take one from.
    settled = artifact.manifest.mode == "folded" and not brought
    for name, directory in directories.items():
        expected = own_template(directory) or default
        found = entries[name].chat_template or common
        if found != expected and (settled or expected is not None):
            yield f"the chat template of {name} is not the one that it was trained with"
    if not directories and common != default and (settled or default is not None):
        yield "the chat template is not the base model's"
