"""What a GGUF file says of the adapters that were merged into it, in keys of its own."""

from collections.abc import Mapping
from dataclasses import dataclass

from propulsion_export.base_model.gguf.header import Header
from propulsion_export.base_model.gguf.metadata import Text

_KEYS = {
    "adapter": "propulsion.adapters",
    "digest": "propulsion.adapter_digests",
    "base": "propulsion.bases",
    "fingerprint": "propulsion.base_fingerprints",
    "tool": "propulsion.versions",
}
_DESCRIPTION = "general.description"


@dataclass(frozen=True)
class GgufMerge:
    """One merge.

    Attributes:
        adapter: the adapter's name.
        digest: the adapter's digest.
        base: the path of the file that it was merged into.
        fingerprint: of that file's model, as JSON; empty if the adapter has none to compare with.
        tool: the version of this package.
    """

    adapter: str
    digest: str
    base: str
    fingerprint: str = ""
    tool: str = ""


def merges_in(header: Header) -> list[GgufMerge]:
    """The merges that made a file, the first one first; none for any other file."""
    columns = [header.metadata.get(key) for key in _KEYS.values()]
    lists = [column for column in columns if isinstance(column, list)]
    if len(lists) < len(columns):
        return []
    return [GgufMerge(*map(str, row)) for row in zip(*lists, strict=False)]


def keys_with(header: Header, merge: GgufMerge) -> Mapping[str, Text]:
    """The metadata that records one more merge in a file."""
    all_of_them = [*merges_in(header), merge]
    found: dict[str, Text] = {
        key: [getattr(each, name) for each in all_of_them] for name, key in _KEYS.items()
    }
    before = str(header.metadata.get(_DESCRIPTION, "")).strip()
    said = f"The Propulsion adapter {merge.adapter} ({merge.digest}) is merged in."
    found[_DESCRIPTION] = f"{before} {said}".strip()
    return found
