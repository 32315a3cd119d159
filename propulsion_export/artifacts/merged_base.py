"""Refuse to apply an adapter to a base model that `merge` made with that adapter."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.provenance import absolute
from propulsion_export.artifacts.file_names import MANIFEST_FILE
from propulsion_export.artifacts.manifest import Manifest, read_manifest
from propulsion_export.base_model.hub import locate
from propulsion_export.environment.paths import user_path
from propulsion_export.errors import BaseModelError


def check_not_merged(source: str, adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that were folded into `source`, or were trained on what it was made from.

    An adapter without a fingerprint is only known by the name of its base model. Does nothing for
    a base model that `merge` did not write.

    Raises:
        BaseModelError: naming the adapter and the one that the base model holds.
        ArtifactError: the base model's manifest is damaged or of another version.
    """
    findings, original = [], source
    for merged in _merges(source):
        original = merged.base.source
        findings += [
            f"{source}: {finding}"
            for adapter in adapters
            if (finding := _contradiction(merged, adapter)) is not None
        ]
    if findings:
        raise BaseModelError(*findings, remedy=f"Give the base model itself with -m: {original}.")


def _contradiction(merged: Manifest, adapter: Adapter) -> str | None:
    """Why an adapter does not belong on a merged checkpoint; None if it may."""
    ((held, entry),) = merged.adapters.items()
    if entry.digest == adapter.digest:
        return (
            f"holds the adapter {held} already by its {MANIFEST_FILE}, and the adapter "
            f"{adapter.name} is the same: its scales would be applied twice"
        )
    nameless = adapter.fingerprint is None and adapter.base is not None
    if nameless and absolute(str(adapter.base)) == merged.base.source:
        return (
            f"holds the adapter {held}, expected the base model {merged.base.source}, which the "
            f"adapter {adapter.name} was trained on"
        )
    return None


def _merges(source: str) -> Iterator[Manifest]:
    """The manifest of a merged checkpoint, then that of the one which it was made from, if any."""
    seen = set()
    while source not in seen:
        seen.add(source)
        file = _manifest_file(source)
        if file is None or (manifest := read_manifest(file)).kind != "merged":
            return
        yield manifest
        source = manifest.base.source


def _manifest_file(source: str) -> Path | None:
    directory = user_path(source)
    if not directory.is_dir():
        return locate(source, MANIFEST_FILE)
    file = directory / MANIFEST_FILE
    return file if file.is_file() else None
