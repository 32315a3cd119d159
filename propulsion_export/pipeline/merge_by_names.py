"""Prepare a merge from config.json and the names of the stored tensors alone.

It takes milliseconds where importing torch and transformers takes as long as copying gigabytes. It
prepares what `merge_by_model` would, or nothing: whatever is not certain, and every refusal that a
model is needed for, is left to that.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from propulsion_export.adapters.own_template import own_template
from propulsion_export.adapters.own_tokenizer import has_own_tokenizer
from propulsion_export.adapters.provenance import adapter_tasks, check_base
from propulsion_export.artifacts.layout import labels_in
from propulsion_export.artifacts.manifest import AdapterEntry, BaseEntry, Manifest
from propulsion_export.base_model.chat.templates import write_template
from propulsion_export.base_model.checkpoint import Checkpoint
from propulsion_export.base_model.config import (
    copy_generation_settings,
    refuse_pointers_in,
    settings_in,
)
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.gguf.source import find_gguf
from propulsion_export.base_model.remote_code import AUTO_MAP
from propulsion_export.base_model.settings import Settings, write_tokenizer_settings
from propulsion_export.base_model.tasks import resolve_task
from propulsion_export.base_model.tokenizer.files import TOKENIZER_CONFIG, tokenizer_files
from propulsion_export.base_model.tokenizer.ids_in_files import all_ids_below
from propulsion_export.base_model.tokenizer.reading import copy_tokenizer
from propulsion_export.environment.paths import user_path
from propulsion_export.merging.plain_models import fitting_modules, plain_fingerprint, plain_jobs
from propulsion_export.merging.plan import Plan, plan_changes
from propulsion_export.merging.quantised.modules import PlainRule
from propulsion_export.pipeline.base_settings import Settled
from propulsion_export.pipeline.merge_request import MergeRequest, Prepared, merged_manifest
from propulsion_export.pipeline.quantised_base import QuantisedBase

_TASK = "text-generation"
_CONFIG = "config.json"
# What changes how a model is built or read, by its name in config.json.
_SPECIAL = (AUTO_MAP, "text_config", "pruned_heads")


def prepare_by_names(request: MergeRequest) -> Prepared | None:
    """What `prepare_by_model` returns; None where names alone do not tell.

    Raises:
        BaseModelError: the adapter was trained on another base model; a weight file is damaged.
        AdapterError: a norm or a bias is too large for its dtype.
    """
    settings = settings_in(request.source, _CONFIG) if _is_plain_directory(request) else {}
    if not settings or not _is_usual(request, settings):
        return None
    checkpoint, read = Checkpoint.find(request.source), request.adapter
    quantised = QuantisedBase.find(checkpoint)
    if quantised is not None:
        return _prepare_quantised(request, settings, quantised)
    jobs = plain_jobs(settings, checkpoint, read)
    if jobs is None:
        return None
    fingerprint = plain_fingerprint(checkpoint)
    check_base(fingerprint, request.source, [read])
    plan = plan_changes(checkpoint, jobs, read)
    manifest = _manifest(request, fingerprint, plan)
    write = partial(_write_small_files, request, settings, manifest.dtype)
    return Prepared(checkpoint, plan, manifest, _note(request), write)


def _prepare_quantised(
    request: MergeRequest, settings: Mapping[str, Any], base: QuantisedBase
) -> Prepared | None:
    """The same for a quantised base model."""
    modules = fitting_modules(settings, request.adapter)
    if modules is None or not base.holds(modules):
        return None
    fingerprint = base.fingerprint(request.adapter.fingerprint)
    check_base(fingerprint, request.source, [request.adapter])
    rules: dict[str, PlainRule] = {module.path: module.rule for module in modules}
    plan = base.plan(request.adapter, rules.get)
    manifest = base.manifest(_manifest(request, fingerprint, plan))
    merged = {**settings, **base.settings}
    write = partial(_write_small_files, request, merged, manifest.dtype)
    return Prepared(base.checkpoint, plan, manifest, _note(request), write)


def _manifest(request: MergeRequest, fingerprint: Fingerprint, plan: Plan) -> Manifest:
    read = request.adapter
    base = BaseEntry(request.source, fingerprint, None, True, None)
    labels = labels_in(read, {}, None)
    entry = AdapterEntry(read.digest, request.directory, read.size, None, labels, None)
    return merged_manifest(request, entry, base, resolve_task(_TASK, ()), plan)


def _note(request: MergeRequest) -> str:
    """What the adapter brings beside its weights."""
    return Settled(_tokenizer_settings(request)).note


def _is_plain_directory(request: MergeRequest) -> bool:
    """Whether the base model is a directory of safetensors with a config.json."""
    whole = (user_path(request.source) / _CONFIG).is_file()
    return whole and not request.trust_remote_code and find_gguf(request.source) is None


def _is_usual(request: MergeRequest, settings: Mapping[str, Any]) -> bool:
    """Whether nothing but the weights and their dtype differs from the base model's files."""
    read, architectures = request.adapter, settings.get("architectures") or ()
    if request.dtype is not None or any(settings.get(name) for name in _SPECIAL):
        return False
    if resolve_task(request.task, architectures, adapter_tasks([read])) != _TASK:
        return False
    if read.model_settings or has_own_tokenizer(Path(request.directory)):
        return False
    if not read.tokenizer_settings.keys() <= {"pad_token"}:
        return False
    if settings_in(request.source, TOKENIZER_CONFIG).get(AUTO_MAP):
        return False
    refuse_pointers_in(user_path(request.source))
    own = map(str, read.tokenizer_settings.values())
    return all_ids_below(user_path(request.source), settings.get("vocab_size"), own)


def _tokenizer_settings(request: MergeRequest) -> Settings:
    """What the adapter was trained with, if there is a tokenizer."""
    has_one = bool(tokenizer_files(request.source, ask_classes=False))
    return Settings({}, request.adapter.tokenizer_settings if has_one else {})


def _write_small_files(
    request: MergeRequest, settings: Mapping[str, Any], dtype: str, directory: Path
) -> None:
    """Write config.json as the base model has it, and what says how texts are read."""
    content = {name: value for name, value in settings.items() if name != "_name_or_path"}
    older = {"torch_dtype": dtype} if "torch_dtype" in content else {}
    text = json.dumps(content | older | {"dtype": dtype}, indent=2) + "\n"
    (directory / _CONFIG).write_text(text, encoding="utf-8")
    copy_tokenizer(request.source, directory, ask_classes=False)
    write_tokenizer_settings(directory, _tokenizer_settings(request))
    copy_generation_settings(request.source, directory)  # older models have them in config.json
    template = own_template(Path(request.directory))  # last: the others copy the base model's
    if template is not None:
        write_template(directory, template)
