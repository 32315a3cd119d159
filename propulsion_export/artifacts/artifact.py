"""The currency between stages: a directory with one model in one format, and its manifest.

Reading checks the manifest and every file it names, so that nothing downstream has to.
"""

import fnmatch
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.artifacts.bank import Bank, check_row, is_bank_file
from propulsion_export.artifacts.file_names import (
    BASE_FEEDS,
    ENCODER_DECODER_FILES,
    ENGINE_FILE,
    GRAPH_FILE,
    MANIFEST_FILE,
)
from propulsion_export.artifacts.manifest import (
    ADD_ONE,
    AdapterEntry,
    Manifest,
    read_manifest,
)
from propulsion_export.artifacts.staging import replace_file
from propulsion_export.artifacts.tensor_names import BANK_INPUT, IDS_INPUT
from propulsion_export.errors import ArtifactError, UnknownAdapterError, unknown_adapters

# Files that a runtime or transformers looks for by name in an artifact's directory.
_READ = (
    f"{GRAPH_FILE}*",
    *ENCODER_DECODER_FILES,
    ENGINE_FILE,
    "[!.]*.safetensors",
    "[!.]*.safetensors.index.json",
    "pytorch_model*.bin*",
    "config.json",
    "generation_config.json",
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("spiece.model", "sentencepiece*.model", "spm.model", "bpe.codes", "chat_template*"),
)

# Named arrays: what flows inside a run. A runner is any callable from tensors to tensors.
Tensors = Mapping[str, npt.NDArray[Any]]
Runner = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Artifact:
    """A directory and its checked manifest."""

    directory: Path
    manifest: Manifest

    @classmethod
    def read(cls, directory: Path | str) -> Self:
        """Read and check an artifact, digests of all files included.

        Raises:
            ArtifactError: no manifest; it is damaged, of a newer schema or holds an unknown value;
                a path leads out of the directory; a file is missing or not the recorded one.
        """
        directory = Path(directory).expanduser()
        file = directory / MANIFEST_FILE
        if not os.path.isfile(file):  # noqa: PTH113 - of any path, it does not raise
            raise ArtifactError(
                f"{directory}: has no {MANIFEST_FILE}, expected a directory written by "
                "`propulsion-export merge`, `onnx` or `trt`"
            )
        manifest = read_manifest(file)
        _check_files(directory, manifest)
        return cls(directory, manifest)

    @classmethod
    def write(cls, directory: Path, manifest: Manifest) -> Self:
        """Record the digests of all files in `directory` and write the manifest, last of all.

        A bank grows in place, so its registry has the digests of its rows.
        """
        written = {
            file.relative_to(directory).as_posix(): digest_of(file)
            for file in sorted(directory.rglob("*"))
            if file.is_file()
            and file.name != MANIFEST_FILE
            and not is_bank_file(file.relative_to(directory).as_posix())
        }
        manifest = replace(manifest, files=written)
        replace_file(directory / MANIFEST_FILE, manifest.to_json().encode())
        return cls(directory, manifest)

    @property
    def path(self) -> Path:
        """The model file, or for a merged checkpoint or several graphs the directory."""
        graph = "" if self.manifest.graphs else GRAPH_FILE
        names = {"onnx": graph, "engine": ENGINE_FILE, "merged": ""}
        return self.directory / names[self.manifest.kind]

    @property
    def bank(self) -> Bank:
        """Its bank, opened."""
        return Bank.open(self.directory)

    @property
    def adapters(self) -> Mapping[str, AdapterEntry]:
        """Its adapters by name, without the base model."""
        if self.manifest.mode == "bank":
            return {name: row.entry for name, row in self.bank.rows().items()}
        return self.manifest.adapters

    def feeds(self, adapter: str | None) -> Tensors:
        """What to feed besides for one adapter by name; `None` or `base`: no adapter.

        That of a bank are the bank and one id, int64 [1], for all rows of a batch.

        Raises:
            UnknownAdapterError: the artifact has no adapter of that name.
            ArtifactError: its file cannot be read.
        """
        if self.manifest.mode == "folded":
            self.check_names([] if adapter is None else [adapter])
            return {}
        name = BASE_NAME if adapter is None else adapter
        if self.manifest.mode == "bank":
            (row,), values = self.bank.choose([name])
            check_row(row, values)
            return {BANK_INPUT: values, IDS_INPUT: np.array([row.number])}
        # Registers bfloat16 with numpy, which safetensors needs to load it.
        import ml_dtypes  # noqa: F401
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        self.check_names([name])
        file = BASE_FEEDS if name == BASE_NAME else self.manifest.adapters[name].file
        if file not in self.manifest.files:
            raise ArtifactError(
                f"{self.directory / MANIFEST_FILE}: files has no {file}, what to feed for {name!r}",
                remedy="Export again.",
            )
        try:
            return dict(load_file(self.directory / file))
        except (SafetensorError, OSError, AttributeError, TypeError, KeyError) as error:
            # The last three are what it does for a dtype that numpy does not have.
            raise ArtifactError(
                f"{self.directory / file}: holds no feeds that can be read ({error})",
                remedy="Copy the whole directory again, or export again.",
            ) from error

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse names that no adapter has; a bank knows its own.

        Raises:
            UnknownAdapterError: there is one.
        """
        folded = self.manifest.mode == "folded" and bool(self.manifest.adapters)
        known = [*(() if folded else (BASE_NAME,)), *sorted(self.manifest.adapters)]
        unknown = [name for name in dict.fromkeys(names) if name not in known]
        if unknown and folded:
            raise UnknownAdapterError(
                *(
                    f"{self.directory}: has the adapter {known[0]!r} folded in, expected no other, "
                    f"got {name!r}"
                    for name in unknown
                ),
                remedy="Export with --mode switchable to choose adapters at run time.",
            )
        if unknown:
            raise unknown_adapters(self.directory, unknown, known, remedy=ADD_ONE)

    def with_manifest(self, manifest: Manifest) -> Self:
        """Replace the manifest alone, in one step; files keep the digests it names."""
        replace_file(self.directory / MANIFEST_FILE, manifest.to_json().encode())
        return type(self)(self.directory, manifest)


def digest_of(file: Path) -> str:
    """`sha256:…` of a file's content."""
    with file.open("rb") as content:
        return f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}"


