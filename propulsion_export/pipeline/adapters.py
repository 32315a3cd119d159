"""`adapter add`, `remove`, `list`: change what a switchable artifact can switch to."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors.numpy import save

from propulsion_export.adapter import Adapter
from propulsion_export.artifact import Artifact, digest_of
from propulsion_export.errors import ArtifactError, UsageError
from propulsion_export.layout import check_range, pack
from propulsion_export.manifest import ADAPTERS, BASE_FEEDS, BASE_NAME, AdapterEntry, Manifest
from propulsion_export.output import replace_file
from propulsion_export.packaging.genai import CONFIG_FILE
from propulsion_export.pipeline.agreeing import check_signature
from propulsion_export.pipeline.inputs import (
    check_base,
    check_identity,
    check_name,
    read_adapters,
    source_of,
)


def add_adapter(
    artifact: Path, adapter: str | Path, *, allow_range: bool = False, force: bool = False
) -> Artifact:
    """Add an adapter, `NAME=DIR` or a directory, to a switchable artifact.

    The artifact is whole at every moment: the manifest is replaced last. Processes that change one
    artifact do so one after the other.

    Raises:
        ArtifactError: the artifact is not switchable.
        AdapterError: the adapter has a tensor that the graph has no input for.
        BaseModelError: it was trained on another base model.
        UsageError: there is one of that name and `force` is off.
    """
    (new,) = read_adapters([adapter])
    check_identity(new)
    with _locked(artifact):
        return _add(artifact, new, source_of(adapter), allow_range=allow_range, force=force)


def _add(artifact: Path, new: Adapter, source: str, *, allow_range: bool, force: bool) -> Artifact:
    read = _read_switchable(artifact)
    if new.name in read.manifest.adapters and not force:
        raise UsageError(
            f"{artifact}: has an adapter {new.name!r} already",
            remedy="Choose another name, or replace it with --force.",
        )
    check_base(read.manifest.base.fingerprint, read.manifest.base.source, [new])
    if not allow_range:
        check_range(new, read.manifest.dtype)
    feeds = pack(new, read.manifest.layout, read.feeds(BASE_NAME))
    replaced = read.manifest.adapters.get(new.name)
    file = f"{ADAPTERS}/{new.name}.safetensors"
    if replaced is not None:
        # Until the manifest is replaced the old file counts, so the new one lies beside it.
        file = f"{ADAPTERS}/{new.name}.{new.digest.removeprefix('sha256:')[:12]}.safetensors"
    replace_file(read.directory / file, save(feeds))
    entry = AdapterEntry(new.digest, source, new.size, file, new.labels)
    changed = replace(
        read.manifest,
        adapters=read.manifest.adapters | {new.name: entry},
        files=read.manifest.files | {file: digest_of(read.directory / file)},
    )
    return _commit(read, changed)


def remove_adapter(artifact: Path, name: str) -> Artifact:
    """Take an adapter out of a switchable artifact.

    Raises:
        ArtifactError: the artifact is not switchable.
        UsageError: it has no adapter of that name, or no other.
    """
    check_name(name)
    with _locked(artifact):
        return _remove(artifact, name)


def _remove(artifact: Path, name: str) -> Artifact:
    read = _read_switchable(artifact)
    entries = dict(read.manifest.adapters)
    if name not in entries:
        raise UsageError(
            f"{artifact}: has no adapter {name!r}, expected one of {', '.join(sorted(entries))}"
        )
    if len(entries) == 1:
        raise UsageError(f"{artifact}: {name!r} is its only adapter and is not removed")
    del entries[name]
    return _commit(read, replace(read.manifest, adapters=entries))


@contextmanager
def _locked(artifact: Path) -> Iterator[None]:
    """Let no other process change the artifact meanwhile.

    The lock is on the directory itself, so that none is left behind, not even by a killed process.

    Raises:
        ArtifactError: there is no such directory, or its file system has no locks.
    """
    try:
        descriptor = os.open(artifact.expanduser(), os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ArtifactError(
            f"{artifact}: cannot be opened ({error.strerror}), expected an artifact directory"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        os.close(descriptor)
        raise ArtifactError(
            f"{artifact}: cannot be locked ({error.strerror})",
            remedy="Change a copy of it on a local disk.",
        ) from error
    try:
        yield
    finally:
        os.close(descriptor)


def _commit(before: Artifact, manifest: Manifest) -> Artifact:
    """Make the manifest true in one step, then remove adapter files that it no longer names."""
    named = {entry.file for entry in manifest.adapters.values()} | {BASE_FEEDS}
    dropped = {
        path for path in manifest.files if path.startswith(f"{ADAPTERS}/") and path not in named
    }
    files = {path: digest for path, digest in manifest.files.items() if path not in dropped}
    after = before.with_manifest(replace(manifest, files=files))
    for path in dropped:
        (before.directory / path).unlink(missing_ok=True)
    return after


def _read_switchable(artifact: Path) -> Artifact:
    read = Artifact.read(artifact)
    if read.manifest.mode != "switchable" or read.manifest.kind == "merged":
        raise ArtifactError(
            f"{artifact}: is {read.manifest.mode}, expected a switchable artifact",
            remedy="Export with --mode switchable to change adapters later.",
        )
    if CONFIG_FILE in read.manifest.files:
        raise ArtifactError(
            f"{artifact}: is a package for onnxruntime-genai, which has its adapters in files of "
            "its own",
            remedy="Change the ONNX export it was made from, and package that again.",
        )
    check_signature(read, graph=False)
    return read
