"""Write outputs to a temporary place and move them, so that they appear complete or not at all."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

from propulsion_export.artifacts.disk_errors import ELSEWHERE, FORBIDDEN, FULL, disk_errors_in_words
from propulsion_export.artifacts.replacing import aside, replace_directory, sweep, sync
from propulsion_export.environment.hub_files import cached_repository
from propulsion_export.environment.mounts import mount_points
from propulsion_export.environment.paths import user_path
from propulsion_export.errors import UsageError

# The file that marks a directory as an artifact, an adapter or a report. With `force` an output
# replaces only a directory of its own kind.
Marker = Literal["propulsion.json", "adapter_config.json", "parity.json"]
MARKERS: tuple[Marker, ...] = get_args(Marker)
_SHOWN = 4  # outputs in a message
_MODEL_WEIGHTS = r"(model|pytorch_model)[-.].*(safetensors|bin)"


@contextmanager
def staged_directory(
    destination: Path,
    *,
    marker: Marker,
    force: bool = False,
    inputs: Iterable[Path | str] = (),
    kind: str | None = None,
    several: Collection[str] = (),
) -> Iterator[Path]:
    """Yield an empty directory beside `destination`; on success it becomes `destination`.

    On failure, Ctrl-C included, it is removed and `destination` stays as it was. A killed process
    leaves only a hidden `.NAME.partial-PID` behind, which the next call removes.

    Args:
        destination: the directory to write.
        marker: the file that marks the kind of directory that is written; an earlier output must
            have it to be replaced.
        force: replace an earlier output.
        inputs: files and directories that the output is made from, which are never replaced.
        kind: of an artifact, as its manifest says: `onnx` does not replace `merged`, for example.
        several: the names of several outputs, each of which gets a directory of that kind in it.

    Raises:
        UsageError: `check_replaceable` refuses the destination, or the disk is full.
    """
    destination = user_path(destination).resolve()
    with disk_errors_in_words(destination, FULL | FORBIDDEN):
        check_replaceable(
            destination, marker=marker, force=force, inputs=inputs, kind=kind, several=several
        )
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial = aside(destination, "partial")
        partial.mkdir()
    try:
        with disk_errors_in_words(destination):
            yield partial
            _open_to_readers(partial)
            sync(partial)
            # Checked again: another process may have written there meanwhile.
            _refuse_to_lose(destination, marker, kind, force=force, several=several)
            replace_directory(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(
    destination: Path,
    *,
    marker: Marker,
    force: bool,
    inputs: Iterable[Path | str] = (),
    kind: str | None = None,
    several: Collection[str] = (),
) -> None:
    """Refuse a destination that holds something which must not be lost.

    Commands call it before long work, so that they refuse at once. It first cleans up after killed
    processes: an earlier output that one had moved away is moved back.

    Raises:
        UsageError: the destination is a file, or a directory that is not empty, and `force` is off
            or it has no `marker` or is of another `kind`; it holds others than `several`; it is or
            holds one of the `inputs`; its parent cannot be written to.
    """
    destination = user_path(destination).resolve()
    with disk_errors_in_words(destination, FORBIDDEN):
        refuse_cache(destination)
        sweep(destination)
        refuse_inputs(destination, inputs, "directory")
        _refuse_to_lose(destination, marker, kind, force=force, several=several)


def refuse_cache(destination: Path) -> None:
    """Refuse a place in a hub's cache."""
    if cached_repository(destination) is not None:
        found = f"{destination}: lies in a hub's cache, whose files other revisions share"
        raise UsageError(found, remedy=ELSEWHERE)


def refuse_inputs(
    destination: Path, inputs: Iterable[Path | str], kind: Literal["directory", "file"]
) -> None:
    """Refuse to replace an input; names that are not paths here, such as a hub's, are skipped.

    Args:
        destination: what is to be written.
        inputs: paths and names.
        kind: what the output is, for the message.

    Raises:
        UsageError: the destination is one of the inputs, or holds one.
    """
    for given in inputs:
        path = user_path(given)
        if not str(given) or not os.path.lexists(path):  # unlike Path.exists() it never raises
            continue
        path = path.resolve()
        if destination == path:
            relation = "is an input of this command"
        elif path.is_relative_to(destination):
            relation = f"holds {path}, an input of this command"
        else:
            continue
        raise UsageError(
            f"{destination}: {relation}, expected a {kind} of its own to write",
            remedy=f"Choose another {kind}.",
        )


