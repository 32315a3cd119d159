"""Where the artifacts of an export go: one for each mode, all of them or none."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from propulsion_export.artifacts.file_names import MANIFEST_FILE
from propulsion_export.artifacts.manifest import Mode
from propulsion_export.artifacts.staging import check_replaceable, staged_directory
from propulsion_export.errors import UsageError


@dataclass(frozen=True)
class Places:
    """Where the artifacts go.

    Attributes:
        by_mode: the directory of each mode.
        force: replace earlier outputs.
        inputs: files and directories that are never replaced.
    """

    by_mode: dict[Mode, Path]
    force: bool
    inputs: Sequence[str]

    def check(self) -> None:
        """Refuse directories that hold something which must not be lost, before long work."""
        for place in self.by_mode.values():
            check_replaceable(
                place, marker=MANIFEST_FILE, kind="onnx", force=self.force, inputs=self.inputs
            )

    @contextmanager
    def staged(self) -> Iterator[dict[Mode, Path]]:
        """Empty directories, moved to their places when all of them are complete."""
        with ExitStack() as stack:
            yield {
                mode: stack.enter_context(
                    staged_directory(
                        place,
                        marker=MANIFEST_FILE,
                        kind="onnx",
                        force=self.force,
                        inputs=self.inputs,
                    )
                )
                for mode, place in self.by_mode.items()
            }


def directories(output: Path, modes: Sequence[Mode]) -> dict[Mode, Path]:
    """The directory of each mode: `output` itself for one, else one inside it for each.

    Raises:
        UsageError: `output` is an artifact, so it is no place for several.
    """
    if len(modes) == 1:
        return {modes[0]: output}
    if (output / MANIFEST_FILE).is_file():
        raise UsageError(
            f"{output}: is an artifact, expected a directory for {' and '.join(modes)}",
            remedy="Choose another directory.",
        )
    return {mode: output / mode for mode in modes}
