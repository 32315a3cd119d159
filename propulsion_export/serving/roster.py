"""Which adapters an artifact has at a moment, and what to feed for the rows of a batch.

A roster never changes: who has one computes with the adapters of that moment, whatever is added,
replaced or removed meanwhile.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np

from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.artifacts.bank import BankRow, Snapshot, check_row
from propulsion_export.artifacts.file_names import ADAPTERS, BASE_FEEDS, ENGINE_FILE, GRAPH_FILE, MANIFEST_FILE
from propulsion_export.artifacts.locking import shared_lock
from propulsion_export.artifacts.manifest import ADD_ONE, Manifest, read_manifest
from propulsion_export.artifacts.tensor_names import BANK_INPUT, IDS_INPUT
from propulsion_export.errors import ArtifactError, unknown_adapters

# Puts an array where a runtime computes, so that it is not sent there with every request.
Place = Callable[[Array], Any]


@dataclass(frozen=True)
class Choice:
    """The adapter of one row.

    Attributes:
        adapter: its name, `base` for none.
        version: digest of the adapter, another for each content that one name ever had.
        labels: its class names; None when nobody named them.
    """

    adapter: str
    version: str
    labels: tuple[str, ...] | None


@dataclass(frozen=True)
class Group:
    """Rows that are computed together: their numbers, what to feed besides, each one's adapter."""

    rows: Sequence[int]
    feeds: Mapping[str, Any]
    choices: Sequence[Choice]


class Roster(Protocol):
    """The adapters of an artifact at one moment."""

    @property
    def artifact(self) -> Artifact:
        """As it was read."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters, sorted."""

    @property
    def default(self) -> str:
        """Who is meant when nobody is named."""

    def groups(self, adapters: Sequence[str], most: int) -> list[Group]:
        """The rows that go together, at most `most` of them; `adapters` has a name for each.

        Raises:
            UnknownAdapterError: it has no adapter of a name.
            ArtifactError: it has one that cannot be read.
        """


@dataclass(frozen=True)
class PackedRoster:
    """One adapter for all rows of a batch: of a folded or switchable artifact.

    Attributes:
        artifact: as it was read.
        feeds: of every adapter by name, because its file may be gone later.
    """

    artifact: Artifact
    feeds: Mapping[str, Tensors]

    @classmethod
    def read(cls, artifact: Artifact, before: Self | None = None) -> Self:
        """The adapters of now.

        Args:
            artifact: as it was read last; not again, if it is the same still.
            before: the roster that this one follows.

        Raises:
            ArtifactError: it is damaged, or another model than that of `before`.
        """
        # First without the lock, which others have for as long as it takes to add an adapter.
        if before is not None and _manifest_of(artifact) == before.artifact.manifest:
            return before
        with shared_lock(artifact.directory):
            now = _read_again(artifact, before)
            folded = now.manifest.mode == "folded" and bool(now.manifest.adapters)
            names = [*now.manifest.adapters, *(() if folded else (BASE_NAME,))]
            return cls(now, {name: now.feeds(name) for name in names})

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.artifact.manifest.adapters))

    @property
    def default(self) -> str:
        return self.names[0] if len(self.names) == 1 else BASE_NAME

    def groups(self, adapters: Sequence[str], most: int) -> list[Group]:
        self.artifact.check_names(adapters)
        groups = []
        for name in dict.fromkeys(adapters):
            choice = self._choice(name)
            rows = [row for row, other in enumerate(adapters) if other == name]
            groups += [
                Group(part, self.feeds[name], [choice] * len(part)) for part in _parts(rows, most)
            ]
        return groups

    def _choice(self, name: str) -> Choice:
        manifest = self.artifact.manifest
        if name == BASE_NAME:
            places = (BASE_FEEDS, GRAPH_FILE, ENGINE_FILE, *manifest.graphs)
            version = next(manifest.files[file] for file in places if file in manifest.files)
            return Choice(name, version, manifest.base.labels)
        entry = manifest.adapters[name]
        return Choice(name, entry.digest, entry.labels)


