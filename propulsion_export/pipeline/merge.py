"""`merge`: fold an adapter into a checkpoint that plain transformers loads."""

import re
from pathlib import Path

from propulsion_export.adapters.provenance import adapter_tasks, base_source, check_base
from propulsion_export.adapters.specification import check_identity, read_adapters, source_of
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.file_names import MANIFEST_FILE
from propulsion_export.artifacts.layout import labels_in
from propulsion_export.artifacts.manifest import AdapterEntry, BaseEntry, Manifest
from propulsion_export.artifacts.merged_base import check_not_merged
from propulsion_export.artifacts.rounding import numpy_dtype
from propulsion_export.artifacts.staging import check_replaceable, staged_directory
from propulsion_export.base_model.checkpoint import Checkpoint
from propulsion_export.base_model.config import (
    class_names,
    read_config,
    save_config,
)
from propulsion_export.base_model.loading import load_empty
from propulsion_export.base_model.tasks import TASKS, TaskName, resolve_task
from propulsion_export.base_model.tensor_files import DTYPES
from propulsion_export.environment.machine import tool_versions
from propulsion_export.environment.progress import Progress, silent
from propulsion_export.errors import UsageError
from propulsion_export.merging.files import plan_files
from propulsion_export.merging.plan import NAMES, plan_changes
from propulsion_export.merging.writing import Output, write_outputs
from propulsion_export.pipeline.base_settings import settle_
from propulsion_export.pipeline.quantised_base import quantised_base
from propulsion_export.pipeline.text_files import TextFiles
from propulsion_export.scaling.attach import check_fits
from propulsion_export.scaling.fold.listing import fingerprint_of_checkpoint, jobs_of
from propulsion_export.scaling.fold.stored import StoredParts, tied_parameters, untie_as_stored_
from propulsion_export.scaling.fold.ties import check_untied
from propulsion_export.scaling.resizing import resized_rows, set_embedding_rows

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def merge(
    adapter: str | Path,
    output: Path,
    *,
    model: str | None = None,
    task: str = "auto",
    dtype: str = "keep",
    max_shard_size: str | None = None,
    untie: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Artifact:
    """Fold an adapter into the weights of its base model and write them as a new checkpoint.

    Args:
        adapter: directory, or `NAME=DIR`.
        output: directory to write the complete checkpoint to.
        model: base model by path or name; default: the one the adapter names.
        task: which head the checkpoint has; `auto`: the adapter's.
        dtype: `keep`, `float32`, `bfloat16` or `float16`.
        max_shard_size: the largest size of one weight file, such as `5GB`; default: the base
            model's own files where the same tensors are written in the same dtypes, else 5 GB.
        untie: give a scaled weight that is shared with another module a copy of its own.
        force: replace an earlier output.
        trust_remote_code: run code that the base model brings.
        progress: called with the share done and what is being done.

    Raises:
        PropulsionExportError: as its subclasses say; nothing is left at `output` then.
    """
    shard_size = None if max_shard_size is None else parse_size(max_shard_size)
    (read,) = read_adapters([adapter])
    source = base_source(model, [read])
    inputs = (source_of(adapter), source)
    check_replaceable(output, marker=MANIFEST_FILE, force=force, inputs=inputs)
    check_identity(read)
    check_not_merged(source, [read])
    config = read_config(source, trust_remote_code=trust_remote_code)
    resolved = resolve_task(task, config.architectures or (), adapter_tasks([read]))
    directories = {read.name: source_of(adapter)}
    texts = TextFiles.find(source, resolved, directories, trust_remote_code=trust_remote_code)
    rows = resized_rows(read, resolved, config, trust_remote_code=trust_remote_code)
    if rows is not None:
        set_embedding_rows(config, rows)
    checkpoint = Checkpoint.find(source)
    quantised = quantised_base(checkpoint, config, dtype)
    own = class_names(config)
    empty = load_empty(
        config, resolved, head=read.modules, labels=read.labels, trust_remote_code=trust_remote_code
    )
    parts = StoredParts(checkpoint, empty)
    fingerprint = (
        fingerprint_of_checkpoint(parts)
        if quantised is None
        else quantised.fingerprint(read.fingerprint)
    )
    check_base(fingerprint, source, [read])
    check_fits(empty, read)
    untie_as_stored_(parts)
    ties = tied_parameters(empty)
    check_untied(empty, read, untie=untie)
    texts.check_tokens(config)
    wanted = None if dtype == "keep" else NAMES[numpy_dtype(dtype)]
    settled = settle_(empty, [read], texts)
    progress(0.1, f"folding {read.size:,} scales into {source}{settled.note}")
    with staged_directory(output, marker=MANIFEST_FILE, force=force, inputs=inputs) as directory:
        if quantised is None:
            plan = plan_changes(checkpoint, jobs_of(parts, read), read, wanted)
        else:
            quantised = quantised.untied(empty, ties)
            plan = quantised.plan(read, empty)
        files = plan_files(plan, checkpoint, shard_size)
        (digests,) = write_outputs([Output(directory, plan, files)], progress)
        name = str(DTYPES[plan.dtype if quantised is None else quantised.dtype])
        save_config(empty, directory, name)
        if quantised is not None:
            quantised.write_settings(directory)
        texts.write(directory, settled.settings)
        labelled = TASKS[resolved].labelled_output is not None
        base = BaseEntry(source, fingerprint, own if labelled else None, True, settled.base)
        labels = labels_in(read, {}, base.labels, config.num_labels)
        entry = AdapterEntry(
            read.digest, source_of(adapter), read.size, None, labels, *settled.adapters
        )
        manifest = _manifest(read.name, entry, base, resolved, name)
        artifact = Artifact.write(directory, manifest, digests=digests)
    progress(1.0, f"wrote {output}")
    return artifact.at(output)


def _manifest(
    adapter: str, entry: AdapterEntry, base: BaseEntry, task: TaskName, dtype: str
) -> Manifest:
    return Manifest(
        kind="merged",
        mode="folded",
        task=task,
        dtype=dtype,  # type: ignore[arg-type]
        base=base,
        adapters={adapter: entry},
        tools=tool_versions(),
    )


def parse_size(text: str) -> int:
    """A size such as `500MB`, `5GB`, `2GiB` or a plain number, in bytes.

    Raises:
        UsageError: the text is none of these, or not above zero.
    """
    match = re.fullmatch(r"(\d+)\s*([KMG]I?)?B?", text.strip().upper())
    if not match or int(match[1]) == 0:
        raise UsageError(f"--max-shard-size: {text!r} is no size, expected such as 5GB or 500MiB")
    return int(match[1]) * _UNITS[match[2] or ""]
