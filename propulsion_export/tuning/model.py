"""Propulsion on a whole model: the tuner class that PEFT calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.model_fingerprint import (
    fingerprint_of_model,
    has_readable_weights,
)
from propulsion_export.base_model.settings import PROBLEM_TYPES
from propulsion_export.base_model.tasks import TASKS, task_of_peft
from propulsion_export.errors import BaseModelError, UsageError
from propulsion_export.scaling.expert_rules import expert_weights, is_experts
from propulsion_export.tuning.config import PropulsionConfig
from propulsion_export.tuning.experts import PropulsionExperts
from propulsion_export.tuning.layer import PropulsionLayer
from propulsion_export.tuning.placement import is_excluded, resolve_targets


class PropulsionModel(BaseTuner):  # type: ignore[misc]
    """A base model with Propulsion adapters, as `peft.get_peft_model` creates it.

    Attaching an adapter freezes the base, and records its fingerprint in the adapter's
    configuration or, for a loaded adapter, checks it.
    """

    prefix: str = "propulsion_"
    tuner_layer_cls = PropulsionLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, **options: Any) -> None:
        # The fingerprint goes into a copy: the caller may use one configuration for two models.
        config = copy(self.peft_config[adapter_name])
        self.peft_config[adapter_name] = config
        if config.modules_to_save is None:
            # For these tasks PEFT sets it later, but only in the caller's configuration.
            task = task_of_peft(str(config.task_type))
            heads = TASKS[task].peft_heads if task else ()
            config.modules_to_save = list(heads) or None
        super().inject_adapter(model, adapter_name, **options)

    def _prepare_adapter_config(
        self, peft_config: PeftConfig, model_config: dict[str, Any]
    ) -> PeftConfig:
        return peft_config  # a preset stays its name; `_prepare_model` resolves it

    def _prepare_model(self, peft_config: PropulsionConfig, model: nn.Module) -> None:
        """Check everything that can be checked before any module is replaced."""
        _check_unmerged(model)
        self._targets = resolve_targets(model, peft_config)
        peft_config.scaled_modules = sum(
            len(expert_weights(_unwrapped(model.get_submodule(path)))) or 1
            for path in self._targets
            if is_excluded(peft_config, path) is None
        )
        _record_problem_type(model, peft_config)
        if has_readable_weights(model):
            _record_or_check_fingerprint(model, peft_config)

    def _check_target_module_exists(self, peft_config: PropulsionConfig, key: str) -> object:
        excluded = is_excluded(peft_config, key)
        return key in self._targets if excluded is None else excluded

    def _create_and_replace(
        self,
        peft_config: PropulsionConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, PropulsionLayer):
            target.update_layer(adapter_name, peft_config)
            return
        wrapper = PropulsionExperts if is_experts(target) else PropulsionLayer
        layer = wrapper(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if is_experts(new_module):  # taken out of its wrapper; PEFT would look for its `weight`
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_tied_modules(self, model: nn.Module, peft_config: PropulsionConfig) -> None:
        # PEFT's warning is right about modules to save, but not about targets: a scale on one of
        # two tied modules does not affect the other. So PEFT sees a preset's name as target.
        shown = copy(peft_config)
        shown.target_modules = "all"
        super()._check_tied_modules(model, shown)

    def _check_merge_allowed(self) -> None:
        """Skip PEFT's warning of tied weights: our merge unties a weight and changes no other."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT would drop the argument silently, and every row would get the active adapter.
        if kwargs.get("adapter_names") is not None:
            raise UsageError(
                "adapter_names: a batch with a different adapter in each row is not supported",
                remedy="Run the rows of each adapter separately, with set_adapter.",
            )
        yield


def _unwrapped(module: nn.Module) -> nn.Module:
    layer: nn.Module = module.get_base_layer() if isinstance(module, PropulsionLayer) else module
    return layer


def _check_unmerged(model: nn.Module) -> None:
    merged = [
        path
        for path, module in model.named_modules()
        if isinstance(module, PropulsionLayer) and module.merged
    ]
    if merged:
        raise UsageError(
            f"{merged[0]}: an adapter is merged, expected the base model's own weights",
            remedy="Call unmerge_adapter() before adding another adapter.",
        )


def _record_problem_type(model: nn.Module, config: PropulsionConfig) -> None:
    """Record what the labels to train on mean, which the base model's own file may not say."""
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    task = task_of_peft(str(config.task_type))
    if task is None or TASKS[task].prediction != "class" or config.inference_mode:
        return
    if kind in PROBLEM_TYPES:
        config.model_settings = {"problem_type": kind, **(config.model_settings or {})}


def _record_or_check_fingerprint(model: nn.Module, config: PropulsionConfig) -> None:
    found = fingerprint_of_model(model)
    if config.base_fingerprint is None:
        config.base_fingerprint = found.to_json()
        return
    try:
        recorded = Fingerprint.from_json(config.base_fingerprint)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"base_fingerprint: is damaged ({error!r})") from error
    difference = recorded.difference(found)
    if difference:
        raise BaseModelError(
            f"{type(model).__name__}: the adapter belongs to another base model: {difference}",
            remedy="Load the base model the adapter was trained on.",
        )
