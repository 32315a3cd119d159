"""Notice that the weights of a loaded model are changed on disk.

ONNX Runtime and PyTorch map a file of weights instead of reading it, so that what is written into
it later would be computed with.
"""

import threading
from pathlib import Path

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.file_names import ADAPTERS
from propulsion_export.artifacts.watched_file import Moment, WatchedFile
from propulsion_export.errors import ArtifactError


class Weights:
    """The files of a loaded model that a runtime may have mapped; threads may share it.

    Raises:
        ArtifactError: there is no such file.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._files: list[WatchedFile] = []
        self._digests: list[str] = []
        for name, digest in artifact.manifest.files.items():
            if _may_be_mapped(name):
                self._files.append(_watch(artifact.directory / name))
                self._digests.append(digest)
        self._seen: list[Moment | None] = [file.moment() for file in self._files]
        self._refused: set[int] = set()
        self._checking = threading.Lock()

    def check(self) -> None:
        """Refuse weights that are not what the manifest recorded; read only if written to since.

        Raises:
            ArtifactError: naming the file.
        """
        for number, file in enumerate(self._files):
            if (moment := file.moment()) is None or moment != self._seen[number]:
                with self._checking:
                    self._check(number, moment)

    def _check(self, number: int, moment: Moment | None) -> None:
        file, seen = self._files[number], self._seen[number]
        if moment is not None and moment == seen:  # another thread has just checked it
            return
        # One that was refused is read again, for it may be deleted to make way for a good one.
        trusted = number not in self._refused and file.is_only_replaced()
        if not trusted and file.digest() != self._digests[number]:
            self._refused.add(number)
            raise ArtifactError(
                f"{file.path}: was changed while it is being served, expected a file that is "
                "replaced by another one",
                remedy="Copy the whole directory again, and load it again.",
            )
        self._refused.discard(number)
        self._seen[number] = moment


def _watch(path: Path) -> WatchedFile:
    try:
        with path.open("rb") as file:
            return WatchedFile(file)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from error


def _may_be_mapped(name: str) -> bool:
    weights = ".onnx" in name or name.endswith(".safetensors")
    return weights and not name.startswith(f"{ADAPTERS}/")
