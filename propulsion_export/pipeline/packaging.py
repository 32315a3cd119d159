"""`package`: an artifact becomes a directory that a server loads."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from propulsion_export.artifact import Artifact, digest_of
from propulsion_export.bank import Row, Snapshot
from propulsion_export.errors import UsageError
from propulsion_export.manifest import (
    ADAPTERS,
    BASE_NAME,
    ENGINE_FILE,
    GRAPH_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    AdapterEntry,
)
from propulsion_export.output import check_replaceable, staged_directory
from propulsion_export.packaging.genai import CONFIG_FILE, genai_config
from propulsion_export.packaging.onnx_adapter import (
    ADAPTER_SUFFIX,
    check_has_adapter_files,
    write_onnx_adapter,
)
from propulsion_export.pipeline.agreeing import check_signature
from propulsion_export.pipeline.inputs import Progress, silent
from propulsion_export.special_tokens import SpecialTokens

Layout = Literal["genai", "onnx-adapter", "triton"]
# Writes a package into an empty directory, its manifest included; tells the adapters in it.
_Write = Callable[[Path], Iterable[str]]
# Where a model has no positions to run out of (ALiBi), onnxruntime-genai still wants a limit.
_UNLIMITED = 32768


@dataclass(frozen=True)
class Package:
    """What a server loads.

    Attributes:
        adapters: names of those in it, sorted, without the base model.
        model_name: what Triton's clients call it; None for other servers.
    """

    directory: Path
    layout: Layout
    adapters: tuple[str, ...]
    model_name: str | None = None


def package(
    artifact: Path,
    output: Path,
    *,
    layout: Layout,
    model_name: str | None = None,
    max_batch_size: int | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Package:
    """Write what a server loads, which needs the artifact no more.

    `genai`, for onnxruntime-genai, and `onnx-adapter`, for ONNX Runtime's LoraAdapter: a copy of
    the artifact, and an artifact itself, with `genai_config.json` (genai) and, of a switchable one,
    `adapters/NAME.onnx_adapter` for each adapter. `triton`: a model repository for Triton Inference
    Server, of a bank with the adapters that it has now inside.

    Args:
        artifact: directory of an ONNX export or, for Triton, of an engine too.
        output: directory to write.
        layout: whose files.
        model_name: what Triton's clients call it; default: the name of `output`.
        max_batch_size: rows that Triton puts into a batch; default: 32, or what an engine takes.
        force: replace an earlier output.
        progress: told how far it is.

    Raises:
        UsageError: the server cannot run such an artifact; an option of another layout.
        ArtifactError: the artifact is damaged, or its manifest tells of another graph.
        UnavailableError: a package is missing.
    """
    check_replaceable(output, marker=MANIFEST_FILE, force=force, inputs=(artifact,))
    read = Artifact.read(artifact)
    if layout == "triton":
        name = output.expanduser().resolve().name if model_name is None else model_name
        write = _plan_triton(read, name, max_batch_size)
    else:
        _check_options(layout, {"--model-name": model_name, "--max-batch-size": max_batch_size})
        name, write = None, _plan_copy(read, layout)
    check_signature(read)
    progress(0.1, f"copying {artifact}")
    with staged_directory(
        output, marker=MANIFEST_FILE, force=force, inputs=(artifact,)
    ) as directory:
        adapters = sorted(set(write(directory)) - {BASE_NAME})
    progress(1.0, f"wrote {output}")
    return Package(output, layout, tuple(adapters), name)


def _check_options(layout: Layout, of_triton: Mapping[str, object]) -> None:
    given = [option for option, value in of_triton.items() if value is not None]
    if given:
        raise UsageError(f"{', '.join(given)}: for --layout triton, found {layout}")


# Copies with adapter files


def _plan_copy(artifact: Artifact, layout: Layout) -> _Write:
    if layout == "genai":
        _check_fits(artifact)
        return partial(_write_genai, artifact)
    check_has_adapter_files(artifact)
    return partial(_write_onnx_adapter, artifact)


def _check_fits(artifact: Artifact) -> None:
    manifest = artifact.manifest
    if manifest.kind != "onnx":
        found = f"is of kind {manifest.kind}, expected an ONNX export"
        remedy = "Give the directory that `propulsion-export onnx` wrote."
    elif manifest.task != "text-generation":
        found = f"is for {manifest.task}, expected text-generation: onnxruntime-genai runs that"
        if manifest.task == "text2text-generation":
            found += ", and of encoder-decoders those of speech and Marian alone"
        remedy = "Serve it with ONNX Runtime itself."
    elif manifest.mode == "bank":
        found = "is a bank, whose rows onnxruntime-genai has no way to choose"
        remedy = "Export with --mode switchable."
    elif manifest.dtype == "bfloat16":
        found = "is in bfloat16, for which ONNX Runtime's CPU provider has no kernels"
        remedy = "Export with --dtype float32 or float16."
    else:
        return
    raise UsageError(f"{artifact.directory}: {found}", remedy=remedy)


def _write_genai(artifact: Artifact, directory: Path) -> Iterable[str]:
    from propulsion_export.base import read_config

    _copy(artifact, artifact.manifest.files, directory)
    manifest = artifact.manifest
    config = read_config(str(directory))
    longest = getattr(config, "max_position_embeddings", None) or _UNLIMITED
    content = genai_config(manifest.inputs, config, SpecialTokens.read(directory), longest=longest)
    text = json.dumps(content, indent=2) + "\n"
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
    return _write_adapter_files(artifact, directory)


def _write_onnx_adapter(artifact: Artifact, directory: Path) -> Iterable[str]:
    _copy(artifact, artifact.manifest.files, directory)
    return _write_adapter_files(artifact, directory)


def _write_adapter_files(artifact: Artifact, directory: Path) -> Iterable[str]:
    manifest = artifact.manifest
    base = json.dumps(manifest.base.fingerprint.to_json(), sort_keys=True)
    for name, entry in manifest.adapters.items():
        if entry.file is not None:
            file = directory / ADAPTERS / f"{name}{ADAPTER_SUFFIX}"
            write_onnx_adapter(file, artifact.feeds(name), adapter=entry.digest, base=base)
    Artifact.write(directory, manifest)
    return manifest.adapters


def _copy(artifact: Artifact, names: Iterable[str], directory: Path) -> None:
    for name in names:
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(artifact.directory / name, directory / name)


# Triton's model repository


def _plan_triton(artifact: Artifact, name: str, max_batch_size: int | None) -> _Write:
    from propulsion_export.packaging import triton

    model = triton.plan_model(artifact, name, max_batch_size)
    config = triton.config_text(model)

    def write(directory: Path) -> Iterable[str]:
        place = directory / name
        version = place / triton.VERSION
        version.mkdir(parents=True)
        (place / triton.CONFIG_FILE).write_text(config, encoding="utf-8")
        _copy(artifact, filter(_is_of_client, artifact.manifest.files), place)
        ids, entries = _write_model(artifact, version / model.file)
        told = triton.adapters_text(ids, entries, artifact.manifest.base)
        (place / triton.ADAPTERS_FILE).write_text(told, encoding="utf-8")
        _record(artifact, directory)
        return ids

    return write


def _is_of_client(name: str) -> bool:
    """The tokenizer's files and config.json: neither the model nor what adapters are fed."""
    return "/" not in name and not name.startswith((GRAPH_FILE, ENGINE_FILE))


