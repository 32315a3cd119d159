"""`merge`: a checkpoint and an adapter become a checkpoint that plain transformers loads."""

import re
from pathlib import Path
from typing import cast

from propulsion_export.artifact import Artifact
from propulsion_export.errors import UsageError
from propulsion_export.layout import labels_in
from propulsion_export.machine import tool_versions
from propulsion_export.manifest import MANIFEST_FILE, AdapterEntry, BaseEntry, Manifest, Task
from propulsion_export.output import check_replaceable, staged_directory
from propulsion_export.pipeline.inputs import (
    Progress,
    base_source,
    check_base,
    check_identity,
    read_adapters,
    silent,
    source_of,
)

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def merge(
    adapter: str | Path,
    output: Path,
    *,
    model: str | None = None,
    task: str = "auto",
    dtype: str = "keep",
    max_shard_size: str = "5GB",
    untie: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Artifact:
    """Fold an adapter into the weights of its base model, checkpoint to checkpoint.

    Args:
        adapter: directory, or `NAME=DIR`.
        output: directory to write the complete checkpoint to.
        model: base model by path or name; default: the one the adapter names.
        task: which head the checkpoint has; `auto`: the adapter's.
        dtype: `keep`, `float32`, `bfloat16` or `float16`.
        max_shard_size: of one weight file, such as `5GB`.
        untie: give a scaled weight that is shared with another module a copy of its own.
        force: replace an earlier output.
        trust_remote_code: run code that the base model brings.
        progress: told how far it is.

    Raises:
        PropulsionExportError: as its subclasses say; nothing is left at `output` then.
    """
    import torch

    from propulsion_export import base
    from propulsion_export.attach import check_fits
    from propulsion_export.fold.checkpoint import fingerprint_of_checkpoint, fold_checkpoint
    from propulsion_export.fold.memory import check_untied
    from propulsion_export.fold.source import Checkpoint
    from propulsion_export.fold.stored import untie_as_stored_

    shard_size = parse_size(max_shard_size)
    (read,) = read_adapters([adapter])
    source = base_source(model, [read])
    inputs = (source_of(adapter), source)
    check_replaceable(output, marker=MANIFEST_FILE, force=force, inputs=inputs)
    check_identity(read)
    config = base.read_config(source, trust_remote_code=trust_remote_code)
    task = base.resolve_task(task, config, [read])
    empty = base.load_empty(config, task, read, trust_remote_code=trust_remote_code)
    checkpoint = Checkpoint.find(source)
    fingerprint = fingerprint_of_checkpoint(checkpoint, empty)
    check_base(fingerprint, source, [read])
    check_fits(empty, read)
    untie_as_stored_(empty, checkpoint)
    check_untied(empty, read, untie=untie)
    wanted = None if dtype == "keep" else getattr(torch, dtype)
    progress(0.1, f"folding {read.size:,} scales into {source}")
    with staged_directory(output, marker=MANIFEST_FILE, force=force, inputs=inputs) as directory:
        written = fold_checkpoint(
            checkpoint, empty, read, directory, dtype=wanted, max_shard_size=shard_size
        )
        name = str(written).removeprefix("torch.")
        base.save_config(empty, directory, name)
        base.copy_tokenizer(source, directory)
        base.save_generation_settings(source, task, directory)
        own = base.class_names(config) if task in base.LABELLED and not read.modules else None
        labels = labels_in(read, {}, own)
        manifest = Manifest(
            kind="merged",
            mode="folded",
            task=cast(Task, task),
            dtype=name,  # type: ignore[arg-type]
            base=BaseEntry(source, fingerprint, own),
            adapters={
                read.name: AdapterEntry(read.digest, source_of(adapter), read.size, None, labels)
            },
            tools=tool_versions(),
        )
        Artifact.write(directory, manifest)
    progress(1.0, f"wrote {output}")
    return Artifact.read(output)


def parse_size(text: str) -> int:
    """Bytes of `500MB`, `5GB`, `2GiB` or a plain number.

    Raises:
        UsageError: it is none of these, or not above zero.
    """
    match = re.fullmatch(r"(\d+)\s*([KMG]I?)?B?", text.strip().upper())
    if not match or int(match[1]) == 0:
        raise UsageError(f"--max-shard-size: {text!r} is no size, expected such as 5GB or 500MiB")
    return int(match[1]) * _UNITS[match[2] or ""]
