"""The base model's `config.json`: read, resolved to a task, written for an artifact."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from propulsion_export.base_model.config_switches import (
    keep_switches_,
    reset_switches_,
)
from propulsion_export.base_model.gguf.files import small_files
from propulsion_export.base_model.hub import check_findable, copy_files, locate, only_cached
from propulsion_export.base_model.remote_code import AUTO_MAP, copy_code
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.environment.hub_files import refuse_pointers
from propulsion_export.environment.paths import user_path
from propulsion_export.environment.permissions import check_permission
from propulsion_export.environment.quiet import quiet
from propulsion_export.errors import ArtifactError, BaseModelError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


# Where transformers 4 (and optimum-onnx) looks for rotary settings. Version 5 saves them in
# rope_parameters, and an older reader would silently use its defaults.
_ROTARY_SETTINGS = ("rope_", "rotary_", "partial_rotary_", "global_rope_", "local_rope_")
# How a chat becomes one text; tokenizers load it by this name.
_CHAT_TEMPLATE = "chat_template.jinja"
_GENERATION_CONFIG = "generation_config.json"
# Endings of a configuration's and a tokenizer's files.
_SMALL_FILES = (".json", ".jinja", ".model", ".spm", ".txt", ".vocab", ".codes")
# What PEFT writes with every adapter.
_ADAPTER_CONFIG = "adapter_config.json"


def read_config(source: str, *, trust_remote_code: bool = False) -> "PretrainedConfig":
    """The configuration of a checkpoint, by path or name, with outputs in their usual form.

    Raises:
        BaseModelError: there is none, or it cannot be read.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    source = small_files(source)
    directory = user_path(source)
    if directory.is_dir() and not (directory / "config.json").is_file():
        _refuse_adapter(source)
        raise BaseModelError(f"{source}: has no config.json, expected a transformers checkpoint")
    check_findable(source)
    if directory.is_dir():
        refuse_pointers_in(directory)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(
                source,
                trust_remote_code=trust_remote_code,
                local_files_only=only_cached(source),
            )
    except StrictDataclassError as error:
        raise BaseModelError(
            f"{source}: its config.json is refused by transformers "
            f"({first_line(error.__cause__ or error)})"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        check_permission(source, BaseModelError)
        if locate(source, "config.json") is None:
            _refuse_adapter(source)
        raise BaseModelError(
            f"{source}: no transformers checkpoint can be loaded from there ({first_line(error)})",
            remedy="Give its directory with -m." if trust_remote_code else _remedy(source),
        ) from error
    reset_switches_(config)
    return config


def refuse_pointers_in(directory: Path) -> None:
    """Refuse a checkpoint of which only the pointers that git-lfs left are there.

    The tokenizer's too: transformers reports one that it cannot parse in many ways.

    Raises:
        BaseModelError: naming the small files that are pointers.
    """
    beside = [file for file in sorted(directory.iterdir()) if file.suffix in _SMALL_FILES]
    refuse_pointers(beside, BaseModelError)


def _remedy(source: str) -> str:
    """What helps when a configuration cannot be read without running code of the checkpoint."""
    if AUTO_MAP in settings_in(source, "config.json"):
        return "Read its code, then allow it with --trust-remote-code."
    return "Give its directory with -m."


def settings_in(source: str, name: str) -> dict[str, Any]:
    """The settings in a JSON file of a checkpoint; empty where it has none or it is damaged."""
    file = locate(source, name)
    try:
        return read_settings_file(file) if file is not None else {}
    except ArtifactError:
        return {}


def _refuse_adapter(source: str) -> None:
    """Say so if what was given as a base model is an adapter.

    Raises:
        BaseModelError: it is one; names the base model that it records.
    """
    if locate(source, _ADAPTER_CONFIG) is None:
        return
    base = settings_in(source, _ADAPTER_CONFIG).get("base_model_name_or_path")
    raise BaseModelError(
        f"{source}: is an adapter (it has {_ADAPTER_CONFIG} and no config.json), expected a base "
        "model",
        remedy=f"Give the base model with -m{f', such as {base}' if base else ''}.",
    )


def class_names(config: "PretrainedConfig") -> tuple[str, ...]:
    """The names of the checkpoint's classes, in the order of the logits."""
    return tuple(config.id2label[index] for index in sorted(config.id2label))


def save_config(
    model: "PreTrainedModel", directory: Path, dtype: str, *, for_graph: bool = False
) -> None:
    """Write `config.json` as the model class would, without the path it was loaded from.

    Rotary settings are also kept under the names that the base model's own file has. For a graph,
    what only a PyTorch model reads is left out: switches of the form of its outputs, and the code
    that the model brings, which is copied otherwise.
    """
    config = model.config
    config._auto_class = None  # save_pretrained would copy the module of the configuration alone
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    with quiet():
        config.save_pretrained(directory)
    file = directory / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content.pop("_name_or_path", None)
    written = _written_settings(config)
    content = _rotary_settings(written) | content
    content.pop(AUTO_MAP, None)
    if not for_graph:
        keep_switches_(content, written)
        content |= _code(config._name_or_path, directory)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def set_labels(config: "PretrainedConfig", labels: Sequence[str] | int) -> None:
    """Name the classes in a configuration, in the order of the logits."""
    names = [f"LABEL_{index}" for index in range(labels)] if isinstance(labels, int) else labels
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}


def save_generation_settings(source: str, task: str, directory: Path) -> None:
    """Write the default generation settings of a generative base model.

    Older checkpoints have them in config.json, which transformers still reads but no longer writes.
    """
    if not TASKS[task].generates or copy_generation_settings(source, directory):
        return
    from transformers import GenerationConfig

    with quiet():
        settings = GenerationConfig.from_pretrained(
            small_files(source),
            config_file_name="config.json",
            _from_model_config=True,
            local_files_only=only_cached(source),
        )
    text = settings.to_json_string()
    (directory / _GENERATION_CONFIG).write_text(text, encoding="utf-8")


def copy_generation_settings(source: str, directory: Path) -> bool:
    """Copy a generative base model's own files; returns whether it has generation settings."""
    copy_files((_GENERATION_CONFIG, _CHAT_TEMPLATE), small_files(source), directory)
    return (directory / _GENERATION_CONFIG).exists()


def _written_settings(config: "PretrainedConfig") -> dict[str, Any]:
    """The settings in the file that a configuration was read from, verbatim."""
    from transformers import PretrainedConfig

    if not config._name_or_path:
        return {}
    with quiet():
        written, _ = PretrainedConfig.get_config_dict(config._name_or_path)
    return dict(written)


def _code(source: str, directory: Path) -> dict[str, Any]:
    """The `auto_map` of a checkpoint, whose modules are copied; empty if it brings no code."""
    # Not as transformers reads it, which makes references to a hub of all of them.
    auto_map = settings_in(source, "config.json").get(AUTO_MAP) if source else None
    if auto_map is None:
        return {}
    copy_code(source, directory, auto_map)
    return {AUTO_MAP: auto_map}


def _rotary_settings(written: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in written.items() if name.startswith(_ROTARY_SETTINGS)}


def read_settings(directory: Path) -> dict[str, Any]:
    """The settings in a model's config.json; empty where there is no such file.

    Raises:
        ArtifactError: it is damaged.
    """
    return read_settings_file(directory / "config.json")


def read_settings_file(file: Path) -> dict[str, Any]:
    """The settings in a JSON file; empty where there is no such file.

    Raises:
        ArtifactError: it is no JSON object.
    """
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{file}: is no JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ArtifactError(f"{file}: is a {type(settings).__name__}, expected settings by name")
    return settings
