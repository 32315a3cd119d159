"""Prepare a merge by building the model without weights: for every model that transformers has."""

from pathlib import Path

from propulsion_export.adapters.provenance import adapter_tasks, check_base
from propulsion_export.artifacts.layout import labels_in
from propulsion_export.artifacts.manifest import AdapterEntry, BaseEntry
from propulsion_export.base_model.checkpoint import Checkpoint
from propulsion_export.base_model.config import class_names, read_config, save_config
from propulsion_export.base_model.loading import load_empty
from propulsion_export.base_model.tasks import TASKS, resolve_task
from propulsion_export.merging.plan import plan_changes
from propulsion_export.pipeline.base_settings import settle_
from propulsion_export.pipeline.merge_request import MergeRequest, Prepared, merged_manifest
from propulsion_export.pipeline.text_files import TextFiles
from propulsion_export.scaling.attach import check_fits
from propulsion_export.scaling.fold.listing import fingerprint_of_checkpoint, jobs_of
from propulsion_export.scaling.fold.stored import StoredParts, untie_as_stored_
from propulsion_export.scaling.fold.ties import check_untied
from propulsion_export.scaling.resizing import resized_rows, set_embedding_rows


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
    own = class_names(config)
    empty = load_empty(config, task, head=read.modules, labels=read.labels, trust_remote_code=trust)
    parts = StoredParts(Checkpoint.find(source), empty)
    fingerprint = fingerprint_of_checkpoint(parts)
    check_base(fingerprint, source, [read])
    check_fits(empty, read)
    untie_as_stored_(parts)
    check_untied(empty, read, untie=request.untie)
    texts.check_tokens(config)
    plan = plan_changes(parts.checkpoint, jobs_of(parts, read), read, request.dtype)
    settled = settle_(empty, [read], texts)
    labelled = TASKS[task].labelled_output is not None
    base = BaseEntry(source, fingerprint, own if labelled else None, True, settled.base)
    labels = labels_in(read, {}, base.labels, config.num_labels)
    entry = AdapterEntry(read.digest, request.directory, read.size, None, labels, *settled.adapters)
    manifest = merged_manifest(request, entry, base, task, plan)

    def write_small_files(directory: Path) -> None:
        save_config(empty, directory, manifest.dtype)
        texts.write(directory, settled.settings)

    return Prepared(parts.checkpoint, plan, manifest, settled.note, write_small_files)
