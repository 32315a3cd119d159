"""`merge`: fold an adapter into a checkpoint that plain transformers loads."""

import re
from pathlib import Path

from propulsion_export.adapters.provenance import base_source
from propulsion_export.adapters.specification import check_identity, read_adapters, source_of
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.file_names import MANIFEST_FILE
from propulsion_export.artifacts.merged_base import check_not_merged
from propulsion_export.artifacts.rounding import numpy_dtype
from propulsion_export.artifacts.staging import check_replaceable, staged_directory
from propulsion_export.environment.progress import Progress, silent
from propulsion_export.errors import UsageError
from propulsion_export.merging.files import plan_files
from propulsion_export.merging.plan import NAMES
from propulsion_export.merging.writing import Output, write_outputs
from propulsion_export.pipeline.merge_by_names import prepare_by_names
from propulsion_export.pipeline.merge_request import MergeRequest, Prepared

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
    request = MergeRequest(
        source=source,
        adapter=read,
        directory=source_of(adapter),
        task=task,
        dtype=None if dtype == "keep" else NAMES[numpy_dtype(dtype)],
        untie=untie,
        trust_remote_code=trust_remote_code,
    )
    prepared = _prepare(request)
    files = plan_files(prepared.plan, prepared.checkpoint, shard_size)
    progress(0.1, f"folding {read.size:,} scales into {source}{prepared.note}")
    with staged_directory(output, marker=MANIFEST_FILE, force=force, inputs=inputs) as directory:
        (digests,) = write_outputs([Output(directory, prepared.plan, files)], progress)
        prepared.write_small_files(directory)
        artifact = Artifact.write(directory, prepared.manifest, digests=digests)
    progress(1.0, f"wrote {output}")
    return artifact.at(output)


def _prepare(request: MergeRequest) -> Prepared:
    """Check and plan a merge: by names alone if they tell, else by the model without weights."""
    if (prepared := prepare_by_names(request)) is not None:
        return prepared
    # Imports torch and transformers' model classes, which takes seconds.
    from propulsion_export.pipeline.merge_by_model import prepare_by_model

    return prepare_by_model(request)


def parse_size(text: str) -> int:
    """A size such as `500MB`, `5GB`, `2GiB` or a plain number, in bytes.

    Raises:
        UsageError: the text is none of these, or not above zero.
    """
    match = re.fullmatch(r"(\d+)\s*([KMG]I?)?B?", text.strip().upper())
    if not match or int(match[1]) == 0:
        raise UsageError(f"--max-shard-size: {text!r} is no size, expected such as 5GB or 500MiB")
    return int(match[1]) * _UNITS[match[2] or ""]
