"""Give a model the number of embeddings that an adapter was trained with."""

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.base_model.loading import BaseModel, model_class_of
from propulsion_export.environment.quiet import quiet
from propulsion_export.errors import AdapterError

Shape = tuple[int, ...]


def resize_for_(
    base: BaseModel, adapter: Adapter, *, trust_remote_code: bool = False
) -> int | None:
    """Give a base model as many embeddings as an adapter brings, in place.

    The values of the new ones are arbitrary: the adapter replaces them.

    Returns, raises: as for `resized_rows`.
    """
    rows = resized_rows(adapter, base.task, base.model.config, trust_remote_code=trust_remote_code)
    if rows is not None:
        with quiet():
            base.model.resize_token_embeddings(rows, mean_resizing=False)
        base.model.requires_grad_(False)
    return rows


def resized_rows(
    adapter: Adapter,
    task: str,
    config: PretrainedConfig,
    *,
    trust_remote_code: bool = False,
) -> int | None:
    """The number of embeddings that an adapter brings; None where it is the model's own.

    Args:
        adapter: the adapter, with its saved modules and its copies of frozen parameters.
        task: the task that the base model is loaded for.
        config: the base model's configuration, which is not changed.
        trust_remote_code: run code that the base model brings.

    Raises:
        AdapterError: it brings only some of the parameters that have a row for each token, or
            scales a resized one.
    """
    saved = {
        name: tuple(values.shape) for name, values in adapter.modules.items() if values.ndim > 1
    }
    stored = {**saved, **adapter.frozen}
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if not stored or not isinstance(rows, int):
        return None
    shapes = _token_shapes(model_class_of(task), config, rows, trust_remote_code=trust_remote_code)
    brought = {name: shape for name, shape in stored.items() if name in shapes}
    found = {shape[0] for name, shape in brought.items() if shape != shapes[name]}
    if not found:
        return None
    lacking = sorted(shapes.keys() - saved.keys())
    if lacking or len(found) > 1:
        raise AdapterError(
            f"adapter {adapter.name}: its embeddings were resized from {rows} to "
            f"{' and '.join(map(str, sorted(found)))} rows, expected all of "
            f"{', '.join(sorted(shapes))} in that size and without a scale",
            remedy="Resize the base model, save it, and train on that.",
        )
    return int(found.pop())


def set_embedding_rows(config: PretrainedConfig, rows: int) -> None:
    """Say in a configuration how many tokens the model has embeddings for."""
    config.get_text_config().vocab_size = rows


def _token_shapes(
    model_class: Any, config: PretrainedConfig, rows: int, *, trust_remote_code: bool
) -> dict[str, Shape]:
    """The shapes of all tensors that have a row for each token, found by trying another number."""
    own, other = (
        _shapes(model_class, config, count, trust_remote_code=trust_remote_code)
        for count in (rows, rows + 8)
    )
    return {name: shape for name, shape in own.items() if other[name] != shape}


def _shapes(
    model_class: Any, config: PretrainedConfig, rows: int, *, trust_remote_code: bool
) -> dict[str, Shape]:
    trial = type(config).from_dict(config.to_dict())
    set_embedding_rows(trial, rows)
    with torch.device("meta"), quiet():
        model: nn.Module = model_class.from_config(trial, trust_remote_code=trust_remote_code)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