def _refuse_to_lose(
    destination: Path, marker: Marker, kind: str | None, *, force: bool, several: Collection[str]
) -> None:
    refuse_unwritable(destination)
    if not destination.exists():
        return
    if not destination.is_dir():
        raise UsageError(f"{destination}: is a file, expected a directory to write to")
    _refuse_mounts(destination)
    if not any(destination.iterdir()):
        return
    if not force:
        raise UsageError(
            f"{destination}: exists and is not empty, expected a new or empty directory",
            remedy="Choose another directory, or replace this one with --force.",
        )
    _refuse_other_number(destination, marker, several)
    for place in sorted(destination.iterdir()) if several else [destination]:
        _refuse_other_kind(place, marker, kind)
    if weights := _weights_beside_an_adapter(destination, marker):
        raise UsageError(
            f"{destination}: holds the base model's weights too ({weights}), so --force does not "
            "replace it",
            remedy="Choose another directory.",
        )
    if Path.cwd().is_relative_to(destination):
        raise UsageError(f"{destination}: the current directory lies inside, it is not replaced")


def _refuse_other_number(destination: Path, marker: Marker, several: Collection[str]) -> None:
    """Refuse to replace one output by several, several by one, or several by others."""
    single, inside = (destination / marker).is_file(), sorted(destination.iterdir())
    if several and single:
        finding = "is a single output, expected a directory of several"
    elif not (several or single) and all((place / marker).is_file() for place in inside):
        names = ", ".join(place.name for place in inside[:_SHOWN])
        finding = f"is a directory of several outputs ({names}), expected a single one"
    elif several and (others := {place.name for place in inside} - {*several}):
        finding = f"holds {min(others)}, expected nothing but {' and '.join(several)}"
    else:
        return
    raise UsageError(
        f"{destination}: {finding}, so --force does not replace it",
        remedy="Choose another directory.",
    )


def _refuse_other_kind(destination: Path, marker: Marker, kind: str | None) -> None:
    found = {known for known in MARKERS if (destination / known).is_file()}
    if found - {marker}:
        reason = f"holds {min(found - {marker})}"
    elif not found:
        reason = f"holds no {marker}" if destination.is_dir() else "is a file"
    elif kind is not None and (earlier := _kind_in(destination / marker)) not in (kind, None):
        reason = f"is of kind {earlier}, not {kind}"
    else:
        reason = ""
    if reason:
        raise UsageError(
            f"{destination}: {reason}, expected nothing but an output of this command, so --force "
            "does not replace it",
            remedy="Choose another directory.",
        )


def _kind_in(manifest: Path) -> str | None:
    """The kind of an artifact; None if its manifest is damaged: an output that nobody can use."""
    try:
        content = json.loads(manifest.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    kind = content.get("kind") if isinstance(content, dict) else None
    return kind if isinstance(kind, str) else None


def _refuse_mounts(destination: Path) -> None:
    if destination.is_mount() or destination in (mounts := mount_points()):
        raise UsageError(
            f"{destination}: is a mount point, expected a directory that can be moved",
            remedy="Choose a directory inside it.",
        )
    if inside := next((path for path in mounts if path.is_relative_to(destination)), None):
        raise UsageError(
            f"{destination}: holds the mount point {inside}, it is not replaced",
            remedy="Choose another directory.",
        )


def _weights_beside_an_adapter(destination: Path, marker: Marker) -> str | None:
    """A file of model weights in an adapter's directory; no command of ours writes one there."""
    if marker != "adapter_config.json":
        return None
    names = (path.name for path in destination.iterdir())
    return min((name for name in names if re.match(_MODEL_WEIGHTS, name)), default=None)


def refuse_unwritable(destination: Path) -> None:
    """Refuse a place where nothing can be created."""
    above = next(path for path in destination.parents if path.exists())
    if not above.is_dir():
        raise UsageError(f"{above}: is a file, expected a directory to write {destination} in")
    if not os.access(above, os.W_OK):
        raise UsageError(f"{above}: no permission to write here", remedy=ELSEWHERE)


def check_replaceable_file(path: Path, *, holds: bytes) -> None:
    """Refuse to replace a file of another kind.

    Raises:
        UsageError: the file exists, and its first 400 bytes do not contain `holds`.
    """
    if not path.is_file():
        return
    with path.open("rb") as content:
        if holds not in content.read(400):
            raise UsageError(
                f"{path}: exists and does not hold {holds.decode()}, so it is not replaced",
                remedy="Choose another file.",
            )


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: a crash leaves either the old or the new content.

    Missing parent directories are created. A killed process leaves only a hidden
    `.NAME.partial-PID-…` behind, which the next call removes.

    Raises:
        UsageError: `path` is a directory or cannot be written to; the disk is full.
    """
    with disk_errors_in_words(path, FULL | FORBIDDEN):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        # Two threads may replace the same file, so each has a temporary name of its own.
        partial = aside(path, "partial")
        partial = partial.with_name(f"{partial.name}-{secrets.token_hex(4)}")
        try:
            with partial.open("xb") as file:  # not tempfile: its files are 0600 whatever the umask
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _open_to_readers(directory: Path) -> None:
    """Give every file the directory's permissions; safetensors creates files with 0600.

    A file that is linked elsewhere too keeps its own.
    """
    rights = directory.stat().st_mode & 0o666
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1:
            path.chmod(rights)
