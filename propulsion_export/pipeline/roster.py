"""Which adapters an artifact has at a moment, and what to feed for the rows of a batch.

A roster never changes: who has one computes with the adapters of that moment, whatever is added,
replaced or removed meanwhile.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from propulsion_export.artifact import Artifact, Tensors
from propulsion_export.bank import Row, Snapshot, check_row
from propulsion_export.errors import ArtifactError
from propulsion_export.manifest import BANK_INPUT, BASE_FEEDS, BASE_NAME, IDS_INPUT, Manifest
from propulsion_export.scales import Array

# Puts an array where a runtime computes, so that it is not sent there with every request.
Place = Callable[[Array], Any]
_NAMED = 8  # adapters that a message names


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
    def names(self) -> tuple[str, ...]:
        """Of the adapters, sorted."""

    @property
    def default(self) -> str:
        """Who is meant when nobody is named."""

    def groups(self, adapters: Sequence[str], most: int) -> list[Group]:
        """The rows that go together, at most `most` of them; `adapters` has a name for each.

        Raises:
            ArtifactError: it has no adapter of a name, or one that cannot be read.
        """


@dataclass(frozen=True)
class PackedRoster:
    """One adapter for all rows of a batch: of a folded or switchable artifact."""

    manifest: Manifest
    feeds: Mapping[str, Tensors]

    @classmethod
    def read(cls, artifact: Artifact) -> Self:
        """All that is there now: later the files may be gone."""
        folded = artifact.manifest.mode == "folded"
        names = [*artifact.manifest.adapters, *(() if folded else (BASE_NAME,))]
        return cls(artifact.manifest, {name: artifact.feeds(name) for name in names})

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.manifest.adapters))

    @property
    def default(self) -> str:
        return self.names[0] if len(self.names) == 1 else BASE_NAME

    def groups(self, adapters: Sequence[str], most: int) -> list[Group]:
        groups = []
        for name in dict.fromkeys(adapters):
            choice = self._choice(name)
            rows = [row for row, other in enumerate(adapters) if other == name]
            groups += [
                Group(part, self.feeds[name], [choice] * len(part)) for part in _parts(rows, most)
            ]
        return groups

    def _choice(self, name: str) -> Choice:
        if name not in self.feeds:
            raise _unknown(name, sorted({BASE_NAME, *self.names} & self.feeds.keys()))
        if name == BASE_NAME:
            return Choice(name, self.manifest.files[BASE_FEEDS], self.manifest.base.labels)
        entry = self.manifest.adapters[name]
        return Choice(name, entry.digest, entry.labels)


@dataclass(frozen=True)
class BankRoster:
    """An adapter for each row: of a bank.

    Attributes:
        snapshot: of the bank.
        placed: its rows, where the runtime computes.
        base_labels: of the base model.
        checked: rows whose bytes are known to be the recorded ones; grows, and is shared with the
            rosters that follow.
    """

    snapshot: Snapshot
    placed: Any
    base_labels: tuple[str, ...] | None
    checked: set[tuple[str, int]]

    @classmethod
    def read(cls, artifact: Artifact, place: Place, before: Self | None = None) -> Self:
        """The bank of now, `before` the roster that it follows."""
        snapshot = artifact.bank.snapshot()
        if before is not None and before.snapshot.version == snapshot.version:
            return before
        checked = set() if before is None else before.checked
        return cls(snapshot, place(snapshot.values), artifact.manifest.base.labels, checked)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.snapshot.rows)

    @property
    def default(self) -> str:
        return BASE_NAME

    def groups(self, adapters: Sequence[str], most: int) -> list[Group]:
        chosen = {name: self._row(name) for name in dict.fromkeys(adapters)}
        groups = []
        for part in _parts(range(len(adapters)), most):
            names = [adapters[row] for row in part]
            ids = np.array([chosen[name].number for name in names], np.int64)
            feeds = {BANK_INPUT: self.placed, IDS_INPUT: ids}
            groups.append(Group(part, feeds, [self._choice(name, chosen[name]) for name in names]))
        return groups

    def _row(self, name: str) -> Row:
        row = self.snapshot.base if name == BASE_NAME else self.snapshot.rows.get(name)
        if row is None:
            raise _unknown(name, [BASE_NAME, *self.names])
        if (row.file, row.number) not in self.checked:
            check_row(row, self.snapshot.values)
            self.checked.add((row.file, row.number))
        return row

    def _choice(self, name: str, row: Row) -> Choice:
        if name == BASE_NAME:
            return Choice(name, row.checksum, self.base_labels)
        return Choice(name, row.entry.digest, row.entry.labels)


def _unknown(name: str, known: Sequence[str]) -> ArtifactError:
    shown = ", ".join(known[:_NAMED])
    more = f" and {len(known) - _NAMED} more" if len(known) > _NAMED else ""
    return ArtifactError(
        f"the adapter {name!r} is unknown, expected one of {shown}{more}",
        remedy="`propulsion-export adapter add` adds one.",
    )


def _parts(rows: Sequence[int], most: int) -> list[Sequence[int]]:
    return [rows[start : start + most] for start in range(0, len(rows), most)]
