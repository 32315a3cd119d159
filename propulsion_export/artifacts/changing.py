"""Add, remove and compact the adapters of a switchable artifact or of a bank."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors.numpy import save

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.adapters.own_template import own_template
from propulsion_export.adapters.own_tokenizer import check_tokenizer
from propulsion_export.adapters.provenance import check_base
from propulsion_export.adapters.sentence_source import check_sentence_pipeline
from propulsion_export.adapters.settings import check_settings, problem_type_of
from propulsion_export.adapters.specification import check_identity, read_adapters
from propulsion_export.artifacts.artifact import Artifact, Tensors, digest_of
from propulsion_export.artifacts.bound_directory import BoundDirectory
from propulsion_export.artifacts.consistency import check_consistent
from propulsion_export.artifacts.file_names import (
    ADAPTERS,
    ADAPTERS_FILE,
    BASE_FEEDS,
    GENAI_CONFIG_FILE,
    MANIFEST_FILE,
    ONNX_ADAPTER_SUFFIX,
)
from propulsion_export.artifacts.layout import (
    check_range,
    labels_in,
    pack,
    packed_inputs,
    to_row,
)
from propulsion_export.artifacts.locking import exclusive_lock
from propulsion_export.artifacts.manifest import AdapterEntry, Manifest
from propulsion_export.artifacts.merged_base import check_not_merged
from propulsion_export.artifacts.replacing import sweep_inside
from propulsion_export.artifacts.staging import replace_file
from propulsion_export.artifacts.tensor_names import BANK_INPUT, MODULES_INPUT
from propulsion_export.base_model.chat.templates import read_template
from propulsion_export.base_model.config import read_settings
from propulsion_export.base_model.settings import read_tokenizer_settings
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.environment.hub_files import cached_repository
from propulsion_export.errors import (
    AdapterError,
    ArtifactError,
    UsageError,
    unknown_adapters,
)

Place = Path | str | BoundDirectory  # a directory, or one that was found before


def add_adapter(
    artifact: Place, adapter: str | Path, *, allow_range: bool = False, force: bool = False
) -> Artifact:
    """Add an adapter, `NAME=DIR` or a directory, to a switchable artifact or a bank.

    The artifact is complete at every moment, and processes change it one at a time. Adding to a
    bank takes the same time however many adapters it has. Links are followed once: the directory
    that `artifact` leads to at the start is the one that changes, or none.

    Raises:
        ArtifactError: the artifact's adapters cannot change.
        AdapterError: the adapter has a tensor that the graph has no input for.
        BaseModelError: the adapter was trained on another base model.
        UsageError: there is an adapter of that name and `force` is off; or the path leads to
            another directory now.
    """
    (new,) = read_adapters([adapter])
    check_identity(new)
    source = new.source
    with _changeable(artifact) as read:
        check_sentence_pipeline(str(read.directory), read.manifest.task, source)
        check_tokenizer(new.name, Path(source), read.directory)
        check_task(read.manifest, new)
        feeds = _fitted(read, new, allow_range=allow_range)
        template = _template(read, Path(source))
        entry = replace(_entry(read.manifest, new, source), chat_template=template)
        return _put(read, new.name, feeds, entry, force=force)


def put_adapter(artifact: Place, new: Adapter, source: str) -> Artifact:
    """Add an adapter that has been read already, whatever its task and the range of its scales.

    What else lies in its directory, a tokenizer for example, is not looked at.

    Args:
        artifact: the directory of a switchable artifact or a bank.
        new: the adapter; its name is free.
        source: where it was read, for the record.

    Raises:
        ArtifactError, AdapterError, BaseModelError, UsageError: as for `add_adapter`.
    """
    with _changeable(artifact) as read:
        feeds = _fitted(read, new, allow_range=True)
        return _put(read, new.name, feeds, _entry(read.manifest, new, source), force=False)


def is_changeable(manifest: Manifest) -> bool:
    """Whether adapters can be added to such an artifact and removed from it."""
    if manifest.mode == "folded" or _is_package(manifest):
        return False
    return manifest.kind != "engine" or _takes_adapters(manifest)


def _put(
    read: Artifact, name: str, feeds: Tensors, entry: AdapterEntry, *, force: bool
) -> Artifact:
    if read.manifest.mode == "bank":
        row = to_row(feeds, read.manifest.layout)
        read.open_bank().add(name, row, entry, replace=force)
        return read
    return _add(read, name, feeds, entry, force=force)


def _entry(manifest: Manifest, new: Adapter, source: str) -> AdapterEntry:
    base = manifest.base
    room = _label_room(manifest) if base.own_head else None
    labels = labels_in(new, manifest.layout, base.labels, room)
    classifies = TASKS[manifest.task].prediction == "class"
    kind = problem_type_of(new, base.problem_type) if classifies else None
    return AdapterEntry(new.digest, source, new.size, None, labels, kind)


def _template(artifact: Artifact, directory: Path) -> str | None:
    """An adapter's own chat template; None where it is the artifact's."""
    own = own_template(directory)
    return None if own == read_template(artifact.directory) else own


def _label_room(manifest: Manifest) -> int | None:
    """How many labels the head has room for; None without such a head."""
    name = TASKS[manifest.task].labelled_output
    widths = (spec.shape[-1] for spec in manifest.outputs if spec.name == name)
    width = next(widths, None)
    return width if isinstance(width, int) else None


def _fitted(artifact: Artifact, new: Adapter, *, allow_range: bool) -> Tensors:
    """The packed inputs of an adapter, [D] each, after checking that it fits the artifact."""
    manifest = artifact.manifest
    check_head(manifest, new)
    if Path(manifest.base.source).is_dir():  # it may be gone, and a hub is not asked here
        check_not_merged(manifest.base.source, [new])
    check_settings(
        new,
        read_settings(artifact.directory),
        read_tokenizer_settings(artifact.directory),
        str(artifact.directory),
    )
    check_base(
        manifest.base.fingerprint,
        manifest.base.source,
        [new],
        remedy="Add it to an artifact of the model that it was trained on.",
    )
    if not allow_range:
        check_range(new, manifest.dtype)
    return pack(new, manifest.layout, packed_inputs(artifact, BASE_NAME))


def check_task(manifest: Manifest, new: Adapter) -> None:
    """Refuse an adapter of another task; to an artifact that embeds, any task's may be added.

    Raises:
        AdapterError: it is for another task.
    """
    embeds = TASKS[manifest.task].prediction == "embedding"
    if new.task not in (None, manifest.task) and not embeds:
        raise AdapterError(
            f"adapter {new.name}: is for {new.task}, the artifact for {manifest.task}",
            remedy="Take an artifact for its own task.",
        )


def check_head(manifest: Manifest, new: Adapter) -> None:
    """Refuse an adapter without a head if it would use another adapter's.

    Raises:
        AdapterError: naming what it lacks.
    """
    heads = [slot.path for slot in manifest.layout.get(MODULES_INPUT, ())]
    lacking = [name for name in heads if name not in new.modules]
    if lacking and not manifest.base.own_head:
        raise AdapterError(
            *(f"adapter {new.name}: has no {name}, nor has the base model" for name in lacking),
            remedy="Train the head with the adapter.",
        )


def _add(
    read: Artifact, name: str, feeds: Tensors, entry: AdapterEntry, *, force: bool
) -> Artifact:
    replaced = read.manifest.adapters.get(name)
    if replaced is not None and not force:
        raise UsageError(
            f"{read.shown}: has an adapter {name!r} already",
            remedy="Choose another name, or replace it with --force.",
        )
    file = f"{ADAPTERS}/{name}.safetensors"
    if replaced is not None:
        # The old file is in use until the manifest is replaced, so the new one has another name.
        file = f"{ADAPTERS}/{name}.{entry.digest.removeprefix('sha256:')[:12]}.safetensors"
    replace_file(read.directory / file, save(dict(feeds)))
    changed = replace(
        read.manifest,
        adapters=read.manifest.adapters | {name: replace(entry, file=file)},
        files=read.manifest.files | {file: digest_of(read.directory / file)},
    )
    try:
        return _commit(read, changed)
    except UsageError:  # the manifest could not be written, such as on a full disk
        if file not in read.manifest.files:
            (read.directory / file).unlink(missing_ok=True)
        raise


def remove_adapter(artifact: Place, name: str) -> Artifact:
    """Remove an adapter from a switchable artifact or a bank.

    Raises:
        ArtifactError: the artifact's adapters cannot change.
        UnknownAdapterError: the artifact has no adapter of that name.
        UsageError: it is the base model, or the only adapter of a switchable artifact; or the path
            leads to another directory now.
    """
    if not isinstance(name, str):
        raise UsageError(f"adapter: is {type(name).__name__}, expected a name")
    place = _place(artifact)
    if name == BASE_NAME:
        raise UsageError(f"{place.given}: {name!r} is the base model, which cannot be removed")
    with _changeable(place) as read:
        if read.manifest.mode == "bank":
            read.open_bank().remove(name)
            return read
        return _remove(read, name)


def compact_bank(artifact: Place) -> int:
    """Free the disk space of a bank's removed and replaced adapters; returns the bytes freed.

    Raises:
        ArtifactError: the artifact is not a bank.
    """
    with _changeable(artifact) as read:
        if read.manifest.mode != "bank":
            raise ArtifactError(f"{read.shown}: is {read.manifest.mode}, expected a bank")
        bank = read.open_bank()
        before = bank.find_file().stat().st_size
        bank.compact()
        return before - bank.find_file().stat().st_size


def _remove(read: Artifact, name: str) -> Artifact:
    entries = dict(read.manifest.adapters)
    if name not in entries:
        raise unknown_adapters(read.shown, [name], sorted(entries))
    if len(entries) == 1:
        raise UsageError(f"{read.shown}: {name!r} is its only adapter, which cannot be removed")
    del entries[name]
    return _commit(read, replace(read.manifest, adapters=entries))


def _commit(before: Artifact, manifest: Manifest) -> Artifact:
    """Replace the manifest atomically, then remove adapter files that it no longer names."""
    named = {entry.file for entry in manifest.adapters.values()} | {BASE_FEEDS}
    dropped = {
        path for path in manifest.files if path.startswith(f"{ADAPTERS}/") and path not in named
    }
    files = {path: digest for path, digest in manifest.files.items() if path not in dropped}
    after = before.with_manifest(replace(manifest, files=files))
    for path in dropped:
        (before.directory / path).unlink(missing_ok=True)
    return after


def _place(artifact: Place) -> BoundDirectory:
    return artifact if isinstance(artifact, BoundDirectory) else BoundDirectory(artifact)


@contextmanager
def _changeable(artifact: Place) -> Iterator[Artifact]:
    """The artifact, locked until its change is done."""
    place = _place(artifact)
    with exclusive_lock(place.path):
        place.check_followed()
        yield _read_changeable(place)


def _read_changeable(place: BoundDirectory) -> Artifact:
    """Read an artifact that is locked to change it, and clean up after killed changes."""
    artifact = place.given
    if cached_repository(place.path) is not None:
        raise ArtifactError(
            f"{artifact}: lies in a hub's cache, whose files other revisions share, expected a "
            "directory of its own to change",
            remedy="Copy it, with the files behind its links, and change the copy.",
        )
    read = Artifact.read(place.path, shown=place.given)
    if read.manifest.mode == "folded":
        raise ArtifactError(
            f"{artifact}: is folded, expected a switchable artifact or a bank",
            remedy="Export with --mode switchable or bank to change adapters later.",
        )
    if read.manifest.kind == "engine" and not _takes_adapters(read.manifest):
        raise ArtifactError(
            f"{artifact}: has its adapters built into the engine, expected them as inputs",
            remedy="Change the ONNX export it was made from, and build that again.",
        )
    if _is_package(read.manifest):
        raise ArtifactError(
            f"{artifact}: is a package for ONNX Runtime, which keeps its adapters in files of "
            "their own",
            remedy="Change the ONNX export it was made from, and package that again.",
        )
    check_consistent(read.directory, read.manifest)
    sweep_inside(read.directory, re.escape(MANIFEST_FILE))
    sweep_inside(read.directory / ADAPTERS, ".+")
    return read


def _is_package(manifest: Manifest) -> bool:
    """Whether it holds copies of its adapters in other formats, which would not follow."""
    copies = any(name.endswith(ONNX_ADAPTER_SUFFIX) for name in manifest.files)
    # The builder's own graphs have the configuration from the start.
    packaged = GENAI_CONFIG_FILE in manifest.files and not manifest.pads_right
    return copies or packaged or ADAPTERS_FILE in manifest.files


def _takes_adapters(manifest: Manifest) -> bool:
    names = {spec.name for spec in manifest.inputs}
    return bool(names & {BANK_INPUT, *manifest.layout})
