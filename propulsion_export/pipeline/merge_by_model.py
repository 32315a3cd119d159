"""Prepare a merge by building the model without weights: for every model that transformers has."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from propulsion_export.adapters.provenance import adapter_tasks, check_base
from propulsion_export.artifacts.layout import labels_in
from propulsion_export.artifacts.manifest import AdapterEntry, BaseEntry
from propulsion_export.base_model.checkpoint import Checkpoint
from propulsion_export.base_model.config import class_names, read_config, save_config
from propulsion_export.base_model.loading import load_empty
from propulsion_export.base_model.tasks import TASKS, resolve_task
from propulsion_export.base_model.tensor_files import DTYPES
from propulsion_export.errors import UsageError
from propulsion_export.merging.plan import plan_changes
from propulsion_export.merging.quantised.modules import PlainRule
from propulsion_export.pipeline.base_settings import settle_
from propulsion_export.pipeline.merge_request import MergeRequest, Prepared, merged_manifest
from propulsion_export.pipeline.quantised_base import QUANTISATION, QuantisedBase
from propulsion_export.pipeline.text_files import TextFiles
from propulsion_export.scaling.attach import check_fits
from propulsion_export.scaling.fold.listing import fingerprint_of_checkpoint, jobs_of
from propulsion_export.scaling.fold.stored import StoredParts, tied_parameters, untie_as_stored_
from propulsion_export.scaling.fold.ties import check_untied
from propulsion_export.scaling.layer_rules import adds_one, check_foldable, layer_kind
from propulsion_export.scaling.resizing import resized_rows, set_embedding_rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def prepare_by_model(request: MergeRequest) -> Prepared:
    """Check that an adapter fits its base model, and plan what is written.

    Raises:
        PropulsionExportError: as its subclasses say.
    """
    source, read, trust = request.source, request.adapter, request.trust_remote_code
    config = read_config(source, trust_remote_code=trust)
    task = resolve_task(request.task, config.architectures or (), adapter_tasks([read]))
    texts = TextFiles.find(source, task, {read.name: request.directory}, trust_remote_code=trust)
    rows = resized_rows(read, task, config, trust_remote_code=trust)
    if rows is not None:
        set_embedding_rows(config, rows)
    checkpoint = Checkpoint.find(source)
    quantised = _quantised(request, checkpoint, config)
    own = class_names(config)
    empty = load_empty(config, task, head=read.modules, labels=read.labels, trust_remote_code=trust)
    parts = StoredParts(checkpoint, empty)
    fingerprint = (
        quantised.fingerprint(read.fingerprint) if quantised else fingerprint_of_checkpoint(parts)
    )
    check_base(fingerprint, source, [read])
    check_fits(empty, read)
    untie_as_stored_(parts)
    ties = tied_parameters(empty)
    check_untied(empty, read, untie=request.untie)
    texts.check_tokens(config)
    if quantised:
        quantised = quantised.with_copies(_apart(empty, ties))
        plan = quantised.plan(read, partial(_rule, empty))
    else:
        plan = plan_changes(checkpoint, jobs_of(parts, read), read, request.dtype)
    settled = settle_(empty, [read], texts)
    labelled = TASKS[task].labelled_output is not None
    base = BaseEntry(source, fingerprint, own if labelled else None, True, settled.base)
    labels = labels_in(read, {}, base.labels, config.num_labels)
    entry = AdapterEntry(read.digest, request.directory, read.size, None, labels, *settled.adapters)
    manifest = merged_manifest(request, entry, base, task, plan)
    if quantised:
        manifest = quantised.manifest(manifest)

    def write_small_files(directory: Path) -> None:
        save_config(empty, directory, manifest.dtype)
        if quantised:
            quantised.write_settings(directory)
        texts.write(directory, settled.settings)

    note = settled.note + ("" if quantised else _left_out(parts.unread, task))
    return Prepared(checkpoint, plan, manifest, note, write_small_files)


def _left_out(unread: Sequence[str], task: str) -> str:
    """Which tensors of the base model are not written, in words."""
    if not unread:
        return ""
    return f"; left out, as no part of the model for {task}: {len(unread)} tensors ({unread[0]}, …)"


def _quantised(
    request: MergeRequest, checkpoint: Checkpoint, config: "PretrainedConfig"
) -> QuantisedBase | None:
    """The quantised base model, if it is one; models made of `config` are float afterwards.

    Raises:
        BaseModelError: its layout is not known, or cannot be merged into.
        UsageError: another dtype is asked for.
    """
    base = QuantisedBase.find(checkpoint)
    if base is not None and request.dtype is not None:
        raise UsageError(
            f"--dtype {DTYPES[request.dtype]}: {request.source} is quantised, expected keep"
        )
    if hasattr(config, QUANTISATION):
        delattr(config, QUANTISATION)
    return base


def _apart(model: "PreTrainedModel", ties: Mapping[str, str]) -> dict[str, str]:
    """Those of a model's former ties that are none any more."""
    return {
        one: other
        for one, other in ties.items()
        if model.get_parameter(one) is not model.get_parameter(other)
    }


def _rule(model: "PreTrainedModel", path: str) -> PlainRule | None:
    """How a scale lies over the weight of a module that is not quantised."""
    module = model.get_submodule(path)
    check_foldable(module)
    match layer_kind(module):
        case "linear":
            return "rows"
        case "conv1d" | "embedding":
            return "columns"
        case "norm":
            return "norm plus one" if adds_one(module) else "norm"
    return None
