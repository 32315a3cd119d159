"""Refuse to apply an adapter to a base model that `merge` made with that adapter."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.provenance import absolute
from propulsion_export.artifacts.artifact import digest_of
from propulsion_export.artifacts.file_names import MANIFEST_FILE
from propulsion_export.artifacts.manifest import read_manifest
from propulsion_export.base_model.gguf.header import read_header
from propulsion_export.base_model.gguf.merges import merges_in
from propulsion_export.base_model.gguf.source import find_gguf
from propulsion_export.base_model.hub import locate
from propulsion_export.environment.paths import user_path
from propulsion_export.errors import BaseModelError

_WEIGHTS = (".safetensors", ".safetensors.index.json")
_THREADS = 2  # that hash


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
        original = merged.base
        findings += [
            f"{source}: {finding}"
            for adapter in adapters
            if (finding := _contradiction(merged, adapter)) is not None
        ]
    if findings:
        raise BaseModelError(*findings, remedy=f"Give the base model itself with -m: {original}.")


def check_undamaged(source: str) -> None:
    """Refuse a merged checkpoint whose weights changed: whatever is made of it would hide that.

    Reads all of them, once in a process as long as they are not written to. Does nothing for a base
    model that `merge` did not write.

    Raises:
        BaseModelError: the digest of a weight file is not the one in the manifest.
        ArtifactError: the manifest is damaged or of another version.
    """
    manifest_file = None if _gguf(source) else _manifest_file(source)
    if manifest_file is None or (manifest := read_manifest(manifest_file)).kind != "merged":
        return
    recorded = {name: d for name, d in manifest.files.items() if name.endswith(_WEIGHTS)}
    located = {name: file for name in recorded if (file := locate(source, name)) is not None}
    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(located, pool.map(_digest, located.values()), strict=True))
    if changed := [located[name] for name in found if found[name] != recorded[name]]:
        raise BaseModelError(
            *(f"{file}: its content is not what {MANIFEST_FILE} recorded" for file in changed),
            remedy="Copy the whole directory again, or merge again.",
        )


def _digest(file: Path) -> str:
    status = file.stat()
    return _digest_while(file.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _digest_while(file: Path, _: int, __: int) -> str:
    """The digest of a file as long as its size and the time of the last write are these."""
    return digest_of(file)


@dataclass(frozen=True)
class _Merge:
    """An adapter in a merged checkpoint or GGUF file; `said` is where that says so."""

    adapter: str
    digest: str
    base: str
    said: str


def _contradiction(merged: _Merge, adapter: Adapter) -> str | None:
    """Why an adapter does not belong on a merged checkpoint; None if it may."""
    if merged.digest == adapter.digest:
        return (
            f"holds the adapter {merged.adapter} already by its {merged.said}, and the adapter "
            f"{adapter.name} is the same: its scales would be applied twice"
        )
    nameless = adapter.fingerprint is None and adapter.base is not None
    if nameless and absolute(str(adapter.base)) == merged.base:
        return (
            f"holds the adapter {merged.adapter}, expected the base model {merged.base}, which the "
            f"adapter {adapter.name} was trained on"
        )
    return None


def _merges(source: str) -> Iterator[_Merge]:
    """The last merge that made a checkpoint or GGUF file, then the one before it, and so on."""
    seen = set()
    while source not in seen:
        seen.add(source)
        if (gguf := _gguf(source)) is not None:
            # Such a file records all of them.
            for each in reversed(merges_in(read_header(gguf))):
                yield _Merge(each.adapter, each.digest, each.base, "metadata")
            return
        file = _manifest_file(source)
        if file is None or (manifest := read_manifest(file)).kind != "merged":
            return
        ((held, entry),) = manifest.adapters.items()
        yield _Merge(held, entry.digest, manifest.base.source, MANIFEST_FILE)
        source = manifest.base.source


def _gguf(source: str) -> Path | None:
    """The GGUF file that a base model is, if it is there."""
    path = user_path(source)
    return find_gguf(source) if path.exists() else None


def _manifest_file(source: str) -> Path | None:
    directory = user_path(source)
    if not directory.is_dir():
        return locate(source, MANIFEST_FILE)
    file = directory / MANIFEST_FILE
    return file if file.is_file() else None
