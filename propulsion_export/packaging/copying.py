"""Copy an artifact's files into a package."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from propulsion_export.artifacts.artifact import Artifact


def copy_artifact_files(artifact: Artifact, names: Iterable[str], directory: Path) -> None:
    """Copy the named files of an artifact to the same paths below `directory`."""
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.directory / name, directory / name)