@dataclass(frozen=True)
class BankRoster:
    """An adapter for each row: of a bank.

    Attributes:
        artifact: as it was read.
        snapshot: of the bank.
        placed: its rows, where the runtime computes.
        checked: rows by name, whose bytes are known to be the recorded ones; grows.
    """

    artifact: Artifact
    snapshot: Snapshot
    placed: Any
    checked: dict[str, BankRow]

    @classmethod
    def read(cls, artifact: Artifact, place: Place, before: Self | None = None) -> Self:
        """The bank of now; see `PackedRoster.read`."""
        now = _read_again(artifact, before)
        bank = now.open_bank()
        if before is not None and bank.is_at(before.snapshot):
            return before
        snapshot = bank.snapshot(None if before is None else before.snapshot)
        # What was removed is forgotten, so that a bank in change does not fill the memory. Copied
        # before it is walked through, because requests go on adding to it.
        checked = {} if before is None else before.checked.copy()
        still = {name: row for name, row in checked.items() if snapshot.rows.get(name) is row}
        return cls(now, snapshot, place(snapshot.values), still)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.snapshot.rows))

    @property
    def default(self) -> str:
        return BASE_NAME

    def groups(self, adapters: Sequence[str], most: int) -> list[Group]:
        self._check_names(adapters)
        chosen = {name: self._row(name) for name in dict.fromkeys(adapters)}
        choices = {name: self._choice(name, row) for name, row in chosen.items()}
        groups = []
        for part in _parts(range(len(adapters)), most):
            names = [adapters[row] for row in part]
            ids = np.array([chosen[name].number for name in names], np.int64)
            feeds = {BANK_INPUT: self.placed, IDS_INPUT: ids}
            groups.append(Group(part, feeds, [choices[name] for name in names]))
        return groups

    def _check_names(self, names: Sequence[str]) -> None:
        known = self.snapshot.rows
        unknown = [n for n in dict.fromkeys(names) if n not in known and n != BASE_NAME]
        if unknown:
            directory = self.artifact.directory
            raise unknown_adapters(directory, unknown, [BASE_NAME, *self.names], remedy=ADD_ONE)

    def _row(self, name: str) -> BankRow:
        row = self.snapshot.base if name == BASE_NAME else self.snapshot.rows[name]
        if name not in self.checked:
            check_row(row, self.snapshot.values)
            self.checked[name] = row
        return row

    def _choice(self, name: str, row: BankRow) -> Choice:
        if name == BASE_NAME:
            return Choice(name, row.checksum, self.artifact.manifest.base.labels)
        return Choice(name, row.entry.digest, row.entry.labels)


def _read_again(artifact: Artifact, before: Roster | None) -> Artifact:
    """The artifact as it is now, which is read only if it has changed since `artifact`.

    Raises:
        ArtifactError: it is damaged, or another model by now.
    """
    manifest = _manifest_of(artifact)
    loaded = artifact if before is None else before.artifact
    if _model_of(manifest) != _model_of(loaded.manifest):
        raise ArtifactError(
            f"{artifact.directory}: has become another model since it was loaded, expected other "
            "adapters at most",
            remedy="Load it again.",
        )
    return artifact if manifest == artifact.manifest else Artifact.read(artifact.directory)


def _manifest_of(artifact: Artifact) -> Manifest:
    """That of now."""
    return read_manifest(artifact.directory / MANIFEST_FILE)


def _model_of(manifest: Manifest) -> Manifest:
    """What stays of a manifest when adapters change."""
    others = {
        file: digest
        for file, digest in manifest.files.items()
        if file == BASE_FEEDS or not file.startswith(f"{ADAPTERS}/")
    }
    return replace(manifest, adapters={}, files=others)


def _parts(rows: Sequence[int], most: int) -> list[Sequence[int]]:
    return [rows[start : start + most] for start in range(0, len(rows), most)]
