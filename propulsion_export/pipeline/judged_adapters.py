"""Which adapters of an artifact a verdict is about, and what the artifact says of them."""

import random
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.specification import read_adapters
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.errors import AdapterError, UsageError, unknown_adapters
from propulsion_export.parity.labels import check_labels
from propulsion_export.parity.reports.report import Check

# The most adapters of a bank that one verdict judges: PyTorch computes each in float64.
MOST_ADAPTERS = 16


def effective_seed(artifact: Artifact, seed: int | None, *, given_alone: bool) -> int:
    """The seed, by default 0.

    Raises:
        UsageError: one is given, but only given texts are compared, and no adapter is random.
    """
    if seed is not None and given_alone and not is_random(artifact):
        raise UsageError("--seed: does nothing with --inputs and --quick", remedy="Leave it out.")
    return seed or 0


def is_random(artifact: Artifact) -> bool:
    """Whether the seed chooses or draws the adapters that are judged."""
    count = len(artifact.list_adapters())
    return count > MOST_ADAPTERS or (not count and artifact.manifest.mode != "folded")


def judged_adapters(artifact: Artifact, given: Sequence[str | Path], seed: int) -> list[Adapter]:
    """The artifact's adapters, read from where they are now, each proven to be the recorded one.

    If a bank has many: those that are given and some chosen at random.
    """
    entries = artifact.list_adapters()
    by_name = {adapter.name: adapter for adapter in read_adapters(_named(artifact, given))}
    if unknown := by_name.keys() - entries.keys():
        raise unknown_adapters(artifact.directory, sorted(unknown), sorted(entries))
    adapters = []
    for name in _sample(list(entries), by_name, seed):
        entry = entries[name]
        if name not in by_name and not Path(entry.source).is_dir():
            raise AdapterError(
                f"adapter {name}: is no longer at {entry.source}",
                remedy=f"Give its directory: -a {name}=DIR.",
            )
        adapter = by_name.get(name) or Adapter.read(entry.source, name)
        if adapter.digest != entry.digest:
            raise AdapterError(
                f"adapter {name}: is not the one the artifact was made from ({adapter.digest[:19]}…"
                f", expected {entry.digest[:19]}…)",
                remedy=f"Export again, or give its directory: -a {name}=DIR.",
            )
        adapters.append(adapter)
    return adapters


def _named(artifact: Artifact, given: Sequence[str | Path]) -> Sequence[str | Path]:
    """The given adapters; a single one of a single name has that."""
    entries = artifact.list_adapters()
    if len(entries) == 1 and len(given) == 1 and "=" not in str(given[0]):
        return [f"{next(iter(entries))}={given[0]}"]
    return given


def _sample(names: Sequence[str], given: Collection[str], seed: int) -> list[str]:
    """All names; if there are more than one verdict judges, the given ones and a random choice."""
    others = [name for name in names if name not in given]
    room = max(0, MOST_ADAPTERS - len(given))
    drawn = {*given, *random.Random(seed).sample(others, min(room, len(others)))}
    return [name for name in names if name in drawn]


def checks_of_adapters(
    artifact: Artifact, adapters: Sequence[Adapter], base: BaseModel, seed: int
) -> Iterator[Check]:
    """Checks of the adapters: how many are judged if not all, and their classes."""
    entries = artifact.list_adapters()
    if len(adapters) < len(entries):
        yield Check(
            "sample",
            "all",
            True,
            f"{len(adapters)} of {len(entries)} adapters are judged, chosen with seed {seed}; "
            "-a NAME=DIR judges those that it names",
        )
    yield from check_labels(artifact, adapters, base)
