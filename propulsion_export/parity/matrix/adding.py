"""An adapter that is added later computes what it computed from the start, bit for bit.

It is added to a copy of the artifact, by the code that `adapter add` runs, and its new file, or its
new row of a bank, is fed to the graph. Changing adapters reads no graph and no weights: they are
left out of the copy, which is as large as the adapters and the tokenizer.
"""

import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.artifacts.bank import Bank
from propulsion_export.artifacts.changing import put_adapter, remove_adapter
from propulsion_export.artifacts.file_names import (
    ADAPTERS,
    BASE_FEEDS,
    ENCODER_DECODER_FILES,
    ENGINE_FILE,
    GRAPH_FILE,
    OWN_WEIGHTS_FILE,
    WEIGHTS_FILE,
)
from propulsion_export.artifacts.layout import packed_inputs, to_row
from propulsion_export.parity.matrix.probe import Probe, changed
from propulsion_export.parity.reports.report import Check
from propulsion_export.parity.subject import Subject

_NEEDED = (GRAPH_FILE, ENGINE_FILE, *ENCODER_DECODER_FILES)  # empty in the copy
_LEFT_OUT = (WEIGHTS_FILE, OWN_WEIGHTS_FILE)


def check_added(
    artifact: Artifact,
    adapters: Sequence[Adapter],
    states: Sequence[Subject],
    probe: Probe,
    before: Mapping[str, Tensors],
) -> Iterator[Check]:
    """Add every adapter again under another name and, removed before, under its own.

    Args:
        artifact: one whose adapters can change.
        adapters: those to add, as they were read; they may be drawn.
        states: the adapters, and the base model.
        probe: runs the artifact.
        before: what each state returned before, by name.
    """
    judged = [adapter for adapter in adapters if adapter.name in before]
    # A switchable graph is not fed its base model, which no adapter can change.
    fed = [state.name for state in states if state.feeds]
    with _copy_without_weights(artifact, judged) as copy:
        new = {adapter.name: _added_again(copy, adapter, fed, probe) for adapter in judged}
        read = Artifact.read(copy)
        after = {name: probe.run(read.feeds(name)) for name in fed}
    for adapter in judged:
        findings = [
            f"{what}: {', '.join(names)} changed"
            for what, found in (
                ("under another name", new[adapter.name]),
                ("removed and added", after[adapter.name]),
            )
            if (names := changed(before[adapter.name], found))
        ]
        if BASE_NAME in after and changed(before[BASE_NAME], after[BASE_NAME]):
            findings.append("the base model changed")
        detail = "; ".join(findings) or "bit for bit as from the start, and so are the others"
        yield Check("added", adapter.name, not findings, detail)


@contextmanager
def _copy_without_weights(artifact: Artifact, adapters: Sequence[Adapter]) -> Iterator[Path]:
    """A temporary artifact with some of the adapters, to change; its graphs are empty files."""
    entries = artifact.list_adapters()
    kept = {each.name: entries[each.name] for each in adapters if each.name in entries}
    with tempfile.TemporaryDirectory(prefix="propulsion-export-") as place:
        directory = Path(place)
        _copy_files(artifact, directory, {BASE_FEEDS, *(entry.file for entry in kept.values())})
        manifest = artifact.manifest
        if manifest.mode == "bank":
            bank = Bank.create(directory, _row(artifact, BASE_NAME))
            for name, entry in kept.items():
                bank.add(name, _row(artifact, name), entry)
        else:
            manifest = replace(manifest, adapters=kept)
        Artifact.write(directory, manifest)
        yield directory


def _copy_files(artifact: Artifact, directory: Path, wanted: Collection[str | None]) -> None:
    """Copy what adding an adapter may read; of the files of adapters, those that are wanted."""
    for name in artifact.manifest.files:
        if name in _LEFT_OUT or (name.startswith(f"{ADAPTERS}/") and name not in wanted):
            continue
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in _NEEDED:
            target.touch()
        else:
            shutil.copyfile(artifact.directory / name, target)


def _row(artifact: Artifact, name: str) -> Array:
    return to_row(packed_inputs(artifact, name), artifact.manifest.layout)


def _added_again(
    directory: Path, adapter: Adapter, taken: Collection[str], probe: Probe
) -> Tensors:
    """What an adapter returns under a new name; afterwards it is added under its own name too."""
    known = Artifact.read(directory).list_adapters()
    other = next(name for n in count() if (name := f"added-{n}") not in {*known, *taken})
    put_adapter(directory, replace(adapter, name=other), source=str(directory))
    if adapter.name in known:
        remove_adapter(directory, adapter.name)
    put_adapter(directory, adapter, source=str(directory))
    found = probe.run(Artifact.read(directory).feeds(other))
    remove_adapter(directory, other)
    return found
