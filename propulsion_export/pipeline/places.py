"""Where the artifacts of one command go: one for each mode or adapter, all of them or none."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from propulsion_export.artifacts.file_names import MANIFEST_FILE
from propulsion_export.artifacts.manifest import ArtifactKind
from propulsion_export.artifacts.staging import check_replaceable, staged_directory
from propulsion_export.errors import UsageError

Name = TypeVar("Name", bound=str)


@dataclass(frozen=True)
class Places(Generic[Name]):
    """Where the artifacts go.

    Attributes:
        output: the directory of the artifact if there is one, else the directory that holds one of
            its name for each.
        names: of the artifacts, such as modes or adapters.
        kind: of the artifacts.
        force: replace earlier outputs.
        inputs: files and directories that are never replaced.
    """

    output: Path
    names: Sequence[Name]
    kind: ArtifactKind
    force: bool
    inputs: Sequence[str]

    @property
    def by_name(self) -> dict[Name, Path]:
        """The directory of each artifact."""
        return self._inside(self.output)

    def check(self) -> None:
        """Refuse an output that holds something which must not be lost, before long work.

        Raises:
            UsageError: it is an artifact, so it is no place for several; `check_replaceable`
                refuses it.
        """
        if self._several and (self.output / MANIFEST_FILE).is_file():
            raise UsageError(
                f"{self.output}: is an artifact, expected a directory for "
                f"{' and '.join(self.names)}",
                remedy="Choose another directory.",
            )
        check_replaceable(
            self.output,
            marker=MANIFEST_FILE,
            kind=self.kind,
            force=self.force,
            inputs=self.inputs,
            several=self._several,
        )

    @contextmanager
    def staged(self) -> Iterator[dict[Name, Path]]:
        """Empty directories, moved to their places in one step when all of them are complete."""
        with staged_directory(
            self.output,
            marker=MANIFEST_FILE,
            kind=self.kind,
            force=self.force,
            inputs=self.inputs,
            several=self._several,
        ) as directory:
            places = self._inside(directory)
            for place in places.values():
                place.mkdir(exist_ok=True)
            yield places

    @property
    def _several(self) -> Sequence[Name]:
        return self.names if len(self.names) > 1 else ()

    def _inside(self, directory: Path) -> dict[Name, Path]:
        return {name: directory / name if self._several else directory for name in self.names}
