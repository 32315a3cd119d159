"""Load a base model for a task, and refuse weights that are random because none are stored."""

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.auto_factory import _get_model_class

from propulsion_export.base_model.config import class_names, read_config, set_labels
from propulsion_export.base_model.gguf.files import small_files
from propulsion_export.base_model.gguf.weights import gguf_tensors
from propulsion_export.base_model.hub import only_cached
from propulsion_export.base_model.recomputed import recomputed_parameters
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.environment.hub_files import refuse_pointers
from propulsion_export.environment.paths import user_path
from propulsion_export.environment.permissions import check_permission
from propulsion_export.environment.quiet import quiet
from propulsion_export.errors import BaseModelError, first_line

# transformers also loads an adapter that it finds beside the weights, onto the model. Told to look
# in a folder that no model has, it finds none. Remove when from_pretrained can be told not to look.
_NO_ADAPTER = {"subfolder": "propulsion-export-loads-no-adapter", "local_files_only": True}


@dataclass(frozen=True)
class BaseModel:
    """A base model ready for an adapter.

    Attributes:
        model: the model in evaluation mode, in the dtype asked for.
        source: the model's name or path.
        task: the task, never `auto`.
        missing: names of parameters that the checkpoint does not have.
        label_parameters: names of parameters whose first dimension counts labels.
        own_labels: the class names in the checkpoint's configuration; `make_room_` keeps them.
    """

    model: PreTrainedModel
    source: str
    task: str
    missing: frozenset[str]
    label_parameters: frozenset[str]
    own_labels: tuple[str, ...]

    @property
    def room(self) -> int | None:
        """The number of labels that the model's head has room for; None without such a head."""
        parameters = self.model.named_parameters()
        return next((p.shape[0] for name, p in parameters if name in self.label_parameters), None)

    @property
    def own_head(self) -> bool:
        """Whether the checkpoint has the whole head for labels, or the task needs none."""
        return not self.label_parameters & self.missing

    def make_room_(self, labels: int, names: Sequence[str] = ()) -> None:
        """Resize the head to `labels` labels: new rows are zero, the first are called `names`."""
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
            BaseModelError: there are such parameters; exported, they would be random numbers.
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