def _write_model(
    artifact: Artifact, file: Path
) -> tuple[dict[str, int | None], Mapping[str, AdapterEntry]]:
    """Write the graph or engine; tells the id of each adapter in it, and the adapters."""
    if artifact.manifest.mode == "bank":
        return _write_bank_model(artifact, file)
    shutil.copyfile(artifact.path, file)
    _copy_weights(artifact, file.parent)
    return dict.fromkeys(artifact.adapters), artifact.adapters


def _write_bank_model(
    artifact: Artifact, file: Path
) -> tuple[dict[str, int | None], Mapping[str, AdapterEntry]]:
    from propulsion_export.packaging.triton import rows_in_use

    snapshot = artifact.bank.snapshot()
    rows = rows_in_use(snapshot)
    entries = {name: row.entry for name, row in snapshot.rows.items()}
    if artifact.manifest.kind == "engine":
        # It was built with all the rows that its bank had, under the same numbers.
        shutil.copyfile(artifact.path, file)
        return {name: row.number for name, row in rows.items()}, entries
    _write_graph_with_bank(artifact, snapshot, list(rows.values()), file)
    return {name: number for number, name in enumerate(rows)}, entries


def _write_graph_with_bank(
    artifact: Artifact, snapshot: Snapshot, rows: Sequence[Row], file: Path
) -> None:
    """The graph with these rows inside, numbered in their order; those of nobody stay behind."""
    import onnx_ir as ir

    from propulsion_export.engine.source import read_graph
    from propulsion_export.packaging.triton import BuildInBank, write_bank

    _copy_weights(artifact, file.parent)
    write_bank(snapshot, rows, file.parent)
    graph = read_graph(artifact.directory)
    BuildInBank(file.parent, len(rows))(graph)
    ir.save(graph, file)


def _copy_weights(artifact: Artifact, directory: Path) -> None:
    _copy(artifact, artifact.manifest.files.keys() & {WEIGHTS_FILE}, directory)


def _record(artifact: Artifact, directory: Path) -> None:
    """Say what the package was made of, in a manifest of a kind that no command takes."""
    files = {
        file.relative_to(directory).as_posix(): digest_of(file)
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }
    record = json.loads(artifact.manifest.to_json()) | {"kind": "triton", "files": files}
    text = json.dumps(record, indent=2) + "\n"
    (directory / MANIFEST_FILE).write_text(text, encoding="utf-8")