def _check_files(directory: Path, manifest: Manifest) -> None:
    named = [*manifest.files, *(e.file for e in manifest.adapters.values() if e.file)]
    escaping = [
        f"{directory / MANIFEST_FILE}: the path {name!r} leads out of the directory"
        for name in named
        if not _leads_inside(directory, name)
    ]
    if escaping:
        raise ArtifactError(*escaping)
    named += [*_needed(manifest), *_read_by_others(directory)]
    unrecorded = [name for name in dict.fromkeys(named) if name not in manifest.files]
    missing = [name for name in dict.fromkeys(named) if not (directory / name).is_file()]
    if unrecorded or missing:
        raise ArtifactError(
            *(f"{directory / name}: is missing" for name in missing),
            *(f"{directory / name}: has no digest in the manifest" for name in unrecorded),
            remedy="Copy the whole directory again, or export again.",
        )
    changed = [
        f"{directory / name}: its content is not what the manifest recorded"
        for name, digest in manifest.files.items()
        if digest_of(directory / name) != digest
    ]
    if changed:
        raise ArtifactError(*changed, remedy="Copy the whole directory again, or export again.")


def _needed(manifest: Manifest) -> list[str]:
    """What an artifact of its kind cannot be without."""
    files = {
        # Several graphs are run with the first token that the configuration tells.
        "onnx": [*manifest.graphs, "config.json"] if manifest.graphs else [GRAPH_FILE],
        "engine": [ENGINE_FILE],
        "merged": ["config.json"],
    }
    needed = files[manifest.kind]
    if manifest.kind == "merged" and not any(f.endswith(".safetensors") for f in manifest.files):
        needed.append("model.safetensors")
    if manifest.mode == "switchable":
        needed.append(BASE_FEEDS)
    return needed


def _read_by_others(directory: Path) -> list[str]:
    """The files beside the manifest that a runtime or transformers would load by their names.

    Below `adapters/` nothing is read that the manifest does not name: what a killed process left
    there does no harm.
    """
    return [
        file.name
        for file in sorted(directory.iterdir())
        if any(fnmatch.fnmatchcase(file.name, pattern) for pattern in _READ)
    ]


def _leads_inside(directory: Path, name: str) -> bool:
    """Whether a path, followed to its end, stays in the directory; unusable ones do not."""
    try:
        path = (directory / name).resolve()
        path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, a loop of links
        return False
    return path.is_relative_to(directory.resolve())