def load_base(
    source: str,
    *,
    task: str,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> BaseModel:
    """Load a checkpoint's weights for `task`, in `dtype` (None: the checkpoint's own).

    Args:
        source: directory or name of a checkpoint in safetensors, or a GGUF file, whose own dtype is
            float32.
        task: one of `TASKS`.
        dtype: the floating-point dtype of the weights.
        trust_remote_code: run code that the checkpoint brings.

    Raises:
        BaseModelError: the checkpoint cannot be loaded.
    """
    config = read_config(source, trust_remote_code=trust_remote_code)
    _refuse_halves(config, task)
    model_class = model_class_of(task)
    model, missing = load_model(
        model_class, source, config, dtype=dtype, trust_remote_code=trust_remote_code
    )
    poolerless = {name for name in missing if ".pooler." in f".{name}"}
    if TASKS[task].prediction == "embedding" and poolerless and _may_drop_pooler(model):
        # The checkpoint has no pooling layer: leave it out rather than export a random one.
        model, missing = load_model(
            model_class,
            source,
            config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            add_pooling_layer=False,
        )
    return BaseModel(
        model=model.eval().requires_grad_(False),
        source=source,
        task=task,
        missing=frozenset(missing),
        label_parameters=label_parameters(
            model_class, config, task, trust_remote_code=trust_remote_code
        ),
        own_labels=class_names(config),
    )


def _refuse_halves(config: PretrainedConfig, task: str) -> None:
    """Refuse the encoder of an encoder-decoder, which the auto class would load with a decoder."""
    whole = getattr(transformers.AutoModel._model_mapping.get(type(config), None), "__name__", None)
    halves = [name for name in config.architectures or () if name.endswith("EncoderModel")]
    if halves and whole not in (None, *halves) and TASKS[task].prediction == "embedding":
        raise BaseModelError(
            f"{config.name_or_path}: is a {halves[0]}, a part of {whole}, expected the whole model"
        )


def load_empty(
    config: PretrainedConfig,
    task: str,
    *,
    head: Mapping[str, Any],
    labels: Sequence[str] | None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model for `task` without its weights, on the meta device.

    Args:
        config: the checkpoint's configuration, which gets the labels of the head, or keeps its own
            if a head without names is as wide.
        task: one of `TASKS`.
        head: an adapter's saved modules by parameter name, which give the head's size.
        labels: the adapter's class names.
        trust_remote_code: run code that the checkpoint brings.

    Raises:
        BaseModelError: transformers has no model for the task of this configuration.
    """
    _refuse_halves(config, task)
    model_class = model_class_of(task)
    growing = label_parameters(model_class, config, task, trust_remote_code=trust_remote_code)
    count = next((v.shape[0] for name, v in head.items() if name in growing), None)
    if count is not None and (labels or count != config.num_labels):
        set_labels(config, labels or count)
    return _empty(model_class, config, trust_remote_code=trust_remote_code).eval()


def _empty(
    model_class: Any, config: PretrainedConfig, *, trust_remote_code: bool
) -> PreTrainedModel:
    try:
        with torch.device("meta"), quiet():
            model: PreTrainedModel = model_class.from_config(
                config, trust_remote_code=trust_remote_code
            )
    except ValueError as error:
        raise BaseModelError(
            f"{config.name_or_path}: is a {config.model_type}, expected a configuration that "
            f"{model_class.__name__} takes ({first_line(error)})",
            remedy="Is it for another --task?",
        ) from error
    return model


def label_parameters(
    model_class: Any, config: PretrainedConfig, task: str, *, trust_remote_code: bool = False
) -> frozenset[str]:
    """Names of parameters whose shape depends on the number of labels, found by trying two."""
    if TASKS[task].labelled_output is None:
        return frozenset()
    shapes = []
    for count in (3, 5):
        trial = type(config).from_dict(config.to_dict())
        set_labels(trial, count)
        model = _empty(model_class, trial, trust_remote_code=trust_remote_code)
        shapes.append({name: value.shape for name, value in model.named_parameters()})
    return frozenset(name for name, shape in shapes[0].items() if shapes[1][name] != shape)


def model_class_of(task: str) -> Any:
    """The transformers auto class that loads models of a task."""
    return getattr(transformers, TASKS[task].auto_class)


def load_model(
    model_class: Any,
    source: str,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    **constructor: bool,
) -> tuple[PreTrainedModel, set[str]]:
    """A checkpoint's weights in a model, without an adapter that lies beside them.

    Args:
        model_class: one of transformers' auto classes.
        source: directory or name of a checkpoint in safetensors, or a GGUF file.
        config: the model's configuration.
        dtype: the floating-point dtype of the weights; None: the checkpoint's own.
        trust_remote_code: run code that the checkpoint brings.
        constructor: arguments of the model's class.

    Returns:
        The model, and the names of parameters that the checkpoint lacks, or of its head that it has
        in another shape; their values are random.

    Raises:
        BaseModelError: the checkpoint cannot be loaded, or its weights have other shapes than its
            config.json says.
    """
    tensors = gguf_tensors(source)
    if tensors is not None:  # an auto class loads from a directory alone
        model_class = _class_for(model_class, config, source)
    try:
        with quiet():
            model, info = model_class.from_pretrained(
                source if tensors is None else None,
                config=config,
                state_dict=tensors,
                dtype=dtype or ("auto" if tensors is None else torch.float32),
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                local_files_only=tensors is None and only_cached(source),
                adapter_kwargs=_NO_ADAPTER,
                **constructor,
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        check_permission(source, BaseModelError)
        refuse_pointers(sorted(user_path(source).glob("*.safetensors")), BaseModelError)
        raise BaseModelError(
            f"{source}: cannot be loaded ({first_line(error)})",
            remedy="Expected a complete transformers checkpoint in safetensors.",
        ) from error
    if tensors is not None:
        _name_files_(model, small_files(source))
    _refuse_other_shapes(source, model, info["mismatched_keys"])
    mismatched = {entry[0] for entry in info["mismatched_keys"]}
    return model, (set(info["missing_keys"]) - recomputed_parameters(model)) | mismatched


def _class_for(auto_class: Any, config: PretrainedConfig, source: str) -> Any:
    if type(config) not in auto_class._model_mapping:
        raise BaseModelError(
            f"{source}: transformers has no {auto_class.__name__} of the type {config.model_type}"
        )
    return _get_model_class(config, auto_class._model_mapping)


def _name_files_(model: PreTrainedModel, directory: str) -> None:
    """Set what transformers reads from a checkpoint's directory beside its weights."""
    model.config._name_or_path = model.name_or_path = directory
    if model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)


def _refuse_other_shapes(
    source: str, model: PreTrainedModel, mismatched: Iterable[tuple[str, Any, Any]]
) -> None:
    """Refuse parameters inside the base model in another shape; a head may be for other labels."""
    prefix = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    wrong = [
        f"{source}: {name} has the shape {list(stored)}, expected {list(expected)} by config.json"
        for name, stored, expected in mismatched
        if name.startswith(prefix)
    ]
    if wrong:
        raise BaseModelError(
            *wrong,
            remedy="Were its embeddings resized? Save the model with its config.json.",
        )


def _may_drop_pooler(model: PreTrainedModel) -> bool:
    return "add_pooling_layer" in inspect.signature(type(model).__init__).parameters
