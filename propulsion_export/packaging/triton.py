"""A model repository for Triton Inference Server, with the adapters of a bank inside the graph."""

import json
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.artifacts.artifact import Artifact, digest_of
from propulsion_export.artifacts.bank import BankRow, Snapshot, check_row
from propulsion_export.artifacts.file_names import (
    ADAPTERS_FILE,
    ENGINE_FILE,
    GRAPH_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
)
from propulsion_export.artifacts.manifest import AdapterEntry, BaseEntry
from propulsion_export.base_model.sentences.modules import copy_sentence_pipeline
from propulsion_export.base_model.tokenizer.files import TEMPLATE_DIRECTORY
from propulsion_export.graph.files import read_graph
from propulsion_export.graph.ir_version import lower_ir_version_
from propulsion_export.graph.passes.built_in_bank import BANK_FILE, BuildInBank
from propulsion_export.packaging.copying import copy_artifact_files
from propulsion_export.packaging.layouts import PackageOptions, WritePackage
from propulsion_export.packaging.triton_config import config_text, plan_model

CONFIG_FILE = "config.pbtxt"
VERSION = "1"


def plan(artifact: Artifact, options: PackageOptions) -> WritePackage:
    """Check that Triton can serve the artifact; return the function that writes the repository.

    Raises:
        UsageError: Triton cannot serve it.
    """
    assert options.model_name is not None
    name = options.model_name
    model = plan_model(artifact, name, options.max_batch_size)
    config = config_text(model)

    def write(directory: Path) -> Iterable[str]:
        place = directory / name
        version = place / VERSION
        version.mkdir(parents=True)
        (place / CONFIG_FILE).write_text(config, encoding="utf-8")
        copy_artifact_files(artifact, filter(_is_of_client, artifact.manifest.files), place)
        copy_sentence_pipeline(artifact.directory, place)
        ids, entries = _write_model(artifact, version / model.file)
        text = adapters_text(ids, entries, artifact.manifest.base)
        # Beside the configuration: Triton warns of directories there that are no version.
        (place / ADAPTERS_FILE).write_text(text, encoding="utf-8")
        _record(artifact, directory)
        return ids

    return write


def next_command(directory: Path, adapters: Sequence[str]) -> str:
    """The command that uses the package."""
    del adapters
    return f"tritonserver --model-repository {shlex.quote(str(directory))}"


def rows_in_use(snapshot: Snapshot) -> dict[str, BankRow]:
    """The rows by name, the base model's first, then in the order in which they were added."""
    rows = sorted(snapshot.rows.items(), key=lambda item: item[1].number)
    return {BASE_NAME: snapshot.base, **dict(rows)}


def write_bank(snapshot: Snapshot, rows: Iterable[BankRow], directory: Path) -> None:
    """Write rows and a last one of NaN to BANK_FILE, each checked against its checksum.

    Raises:
        ArtifactError: a row's bytes differ from the recorded ones.
    """
    with (directory / BANK_FILE).open("xb") as file:
        for row in rows:
            check_row(row, snapshot.values)
            file.write(snapshot.values[row.number].tobytes())
        file.write(np.full_like(snapshot.values[0], np.nan).tobytes())


def adapters_text(
    ids: Mapping[str, int | None], entries: Mapping[str, AdapterEntry], base: BaseEntry
) -> str:
    """The content of ADAPTERS_FILE: id, labels and digest by name.

    Args:
        ids: the id that requests send for each adapter; None where the model has no such input.
        entries: the manifest's entries of all adapters in `ids` but the base model.
        base: the base model, which has no digest.
    """
    adapters = {}
    for name, number in ids.items():
        entry = entries.get(name)
        labels = base.labels if entry is None else entry.labels
        kind = base.problem_type if entry is None else entry.problem_type
        adapters[name] = {
            "id": number,
            "labels": labels,
            "problem_type": kind,
            "digest": entry and entry.digest,
        }
    return json.dumps(adapters, indent=2, ensure_ascii=False) + "\n"


def _is_of_client(name: str) -> bool:
    """Whether clients need the file: config.json and the tokenizer, not the model or adapters."""
    if name.startswith(f"{TEMPLATE_DIRECTORY}/"):
        return True
    return "/" not in name and not name.startswith((GRAPH_FILE, ENGINE_FILE))


def _write_model(
    artifact: Artifact, file: Path
) -> tuple[dict[str, int | None], Mapping[str, AdapterEntry]]:
    """Write the graph or engine; return the id and the entry of each adapter in it."""
    if artifact.manifest.mode == "bank":
        return _write_bank_model(artifact, file)
    shutil.copyfile(artifact.path, file)
    _copy_weights(artifact, file.parent)
    entries = artifact.list_adapters()
    return dict.fromkeys(entries), entries


def _write_bank_model(
    artifact: Artifact, file: Path
) -> tuple[dict[str, int | None], Mapping[str, AdapterEntry]]:
    snapshot = artifact.open_bank().snapshot()
    rows = rows_in_use(snapshot)
    entries = {name: row.entry for name, row in snapshot.rows.items()}
    if artifact.manifest.kind == "engine":
        # It was built with all the rows of its bank, under the same numbers.
        for row in rows.values():
            check_row(row, snapshot.values)
        shutil.copyfile(artifact.path, file)
        return {name: row.number for name, row in rows.items()}, entries
    _write_graph_with_bank(artifact, snapshot, list(rows.values()), file)
    return {name: number for number, name in enumerate(rows)}, entries


def _write_graph_with_bank(
    artifact: Artifact, snapshot: Snapshot, rows: Sequence[BankRow], file: Path
) -> None:
    """Write the graph with these rows inside, numbered in their order, without unused ones."""
    _copy_weights(artifact, file.parent)
    write_bank(snapshot, rows, file.parent)
    graph = read_graph(artifact.directory)
    BuildInBank(file.parent, len(rows))(graph)
    lower_ir_version_(graph)  # of an artifact that an earlier version exported
    ir.save(graph, file)


def _copy_weights(artifact: Artifact, directory: Path) -> None:
    copy_artifact_files(artifact, artifact.manifest.files.keys() & {WEIGHTS_FILE}, directory)


def _record(artifact: Artifact, directory: Path) -> None:
    """Record the artifact it was made from, in a manifest of a kind that no command loads."""
    files = {
        file.relative_to(directory).as_posix(): digest_of(file)
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }
    record = json.loads(artifact.manifest.to_json()) | {"kind": "triton", "files": files}
    text = json.dumps(record, indent=2) + "\n"
    (directory / MANIFEST_FILE).write_text(text, encoding="utf-8")
