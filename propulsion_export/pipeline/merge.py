"""`merge`: fold an adapter into a checkpoint that plain transformers loads."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.provenance import find_base
from propulsion_export.adapters.specification import check_identity, read_adapters
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.merged_base import check_not_merged, check_undamaged
from propulsion_export.artifacts.rounding import numpy_dtype
from propulsion_export.base_model.carried_files import carry_files
from propulsion_export.environment.progress import Progress, silent
from propulsion_export.errors import UsageError
from propulsion_export.merging.files import plan_files
from propulsion_export.merging.plan import NAMES
from propulsion_export.merging.verifying import verify_output
from propulsion_export.merging.writing import Output, write_outputs
from propulsion_export.pipeline.merge_by_names import prepare_by_names
from propulsion_export.pipeline.merge_request import MergeRequest, Prepared
from propulsion_export.pipeline.places import Places

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@dataclass(frozen=True)
class MergeOptions:
    """How adapters are merged.

    Attributes:
        model: base model by path or name; default: the one the adapters name.
        task: which head the checkpoint has; `auto`: the adapter's.
        dtype: `keep`, `float32`, `bfloat16` or `float16`.
        max_shard_size: the largest size of one weight file, such as `5GB`; default: the base
            model's own files where the same tensors are written in the same dtypes, else 5 GB.
        untie: give a scaled weight that is shared with another module a copy of its own.
        share: make weight files that stay as they are hard links to the base model's.
        verify: read the output again, and compare it with its digests and the base model.
        force: replace an earlier output.
        trust_remote_code: run code that the base model brings.
    """

    model: str | None = None
    task: str = "auto"
    dtype: str = "keep"
    max_shard_size: str | None = None
    untie: bool = False
    share: bool = False
    verify: bool = False
    force: bool = False
    trust_remote_code: bool = False


def merge(
    adapter: str | Path,
    output: Path,
    *,
    model: str | None = None,
    task: str = "auto",
    dtype: str = "keep",
    max_shard_size: str | None = None,
    untie: bool = False,
    share: bool = False,
    verify: bool = False,
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
        max_shard_size: as in `MergeOptions`.
        untie: give a scaled weight that is shared with another module a copy of its own.
        share: as in `MergeOptions`.
        verify: as in `MergeOptions`.
        force: replace an earlier output.
        trust_remote_code: run code that the base model brings.
        progress: called with the share done and what is being done.

    Raises:
        PropulsionExportError: as its subclasses say; nothing is left at `output` then.
    """
    options = MergeOptions(
        model, task, dtype, max_shard_size, untie, share, verify, force, trust_remote_code
    )
    (artifact,) = merge_adapters([adapter], output, options, progress)
    return artifact


def merge_adapters(
    adapters: Sequence[str | Path],
    output: Path,
    options: MergeOptions,
    progress: Progress = silent,
) -> list[Artifact]:
    """Fold each of several adapters into their base model, which is read once.

    Args:
        adapters: directories, or `NAME=DIR`.
        output: directory to write to: a checkpoint in a directory of its name for each adapter; of
            a single adapter the checkpoint itself.
        options: how they are merged.
        progress: called with the share done and what is being done.

    Returns:
        The artifacts, in the order of the adapters.

    Raises:
        PropulsionExportError: as its subclasses say; of no adapter anything is left then.
    """
    shard_size = None if options.max_shard_size is None else parse_size(options.max_shard_size)
    read = read_adapters(adapters)
    source = find_base(options.model, read)
    inputs = (*(one.source for one in read), source)
    places = Places(output, [one.name for one in read], "merged", options.force, inputs)
    places.check()
    for adapter in read:
        check_identity(adapter)
    check_not_merged(source, read)
    check_undamaged(source)
    prepared = {one.name: _prepare(_request(source, one, options)) for one in read}
    size = sum(one.size for one in read)
    note = next(iter(prepared.values())).note
    progress(0.1, f"folding {size:,} scales into {source}{note}")
    with places.staged() as staged:
        artifacts = _write(prepared, staged, shard_size, options, progress)
    progress(1.0, f"wrote {output}")
    return [artifact.at(places.by_name[name]) for name, artifact in artifacts]


def _request(source: str, adapter: Adapter, options: MergeOptions) -> MergeRequest:
    return MergeRequest(
        source=source,
        adapter=adapter,
        directory=adapter.source,
        task=options.task,
        dtype=None if options.dtype == "keep" else NAMES[numpy_dtype(options.dtype)],
        untie=options.untie,
        trust_remote_code=options.trust_remote_code,
    )


def _write(
    prepared: Mapping[str, Prepared],
    places: Mapping[str, Path],
    shard_size: int | None,
    options: MergeOptions,
    progress: Progress,
) -> list[tuple[str, Artifact]]:
    """Write the artifact of each adapter to its place; returns them by the adapter's name."""
    outputs = {
        name: Output(places[name], one.plan, plan_files(one.plan, one.checkpoint, shard_size))
        for name, one in prepared.items()
    }
    written = write_outputs(list(outputs.values()), progress, share=options.share)
    artifacts = []
    for (name, output), digests in zip(outputs.items(), written, strict=True):
        if options.verify:
            progress(0.96, f"reading {name} again")
            verify_output(output, digests)
        prepared[name].write_small_files(output.directory)
        carry_files(output.plan.source, output.directory)
        artifact = Artifact.write(output.directory, prepared[name].manifest, digests=digests)
        artifacts.append((name, artifact))
    return artifacts


def _prepare(request: MergeRequest) -> Prepared:
    """Check and plan a merge: by names alone if they tell, else by the model without weights."""
    if (prepared := prepare_by_names(request)) is not None:
        return prepared
    # Imports torch and transformers' model classes, which takes seconds.
    from propulsion_export.pipeline.merge_by_model import prepare_by_model

    return prepare_by_model(request)


def parse_size(text: str) -> int:
    """A size such as `500MB`, `0.5GB`, `2GiB` or a plain number, in whole bytes.

    Raises:
        UsageError: the text is none of these, or below one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip().upper())
    size = int(Decimal(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size == 0:
        raise UsageError(f"--max-shard-size: {text!r} is no size, expected such as 5GB or 0.5GB")
    return size
