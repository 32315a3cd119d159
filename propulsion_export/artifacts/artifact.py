"""An artifact: a directory with one model in one format and its manifest, passed between stages.

Reading one verifies the manifest and every file it names, so that later stages need not.
"""

import fnmatch
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.artifacts.bank import Bank, check_row, is_bank_file
from propulsion_export.artifacts.bound_directory import find_directory
from propulsion_export.artifacts.file_names import (
    ADAPTERS,
    BASE_FEEDS,
    ENCODER_DECODER_FILES,
    ENGINE_FILE,
    GENAI_CONFIG_FILE,
    GRAPH_FILE,
    MANIFEST_FILE,
)
from propulsion_export.artifacts.manifest import (
    ADD_ONE,
    COPY_AGAIN,
    AdapterEntry,
    Manifest,
    read_manifest,
)
from propulsion_export.artifacts.rounding import numpy_dtype
from propulsion_export.artifacts.staging import replace_file
from propulsion_export.artifacts.tensor_names import BANK_INPUT, IDS_INPUT
from propulsion_export.base_model.sentences.modules import (
    MODULES_FILE,
    SETTINGS_FILE,
    TRANSFORMER_FILES,
)
from propulsion_export.base_model.tokenizer.files import VOCABULARY_FILES
from propulsion_export.base_model.tokenizer.recorded import RECORD_FILE
from propulsion_export.environment.hub_files import leads_inside, refuse_pointers
from propulsion_export.environment.paths import user_path
from propulsion_export.environment.permissions import check_permission
from propulsion_export.errors import ArtifactError, UnknownAdapterError, unknown_adapters

# Patterns of files that a runtime or transformers looks for by name in an artifact's directory.
_READ = (
    f"{GRAPH_FILE}*",
    *ENCODER_DECODER_FILES,
    ENGINE_FILE,
    "[!.]*.safetensors",
    "[!.]*.safetensors.index.json",
    "pytorch_model*.bin*",
    "config.json",
    "generation_config.json",
    GENAI_CONFIG_FILE,
    RECORD_FILE,
    *(MODULES_FILE, SETTINGS_FILE, *TRANSFORMER_FILES),
    *VOCABULARY_FILES,
    *("tokenizer*", "vocab.*", "sentencepiece*.model", "chat_template*"),
)

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names

