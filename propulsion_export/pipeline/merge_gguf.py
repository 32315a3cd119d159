"""`merge` into a GGUF file: the file again, with an adapter in its scales. No torch."""

import json
from collections.abc import Mapping
from pathlib import Path

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.own_template import own_template
from propulsion_export.adapters.provenance import check_base, find_base
from propulsion_export.adapters.specification import check_identity, read_adapters
from propulsion_export.artifacts.merged_base import check_not_merged
from propulsion_export.artifacts.staged_file import check_replaceable_output, staged_file
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.gguf.header import Header, read_header
from propulsion_export.base_model.gguf.merges import GgufMerge, keys_with, merges_in
from propulsion_export.base_model.gguf.metadata import Text
from propulsion_export.base_model.gguf.parameters import Parameters
from propulsion_export.base_model.gguf.source import ENDING, find_gguf, is_gguf
from propulsion_export.environment.machine import package_version
from propulsion_export.environment.progress import Progress, silent
from propulsion_export.errors import AdapterError, BaseModelError, UsageError
from propulsion_export.merging.gguf.own_tokens import check_tokens
from propulsion_export.merging.gguf.plan import plan_merge
from propulsion_export.merging.gguf.verifying import verify_file
from propulsion_export.merging.gguf.writing import Writer

_TEMPLATE = "tokenizer.chat_template"
_TASK = "text-generation"


def merge_gguf(
    adapter: str | Path,
    output: Path,
    *,
    model: str | None = None,
    untie: bool = False,
    allow_range: bool = False,
    verify: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> Path:
    """Fold an adapter into a GGUF file and write it as another GGUF file.

    Every tensor keeps its type and every key its value; of quantised tensors only the scales of
    their blocks change.

    Args:
        adapter: directory, or `NAME=DIR`.
        output: the file to write, whose name ends with `.gguf`.
        model: the GGUF file, or a directory with one; default: the one the adapter names.
        untie: give a tied output a tensor of its own, where the adapter scales it or the embedding.
        allow_range: write the nearest number where a tensor's type cannot hold a product.
        verify: read the file again, and compare every byte with the base model's times its factor.
        force: replace an earlier output.
        progress: called with the share done and what is being done.

    Returns:
        The file written.

    Raises:
        PropulsionExportError: as its subclasses say; nothing is left at `output` then.
    """
    (read,) = read_adapters([adapter])
    source = find_base(model, [read])
    file = _file(source, output)
    inputs = (read.source, file)
    check_replaceable_output(output, is_ours=_is_merged, force=force, inputs=inputs)
    check_identity(read)
    check_not_merged(source, [read])
    _check_task(read)
    header = read_header(file)
    check_tokens(read, Path(read.source), header)
    parameters = Parameters.of(header)
    plan = plan_merge(parameters, read, untie=untie)
    found = _check_base(parameters, read)
    keys = dict(keys_with(header, _record(read, source, found)))
    keys |= _template(header, Path(read.source))
    progress(0.0, f"folding {read.size:,} scales into {file}")
    writer = Writer(header, plan, keys, allow_range, progress)
    with staged_file(output, is_ours=_is_merged, force=force, inputs=inputs) as target:
        with file.open("rb") as opened:
            writer.write(opened.fileno(), target.fileno())
            if verify:
                progress(0.96, f"reading {output} again")
                verify_file(writer, opened.fileno(), Path(target.name))
        if not writer.changed:
            raise AdapterError(
                f"adapter {read.name}: changes no weight of {file}, expected an effect",
                remedy="Is this the trained adapter?",
            )
    progress(1.0, f"wrote {output}{_nearest(writer.nearest)}")
    return output


def _nearest(findings: Mapping[str, str]) -> str:
    """What --allow-range let pass, in words."""
    if not findings:
        return ""
    first = next(iter(findings.values()))
    return f". Tensors with the nearest numbers: {len(findings)}, the first {first}"


def _file(source: str, output: Path) -> Path:
    """The base model's file.

    Raises:
        UsageError: the base model is in another form, or the output is no name for a GGUF file.
    """
    if output.suffix.lower() != ENDING:
        raise UsageError(f"{output}: expected a name that ends with {ENDING}")
    file = find_gguf(source)
    if file is None:
        raise UsageError(
            f"{output}: {source} is no GGUF file, expected one to write a GGUF file from",
            remedy="Name a directory with -o, and convert that with llama.cpp.",
        )
    return file.resolve()


def _is_merged(file: Path) -> bool:
    """Whether an adapter was merged into a file."""
    try:
        return is_gguf(file) and bool(merges_in(read_header(file)))
    except BaseModelError:
        return False


def _check_task(adapter: Adapter) -> None:
    if adapter.task not in (None, _TASK):
        raise AdapterError(
            f"adapter {adapter.name}: is for {adapter.task}, expected {_TASK}, which a GGUF file "
            "is for",
            remedy="Name a directory with -o.",
        )


def _check_base(parameters: Parameters, adapter: Adapter) -> Fingerprint | None:
    """Refuse an adapter of another model; gives the fingerprint of the file's, if it can be taken.

    Raises:
        BaseModelError: the weights differ.
    """
    recorded = adapter.fingerprint
    if recorded is None:
        return None
    found = parameters.fingerprint((*recorded.entries, *recorded.vectors))
    check_base(found, str(parameters.header.file), [adapter])
    return found


def _record(adapter: Adapter, source: str, found: Fingerprint | None) -> GgufMerge:
    fingerprint = "" if found is None else json.dumps(found.to_json())
    version = package_version("propulsion-export") or ""
    return GgufMerge(adapter.name, adapter.digest, source, fingerprint, version)


def _template(header: Header, directory: Path) -> dict[str, Text]:
    """The chat template that the adapter was trained with, if it is not the file's."""
    own = own_template(directory)
    return {} if own is None or own == header.metadata.get(_TEMPLATE) else {_TEMPLATE: own}
