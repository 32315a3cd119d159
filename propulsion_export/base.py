"""Load a base model for a task, and refuse to go on with weights that nobody trained."""

import inspect
import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from propulsion_export.adapter import Adapter
from propulsion_export.errors import BaseModelError, UsageError
from propulsion_export.hub import locate
from propulsion_export.quiet import quiet

GENERATIVE_TASKS = ("text-generation", "text2text-generation")
TASKS = (
    "feature-extraction",
    "text-classification",
    "token-classification",
    "question-answering",
    "fill-mask",
    *GENERATIVE_TASKS,
)
LABELLED = ("text-classification", "token-classification")
_TASK_OF_CLASS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "text2text-generation",
}
# Where transformers 4 (and optimum-onnx) looks for rotary settings. Version 5 saves them elsewhere,
# in rope_parameters, and an older reader would compute with its defaults without a word.
_ROTARY_SETTINGS = ("rope_", "rotary_", "partial_rotary_", "global_rope_", "local_rope_")
# Copied verbatim, so that any version of transformers reads what its own made.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
# How texts are generated, and how a chat becomes one text: read by name beside the tokenizer.
_CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Base:
    """A base model ready for an adapter.

    Attributes:
        model: in evaluation mode, in the dtype asked for.
        source: its name or path.
        task: never `auto`.
        missing: names of parameters that the checkpoint does not have.
        label_parameters: names of parameters whose first dimension counts labels.
        own_labels: class names in the checkpoint's configuration, whatever room was made.
    """

    model: PreTrainedModel
    source: str
    task: str
    missing: frozenset[str]
    label_parameters: frozenset[str]
    own_labels: tuple[str, ...]

    @property
    def room(self) -> int | None:
        """How many labels the model's head has room for; None without such a head."""
        parameters = self.model.named_parameters()
        return next((p.shape[0] for name, p in parameters if name in self.label_parameters), None)

    @property
    def own_head(self) -> bool:
        """Whether the checkpoint has all of the head that counts labels, or needs none."""
        return not self.label_parameters & self.missing

    def make_room_(self, labels: int, names: Sequence[str] = ()) -> None:
        """Let the head have `labels` labels: zeros behind the checkpoint's, `names` in front."""
        for name in self.label_parameters:
            path, _, parameter = name.rpartition(".")
            module = self.model.get_submodule(path)
            values = getattr(module, parameter)
            resized = values.new_zeros((labels, *values.shape[1:]))
            resized[: len(values)] = values[:labels]
            setattr(module, parameter, nn.Parameter(resized, requires_grad=False))
            if isinstance(module, nn.Linear):
                module.out_features = labels
        unnamed = (f"LABEL_{index}" for index in range(len(names), labels))
        set_labels(self.model.config, [*names, *unnamed])

    def check_complete(self, supplied: Collection[str]) -> None:
        """Refuse parameters that neither the checkpoint nor `supplied` (an adapter's head) has.

        Raises:
            BaseModelError: naming them; exported, they would be random numbers.
        """
        random = sorted(self.missing - set(supplied))
        if random:
            raise BaseModelError(
                *(
                    f"{self.source}: {name} is neither in the checkpoint nor in the adapter, or "
                    "not in this width"
                    for name in random
                ),
                remedy=f"Give another --task than {self.task}, or train the head with the adapter.",
            )


def resolve_task(task: str, config: PretrainedConfig, adapters: Sequence[Adapter] = ()) -> str:
    """Turn `auto` into a task: the adapters' own, else that of the checkpoint's architecture.

    Raises:
        UsageError: the adapters are of different tasks, or the task is not one of `TASKS`.
    """
    if task == "auto":
        told = {adapter.task for adapter in adapters if adapter.task}
        if len(told) > 1:
            raise UsageError(
                f"the adapters are of the tasks {', '.join(sorted(told))}, expected one",
                remedy="Say which with --task.",
            )
        task = told.pop() if told else _task_of_architecture(config)
    if task not in TASKS:
        raise UsageError(
            f"task {task!r} is not supported, expected one of auto, {', '.join(TASKS)}"
        )
    return task


def read_config(source: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a checkpoint, by path or name.

    Raises:
        BaseModelError: there is none, or it cannot be read.
    """
    directory = Path(source).expanduser()
    if directory.is_dir() and not (directory / "config.json").is_file():
        raise BaseModelError(f"{source}: has no config.json, expected a transformers checkpoint")
    if not directory.exists() and (source.startswith(("/", ".", "~")) or source.count("/") > 1):
        # No name on a hub looks so; asking there takes long where there is no network.
        raise BaseModelError(
            f"{source}: does not exist, expected a directory with a transformers checkpoint",
            remedy="Say where the base model lies with -m.",
        )
    try:
        with quiet():
            return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(
            f"{source}: no transformers checkpoint can be loaded from there ({_first_line(error)})",
            remedy="Give its directory with -m.",
        ) from error


def load_base(
    source: str,
    *,
    task: str,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Base:
    """Load a checkpoint's safetensors for `task`, in `dtype` (None: the checkpoint's own).

    Args:
        source: directory or name.
        task: one of `TASKS`.
        dtype: floating-point type of the weights.
        trust_remote_code: run code that the checkpoint brings.

    Raises:
        BaseModelError: it cannot be loaded.
    """
    config = read_config(source, trust_remote_code=trust_remote_code)
    model_class = model_class_of(task)
    model, missing = _load(model_class, source, config, dtype, trust_remote_code)
    poolerless = {name for name in missing if ".pooler." in f".{name}"}
    if task == "feature-extraction" and poolerless and _may_drop_pooler(model):
        # The checkpoint has no pooling layer: leave it out rather than export a random one.
        model, missing = _load(
            model_class, source, config, dtype, trust_remote_code, add_pooling_layer=False
        )
    return Base(
        model=model.eval().requires_grad_(False),
        source=source,
        task=task,
        missing=frozenset(missing),
        label_parameters=label_parameters(
            model_class, config, task, trust_remote_code=trust_remote_code
        ),
        own_labels=class_names(config),
    )


def class_names(config: PretrainedConfig) -> tuple[str, ...]:
    """Names of the classes that the checkpoint's head tells apart."""
    return tuple(config.id2label[index] for index in sorted(config.id2label))


