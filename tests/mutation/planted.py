"""A copy of a clean artifact that a mistake is planted in, so that only its numbers can tell."""

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy
import numpy as np
import onnx_ir as ir
from safetensors.numpy import load_file, save_file
from sealed_registry import seal_again

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.file_names import BASE_FEEDS, GRAPH_FILE
from propulsion_export.artifacts.layout import packed_inputs, to_row
from propulsion_export.artifacts.manifest import AdapterEntry, Slot
from propulsion_export.graph.files import all_graphs, read_graph, write_graphs

_CHECKPOINT = "model.safetensors"
_FLOATS = ("float32", "float16", "bfloat16")


class Copy:
    """A copy of an artifact whose graphs, weights, adapters and files can be changed.

    Attributes:
        clean: the directory of the artifact.
        directory: the directory of the copy.
        manifest: the manifest to write; `write` records the digests of the files as they are then.
    """

    def __init__(self, clean: Path, directory: Path) -> None:
        shutil.copytree(clean, directory, dirs_exist_ok=True)
        self.clean, self.directory = clean, directory
        self.manifest = Artifact.read(directory).manifest

    @property
    def artifact(self) -> Artifact:
        """The copy as an artifact, with the manifest as it is now."""
        return Artifact(self.directory, self.manifest)

    @cached_property
    def graphs(self) -> dict[str, ir.Model]:
        """The graphs by file name, weights in memory; empty for a checkpoint."""
        if self.manifest.kind != "onnx":
            return {}
        names = list(self.manifest.graphs) or [GRAPH_FILE]
        models = {name: read_graph(self.directory, name) for name in names}
        for model in models.values():
            _load_weights_(model)
        return models

    @cached_property
    def checkpoint(self) -> dict[str, Array]:
        """The tensors of a merged checkpoint; empty for a graph."""
        if self.manifest.kind != "merged":
            return {}
        return dict(load_file(self.directory / _CHECKPOINT))

    @property
    def weights(self) -> dict[str, Array]:
        """All weights in floating point, by file and name, but for the slots of adapters."""
        named = dict(self._weights())
        return {n: v for n, v in named.items() if v.dtype.name in _FLOATS}

    @property
    def integers(self) -> dict[str, Array]:
        """All other constants with a dimension, by file and name."""
        named = dict(self._weights())
        return {n: v for n, v in named.items() if v.dtype.name not in _FLOATS and v.ndim}

    def set_weight(self, key: str, values: Array) -> None:
        """Replace a weight; it keeps its dtype."""
        file, _, name = key.partition(":")
        if file == _CHECKPOINT:
            self.checkpoint[name] = np.ascontiguousarray(values, self.checkpoint[name].dtype)
            return
        value = self.graphs[file].graph.initializers[name]
        old = value.const_value
        assert old is not None
        new = np.ascontiguousarray(values).astype(old.numpy().dtype)
        value.const_value = ir.Tensor(new, dtype=old.dtype, name=name)

    def packed(self, adapter: str) -> dict[str, Array]:
        """The packed inputs of an adapter or of `base`."""
        return {n: np.array(v) for n, v in packed_inputs(self.artifact, adapter).items()}

    def set_packed(self, adapter: str, feeds: Mapping[str, Array]) -> None:
        """Replace the packed inputs of an adapter or of `base`, with the right checksum."""
        if self.manifest.mode == "bank":
            self._set_row(adapter, to_row(feeds, self.manifest.layout))
            return
        file = BASE_FEEDS if adapter == "base" else self.manifest.adapters[adapter].file
        assert file is not None
        save_file({n: np.ascontiguousarray(v) for n, v in feeds.items()}, self.directory / file)

    def set_entry(self, adapter: str, **fields: Any) -> None:
        """Change the manifest's record of an adapter; in a bank the registry's."""
        if self.manifest.mode == "bank":
            with sqlite3.connect(self.directory / "adapters/registry.sqlite") as db:
                (text,) = db.execute(
                    "SELECT entry FROM adapters WHERE name = ?", [adapter]
                ).fetchone()
                entry = json.dumps(json.loads(text) | fields)
                db.execute("UPDATE adapters SET entry = ? WHERE name = ?", [entry, adapter])
                seal_again(db, adapter)
            db.close()
            return
        changed: AdapterEntry = replace(self.manifest.adapters[adapter], **fields)
        self.manifest = replace(
            self.manifest, adapters={**self.manifest.adapters, adapter: changed}
        )

    def slots(self) -> Iterator[tuple[str, Slot]]:
        """Every slot with the packed input that it is in."""
        for packed, slots in self.manifest.layout.items():
            for slot in slots:
                yield packed, slot

    def change_json(self, file: str, **settings: Any) -> None:
        """Change settings in a JSON file of the directory."""
        path = self.directory / file
        path.write_text(json.dumps(json.loads(path.read_text()) | settings, indent=2))

    def read_json(self, file: str) -> dict[str, Any]:
        """A JSON file of the directory; empty if there is none."""
        path = self.directory / file
        return json.loads(path.read_text()) if path.is_file() else {}

    def write(self) -> bool:
        """Write what was changed, and the digests; whether the copy differs from the artifact."""
        if "graphs" in self.__dict__:
            write_graphs(self.graphs, self.directory)
        if "checkpoint" in self.__dict__:
            save_file(self.checkpoint, self.directory / _CHECKPOINT, {"format": "pt"})
        Artifact.write(self.directory, self.manifest)
        return content_of(self.directory) != content_of(self.clean)

    def _weights(self) -> Iterator[tuple[str, Array]]:
        for name, values in self.checkpoint.items():
            yield f"{_CHECKPOINT}:{name}", values
        for file, model in self.graphs.items():
            given = {value.name for value in model.graph.inputs}
            for name, value in model.graph.initializers.items():
                if value.const_value is not None and name not in given:
                    yield f"{file}:{name}", value.const_value.numpy()

    def _set_row(self, adapter: str, row: Array) -> None:
        with sqlite3.connect(self.directory / "adapters/registry.sqlite") as db:
            (file,) = db.execute("SELECT file FROM bank").fetchone()
            number = 0
            data = np.ascontiguousarray(row).tobytes()
            checksum = f"sha256:{hashlib.sha256(data).hexdigest()}"
            if adapter == "base":
                db.execute("UPDATE bank SET base_checksum = ?", [checksum])
            else:
                (number,) = db.execute(
                    "SELECT number FROM adapters WHERE name = ?", [adapter]
                ).fetchone()
                db.execute("UPDATE adapters SET checksum = ? WHERE name = ?", [checksum, adapter])
                seal_again(db, adapter)
            with (self.directory / file).open("r+b") as rows:
                rows.seek(number * len(data))
                rows.write(data)
        db.close()


def content_of(directory: Path) -> dict[str, bytes]:
    """The digest of every file, of which bytes that a runtime reads; graphs as they serialise."""
    return {
        file.relative_to(directory).as_posix(): hashlib.sha256(file.read_bytes()).digest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def _load_weights_(model: ir.Model) -> None:
    """Take the weights into memory, so that the file they are in can be written anew."""
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                old = value.const_value
                value.const_value = ir.Tensor(
                    np.array(old.numpy()), dtype=old.dtype, name=value.name
                )