# Arrays by name, such as a model's inputs; a runner is any callable from inputs to outputs.
Tensors = Mapping[str, npt.NDArray[Any]]
Runner = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Artifact:
    """A directory and its checked manifest.

    Attributes:
        directory: where it is; links to it were followed when it was read.
        manifest: what is in it.
        given: the path that the user gave, where that leads through a link; see `shown`.
    """

    directory: Path
    manifest: Manifest
    given: Path | None = field(default=None, compare=False)

    @classmethod
    def read(cls, directory: Path | str, *, shown: Path | None = None) -> Self:
        """Read and verify an artifact, including the digests of all its files.

        Links to the directory are followed once: what is read of the artifact later is read from
        the same directory.

        Args:
            directory: the artifact's.
            shown: the path that messages name it by; default: `directory`.

        Raises:
            ArtifactError: there is no manifest; it is damaged, of another schema version or holds
                an unknown value; a path leads out of the directory; a file is missing or changed.
        """
        given = shown or user_path(directory)
        directory = find_directory(directory)
        file = directory / MANIFEST_FILE
        if not os.path.isfile(file):  # noqa: PTH113 - never raises, whatever the path
            check_permission(directory, ArtifactError)
            there = os.path.exists(directory)  # noqa: PTH110 - never raises either
            found = f"has no {MANIFEST_FILE}" if there else "does not exist"
            raise ArtifactError(
                f"{given}: {found}, expected a directory written by "
                "`propulsion-export merge`, `onnx` or `trt`"
            )
        manifest = read_manifest(file, shown=given / MANIFEST_FILE)
        artifact = cls(directory, manifest, None if given == directory else given)
        _check_files(artifact)
        return artifact

    @classmethod
    def write(
        cls, directory: Path, manifest: Manifest, *, digests: Mapping[str, str] | None = None
    ) -> Self:
        """Record the digests of all files in `directory`, then write the manifest.

        A bank's files get no digest, since they change in place; its registry has the rows'
        checksums.

        Args:
            directory: the artifact's.
            manifest: gets the digests.
            digests: those that are known already, by path in the directory; the others are read.
        """
        known = digests or {}
        names = {
            file.relative_to(directory).as_posix(): file
            for file in sorted(directory.rglob("*"))
            if file.is_file() and file.name != MANIFEST_FILE
        }
        written = {
            name: known.get(name) or digest_of(file)
            for name, file in names.items()
            if not is_bank_file(name)
        }
        manifest = replace(manifest, files=written)
        replace_file(directory / MANIFEST_FILE, manifest.to_file())
        return cls(directory, manifest)

    def at(self, directory: Path | str) -> Self:
        """The same artifact after its directory was moved to `directory`."""
        return replace(self, directory=user_path(directory), given=None)

    @property
    def shown(self) -> Path:
        """The directory as messages name it: by the path that the user gave."""
        return self.given or self.directory

    @property
    def path(self) -> Path:
        """The model file; the directory of a merged checkpoint or of several graphs."""
        graph = "" if self.manifest.graphs else GRAPH_FILE
        names = {"onnx": graph, "engine": ENGINE_FILE, "merged": ""}
        return self.directory / names[self.manifest.kind]

    def open_bank(self) -> Bank:
        """Open the artifact's bank.

        Raises:
            ArtifactError: it has none, or the bank is damaged.
        """
        return Bank.open(self.directory)

    def list_adapters(self) -> Mapping[str, AdapterEntry]:
        """The artifact's adapters by name, without the base model; a bank's registry is read.

        Raises:
            ArtifactError: the bank is damaged.
        """
        if self.manifest.mode == "bank":
            return {name: row.entry for name, row in self.open_bank().rows().items()}
        return self.manifest.adapters

    def feeds(self, adapter: str | None) -> Tensors:
        """The inputs that select an adapter by name; `None` or `base` select no adapter.

        For a bank these are the bank and one adapter id, int64 [1], for all rows of a batch.

        Raises:
            UnknownAdapterError: the artifact has no adapter of that name.
            ArtifactError: its file cannot be read, or is not what the manifest recorded.
        """
        if self.manifest.mode == "folded":
            self.check_names([] if adapter is None else [adapter])
            return {}
        name = BASE_NAME if adapter is None else adapter
        if self.manifest.mode == "bank":
            (row,), values = self.open_bank().choose([name])
            check_row(row, values)
            return {BANK_INPUT: values, IDS_INPUT: np.array([row.number])}
        self.check_names([name])
        file = BASE_FEEDS if name == BASE_NAME else self.manifest.adapters[name].file
        if file not in self.manifest.files:
            raise ArtifactError(
                f"{self.shown / MANIFEST_FILE}: files has no {file}, expected the packed "
                f"inputs of {name!r}",
                remedy="Export again.",
            )
        return _packed_inputs(self, file)

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse names that no adapter in the manifest has. A bank checks names itself.

        Raises:
            UnknownAdapterError: there is such a name.
        """
        folded = self.manifest.mode == "folded" and bool(self.manifest.adapters)
        known = [*(() if folded else (BASE_NAME,)), *sorted(self.manifest.adapters)]
        unknown = [name for name in dict.fromkeys(names) if name not in known]
        if unknown and folded:
            raise UnknownAdapterError(
                *(
                    f"{self.shown}: has the adapter {known[0]!r} folded in, expected no other, "
                    f"got {name!r}"
                    for name in unknown
                ),
                remedy="Export with --mode switchable to choose adapters at run time.",
            )
        if unknown:
            remedy = "" if self.manifest.mode == "folded" else ADD_ONE
            raise unknown_adapters(self.shown, unknown, known, remedy=remedy)

    def with_manifest(self, manifest: Manifest) -> Self:
        """Replace the manifest on disk, atomically; no file is hashed again."""
        replace_file(self.directory / MANIFEST_FILE, manifest.to_file())
        return replace(self, manifest=manifest)


def digest_of(file: Path) -> str:
    """`sha256:…` of a file's content."""
    with file.open("rb") as content:
        return f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}"