def load_empty(
    config: PretrainedConfig, task: str, adapter: Adapter, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model for `task` without its weights, on the meta device, its head sized for `adapter`.

    Its configuration names the adapter's labels.
    """
    model_class = model_class_of(task)
    growing = label_parameters(model_class, config, task, trust_remote_code=trust_remote_code)
    count = next((v.shape[0] for name, v in adapter.modules.items() if name in growing), None)
    if count is not None:
        set_labels(config, adapter.labels or count)
    with torch.device("meta"), quiet():
        model = model_class.from_config(config, trust_remote_code=trust_remote_code)
    return model.eval()


def save_config(model: PreTrainedModel, directory: Path, dtype: str) -> None:
    """Write `config.json` as the model class would, without the path it was loaded from.

    Rotary settings stay, besides, where the base model's own file has them.
    """
    config = model.config
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    with quiet():
        config.save_pretrained(directory)
    file = directory / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content.pop("_name_or_path", None)
    content = _rotary_settings(config) | content
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def set_labels(config: PretrainedConfig, labels: Sequence[str] | int) -> None:
    """Name the classes in a configuration, in the order of the logits."""
    names = [f"LABEL_{index}" for index in range(labels)] if isinstance(labels, int) else labels
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}


def label_parameters(
    model_class: Any, config: PretrainedConfig, task: str, *, trust_remote_code: bool = False
) -> frozenset[str]:
    """Names of parameters whose shape depends on the number of labels, found by trying two."""
    if task not in LABELLED:
        return frozenset()
    shapes = []
    for count in (3, 5):
        trial = type(config).from_dict(config.to_dict())
        set_labels(trial, count)
        with torch.device("meta"), quiet():
            model = model_class.from_config(trial, trust_remote_code=trust_remote_code)
        shapes.append({name: value.shape for name, value in model.named_parameters()})
    return frozenset(name for name, shape in shapes[0].items() if shapes[1][name] != shape)


def model_class_of(task: str) -> Any:
    """The transformers auto class of a task, from optimum's table."""
    with quiet():
        from optimum.exporters.tasks import TasksManager

        return TasksManager.get_model_class_for_task(task)


def copy_tokenizer(source: str, directory: Path) -> None:
    """Copy the tokenizer's files, unchanged, from a checkpoint; there may be none."""
    _copy(TOKENIZER_FILES, source, directory)


def save_generation_settings(source: str, task: str, directory: Path) -> None:
    """Write how a generative base model writes by default, as its checkpoint says.

    Older checkpoints say so in config.json, from where transformers reads it but to where it writes
    it no more.
    """
    if task not in GENERATIVE_TASKS:
        return
    _copy((GENERATION_CONFIG_NAME, _CHAT_TEMPLATE), source, directory)
    if not (directory / GENERATION_CONFIG_NAME).exists():
        with quiet():
            settings = GenerationConfig.from_pretrained(
                source, config_file_name=CONFIG_NAME, _from_model_config=True
            )
        file = directory / GENERATION_CONFIG_NAME
        file.write_text(settings.to_json_string(), encoding="utf-8")


def _copy(names: Sequence[str], source: str, directory: Path) -> None:
    for name in names:
        file = locate(source, name)
        if file is not None:
            shutil.copyfile(file, directory / name)


def read_tokenizer(source: str | Path) -> Any | None:
    """The tokenizer of a checkpoint or artifact, or None when it has none."""
    directory = Path(source)
    if directory.is_dir() and not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError):
        return None


def _load(
    model_class: Any,
    source: str,
    config: PretrainedConfig,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    **constructor: bool,
) -> tuple[PreTrainedModel, set[str]]:
    try:
        with quiet():
            model, info = model_class.from_pretrained(
                source,
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                **constructor,
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise BaseModelError(
            f"{source}: cannot be loaded ({_first_line(error)})",
            remedy="Expected a complete transformers checkpoint in safetensors.",
        ) from error
    # A head of another size is as good as missing: it was made at random.
    mismatched = {entry[0] for entry in info["mismatched_keys"]}
    return model, set(info["missing_keys"]) | mismatched


def _rotary_settings(config: PretrainedConfig) -> dict[str, Any]:
    """What the file that a configuration was read from says of rotary embeddings, verbatim."""
    if not config._name_or_path:
        return {}
    with quiet():
        written, _ = PretrainedConfig.get_config_dict(config._name_or_path)
    return {name: value for name, value in written.items() if name.startswith(_ROTARY_SETTINGS)}


def _may_drop_pooler(model: PreTrainedModel) -> bool:
    return "add_pooling_layer" in inspect.signature(type(model).__init__).parameters


def _task_of_architecture(config: PretrainedConfig) -> str:
    for architecture in config.architectures or ():
        for ending, task in _TASK_OF_CLASS.items():
            if architecture.endswith(ending):
                return task
    return "feature-extraction"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
