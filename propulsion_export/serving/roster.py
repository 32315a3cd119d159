"""The adapters of an artifact at one moment, and the inputs to feed for the rows of a batch.

A roster never changes: a request computes with the adapters of its roster, whatever is added,
replaced or removed meanwhile.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.artifacts.bank import BankRow, Snapshot, check_row
from propulsion_export.artifacts.file_names import (
    ADAPTERS,
    BASE_FEEDS,
    ENGINE_FILE,
    GRAPH_FILE,
    MANIFEST_FILE,
)
from propulsion_export.artifacts.locking import shared_lock
from propulsion_export.artifacts.manifest import ADD_ONE, AdapterEntry, Manifest, read_manifest
from propulsion_export.artifacts.tensor_names import BANK_INPUT, IDS_INPUT
from propulsion_export.artifacts.watched_file import Moment
from propulsion_export.base_model.settings import ProblemType
from propulsion_export.errors import ArtifactError, unknown_adapters

# Puts an array into a runtime's memory once, so that it is not sent there with every request.
Place = Callable[[Array], Any]


@dataclass(frozen=True)
class Choice:
    """The adapter of one row.

    Attributes:
        adapter: its name, `base` for none.
        version: digest of the adapter; replacing an adapter changes it.
        labels: its class names; None if there are none.
        problem_type: what its logits mean in text classification; None where nobody says.
        chat_template: its own chat template; None for the artifact's.
    """

    adapter: str
    version: str
    labels: tuple[str, ...] | None
    problem_type: ProblemType | None = None
    chat_template: str | None = None


@dataclass(frozen=True)
class Group:
    """Rows that are computed together: their numbers, the adapters' inputs, each row's adapter."""

    rows: Sequence[int]
    feeds: Mapping[str, Any]
    choices: Sequence[Choice]


class Roster(Protocol):
    """The adapters of an artifact at one moment."""

    @property
    def artifact(self) -> Artifact:
        """The artifact as it was read."""

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, sorted."""

    @property
    def default(self) -> str:
        """The adapter used when a request names none."""

    def groups(self, adapters: Sequence[str], most: int) -> list[Group]:
        """Divide rows into groups of at most `most`, which are computed together.

        Args:
            adapters: the name of each row's adapter.
            most: most rows of a group.

        Raises:
            UnknownAdapterError: there is no adapter of a name.
            ArtifactError: an adapter cannot be read.
        """


@dataclass(frozen=True)
class PackedRoster:
    """The adapters of a folded or switchable artifact: one adapter for all rows of a batch.

    Attributes:
        artifact: the artifact as it was read.
        feeds: each adapter's inputs by its name; loaded now, because its file may be gone later.
    """

    artifact: Artifact
    feeds: Mapping[str, Tensors]

    @classmethod
    def read(cls, artifact: Artifact, before: Self | None = None) -> Self:
        """The adapters as they are on disk now.

        Args:
            artifact: the artifact as it was read last; it is read again only if it has changed.
            before: the roster that this one replaces; returned if nothing has changed.

        Raises:
            ArtifactError: it is damaged, or holds another model than `before`.
        """
        # First without the lock, which others hold for as long as it takes to add an adapter.
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
            return Choice(name, version, manifest.base.labels, manifest.base.problem_type)
        entry = manifest.adapters[name]
        return _choice_of(name, entry)


@dataclass(frozen=True)
class BankRoster:
    """The adapters of a bank: each row of a batch has its own.

    Attributes:
        artifact: the artifact as it was read.
        snapshot: the bank at this moment.
        placed: the bank's rows in the runtime's memory.
        checked: the rows that were found to be what the registry recorded, by name, with the
            moment at which the bank file had last been written to by then; grows with requests.
    """

    artifact: Artifact
    snapshot: Snapshot
    placed: Any
    checked: dict[str, Moment]

    @classmethod
    def read(cls, artifact: Artifact, place: Place, before: Self | None = None) -> Self:
        """The bank as it is on disk now; see `PackedRoster.read`."""
        now = _read_again(artifact, before)
        bank = now.open_bank()
        if before is not None and bank.is_at(before.snapshot):
            return before
        snapshot = bank.snapshot(None if before is None else before.snapshot)
        return cls(now, snapshot, place(snapshot.values), {})

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.snapshot.rows))

    @property
    def default(self) -> str:
        return BASE_NAME

    def groups(self, adapters: Sequence[str], most: int) -> list[Group]:
        self._check_names(adapters)
        chosen = {name: self._row(name) for name in dict.fromkeys(adapters)}
        self._check_rows(chosen)
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
        return self.snapshot.base if name == BASE_NAME else self.snapshot.rows[name]

    def _check_rows(self, chosen: Mapping[str, BankRow]) -> None:
        """Compare rows with their checksums, once for each time that the file is written to."""
        moment = self.snapshot.mapped.moment()
        for name, row in chosen.items():
            if moment is None or self.checked.get(name) != moment:
                check_row(row, self.snapshot.values)
                if moment is not None:
                    self.checked[name] = moment

    def _choice(self, name: str, row: BankRow) -> Choice:
        if name == BASE_NAME:
            base = self.artifact.manifest.base
            return Choice(name, row.checksum, base.labels, base.problem_type)
        return _choice_of(name, row.entry)


def _choice_of(name: str, entry: AdapterEntry) -> Choice:
    return Choice(name, entry.digest, entry.labels, entry.problem_type, entry.chat_template)


def check_same_model(loaded: Artifact, directory: Path, manifest: Manifest) -> None:
    """Refuse an artifact of another model, whose adapters the loaded graph cannot compute with.

    Args:
        loaded: the artifact whose graph was loaded.
        directory: the other artifact's, or the same one as it is now.
        manifest: the other artifact's.

    Raises:
        ArtifactError: more than the adapters is different.
    """
    if _model_of(manifest) == _model_of(loaded.manifest):
        return
    found = "has become another model since it was loaded"
    if directory != loaded.directory:
        found = f"is another model than {loaded.directory}, which was loaded"
    raise ArtifactError(
        f"{directory}: {found}, expected other adapters at most", remedy="Load it again."
    )


def _read_again(artifact: Artifact, before: Roster | None) -> Artifact:
    """The artifact as it is on disk now, read only if it has changed since `artifact`.

    Raises:
        ArtifactError: it is damaged, or holds another model now.
    """
    manifest = _manifest_of(artifact)
    loaded = artifact if before is None else before.artifact
    check_same_model(loaded, artifact.directory, manifest)
    return artifact if manifest == artifact.manifest else Artifact.read(artifact.directory)


def _manifest_of(artifact: Artifact) -> Manifest:
    """The manifest as it is on disk now."""
    return read_manifest(artifact.directory / MANIFEST_FILE)


def _model_of(manifest: Manifest) -> Manifest:
    """The part of a manifest that does not change with the adapters."""
    others = {
        file: digest
        for file, digest in manifest.files.items()
        if file == BASE_FEEDS or not file.startswith(f"{ADAPTERS}/")
    }
    return replace(manifest, adapters={}, files=others)


def _parts(rows: Sequence[int], most: int) -> list[Sequence[int]]:
    return [rows[start : start + most] for start in range(0, len(rows), most)]