def _packed_inputs(artifact: Artifact, name: str) -> Tensors:
    from safetensors import SafetensorError, deserialize

    file = artifact.directory / name
    try:
        content = file.read_bytes()  # and no map of the file, which may change later
        # Checked when it is loaded: it may have been replaced since the artifact was read.
        if f"sha256:{hashlib.sha256(content).hexdigest()}" != artifact.manifest.files[name]:
            raise _changed([artifact.shown / name])
        found = deserialize(content)  # type: ignore[no-untyped-call]
        return {name: _as_array(**tensor) for name, tensor in found}
    except (SafetensorError, OSError, KeyError) as error:
        check_permission(file, ArtifactError)
        raise ArtifactError(
            f"{artifact.shown / name}: the packed inputs cannot be read ({error})",
            remedy=COPY_AGAIN,
        ) from error


def _as_array(dtype: str, shape: Sequence[int], data: bytes) -> npt.NDArray[Any]:
    return np.frombuffer(data, numpy_dtype(_DTYPES[dtype])).reshape(shape)


def _changed(files: Iterable[Path]) -> ArtifactError:
    return ArtifactError(
        *(f"{file}: its content is not what the manifest recorded" for file in files),
        remedy=COPY_AGAIN,
    )


def _check_files(artifact: Artifact) -> None:
    directory, manifest, shown = artifact.directory, artifact.manifest, artifact.shown
    named = [*manifest.files, *(e.file for e in manifest.adapters.values() if e.file)]
    escaping = [
        f"{shown / MANIFEST_FILE}: the path {name!r} leads out of the directory"
        for name in named
        if not leads_inside(directory, name)
    ]
    if escaping:
        for name in named:
            check_permission((directory / name).parent, ArtifactError)
        raise ArtifactError(*escaping)
    named += [*_needed(manifest), *_read_by_others(directory)]
    unrecorded = [name for name in dict.fromkeys(named) if name not in manifest.files]
    missing = [name for name in dict.fromkeys(named) if not (directory / name).is_file()]
    if unrecorded or missing:
        raise ArtifactError(
            *(f"{shown / name}: is missing" for name in missing),
            *(f"{shown / name}: has no digest in the manifest" for name in unrecorded),
            remedy=COPY_AGAIN,
        )
    files = [directory / name for name in manifest.files]
    in_bank = sorted((directory / ADAPTERS).glob("*")) if manifest.mode == "bank" else []
    refuse_pointers([*files, *in_bank], ArtifactError)
    changed = [
        shown / name
        for name, digest in manifest.files.items()
        if digest_of(directory / name) != digest
    ]
    if changed:
        raise _changed(changed)


def _needed(manifest: Manifest) -> list[str]:
    """The files that an artifact of this kind must have."""
    files = {
        # Generation with several graphs starts with the first token in the configuration.
        "onnx": [*manifest.graphs, "config.json"] if manifest.graphs else [GRAPH_FILE],
        "engine": [ENGINE_FILE],
        "merged": ["config.json"],
    }
    needed = files[manifest.kind]
    if manifest.kind == "merged" and not any(f.endswith(".safetensors") for f in manifest.files):
        needed.append("model.safetensors")
    if manifest.mode == "switchable":
        needed.append(BASE_FEEDS)
    if manifest.pads_right:
        needed.append(GENAI_CONFIG_FILE)
    return needed


def _read_by_others(directory: Path) -> list[str]:
    """The files beside the manifest that a runtime or transformers would load by their names.

    In `adapters/` only files that the manifest names are read, so files that a killed process left
    there do no harm.
    """
    return [
        file.name
        for file in sorted(directory.iterdir())
        if any(fnmatch.fnmatchcase(file.name, pattern) for pattern in _READ)
    ]
