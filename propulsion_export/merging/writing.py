"""Write merged checkpoints: every byte of the base model is read once, every other written once.

One thread reads and multiplies pieces (`reading`), this one writes them and adds them to the file's
digest while they are in the cache. Memory does not grow with the checkpoint.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from propulsion_export.artifacts.artifact import digest_of
from propulsion_export.environment.progress import Progress, silent
from propulsion_export.errors import AdapterError
from propulsion_export.merging.files import WeightFile, index_of, total_size
from propulsion_export.merging.meter import Meter
from propulsion_export.merging.pieces import Pieces
from propulsion_export.merging.plan import Plan
from propulsion_export.merging.reading import Reader
from propulsion_export.merging.sharing import clone, link

_THREADS = 2  # that hash files which are only linked


@dataclass(frozen=True)
class Output:
    """One checkpoint to write: `files`, of what `plan` says, into an existing `directory`."""

    directory: Path
    plan: Plan
    files: Sequence[WeightFile]


def write_outputs(
    outputs: Sequence[Output], progress: Progress = silent, *, share: bool = False
) -> list[Mapping[str, str]]:
    """Write the weight files of merged checkpoints, and their indices.

    Outputs whose files hold tensors of the same names are written together, from one reading.

    Args:
        outputs: the checkpoints.
        progress: called with the share done and what is being done.
        share: make the base model's files that stay as they are hard links.

    Returns:
        For each output, the digests of the files written, `sha256:…` by name.

    Raises:
        AdapterError: a product is not finite in its dtype; an adapter changes no weight.
        BaseModelError: a file of the base model cannot be read, or was shortened.
        UsageError: a file cannot be linked.
        OSError: a file cannot be written.
    """
    digests = _reuse(outputs, share=share)
    work = [
        _Work(output, [file for file in output.files if file.name not in found], found)
        for output, found in zip(outputs, digests, strict=True)
    ]
    headers = sum(len(file.header) for each in work for file in each.files)
    meter = Meter(headers + sum(total_size(each.files) for each in work), progress)
    for together in _groups(work):
        _write_together(together, meter)
    _refuse_unchanged(work)
    for output, found in zip(outputs, digests, strict=True):
        found |= _write_index(output)
    return list(digests)


@dataclass
class _Work:
    """What is to be written for an output, the digests so far, and whether a product changed."""

    output: Output
    files: list[WeightFile]
    digests: dict[str, str]
    changed: bool = False


def _reuse(outputs: Sequence[Output], *, share: bool) -> list[dict[str, str]]:
    """Link or clone the files that stay as they are; returns their digests for each output."""
    reused = [
        {
            file.name: file.base
            for file in output.files
            if file.base is not None and file.unchanged and _placed(file, output, share=share)
        }
        for output in outputs
    ]
    bases = list(dict.fromkeys(base for each in reused for base in each.values()))
    with ThreadPoolExecutor(_THREADS) as pool:
        known = dict(zip(bases, pool.map(digest_of, bases), strict=True))
    return [{name: known[base] for name, base in each.items()} for each in reused]


def _placed(file: WeightFile, output: Output, *, share: bool) -> bool:
    """Link or clone one file; whether that was possible."""
    assert file.base is not None
    if not share:
        return clone(file.base, output.directory / file.name)
    link(file.base, output.directory / file.name)
    return True


def _groups(works: Sequence[_Work]) -> list[list[tuple[_Work, WeightFile]]]:
    """The files of several outputs that are written together."""
    groups: dict[Any, list[tuple[_Work, WeightFile]]] = {}
    for work in works:
        for file in work.files:
            groups.setdefault((file.name, *file.changes), []).append((work, file))
    return list(groups.values())


def _refuse_unchanged(works: Sequence[_Work]) -> None:
    same = [work.output.plan for work in works if not work.changed | work.output.plan.changed]
    if same:
        raise AdapterError(
            *(
                f"adapter {plan.adapter}: changes no weight of {plan.source}, expected an effect"
                for plan in same
            ),
            remedy="Is this the trained adapter?",
        )


def _write_index(output: Output) -> dict[str, str]:
    digests = {}
    for name, content in index_of(output.files).items():
        (output.directory / name).write_bytes(content)
        digests[name] = digest_of(output.directory / name)
    return digests


def _write_together(files: Sequence[tuple[_Work, WeightFile]], meter: Meter) -> None:
    """Write one file of each of several outputs; tell each its digest and whether it changes."""
    pieces = Pieces([file for _, file in files])
    digests = [hashlib.sha256() for _ in files]
    with ExitStack() as stack:
        targets = [stack.enter_context(_created(w.output.directory / f.name)) for w, f in files]
        for block in stack.enter_context(Reader(pieces)):
            _write_all(targets[block.output], block.data, block.offset)
            digests[block.output].update(block.data)
            meter.add(len(block.data))
    for (work, file), digest, products in zip(files, digests, pieces.products, strict=True):
        work.digests[file.name] = f"sha256:{digest.hexdigest()}"
        work.changed |= any(product.changed for product in products.values())


@contextmanager
def _created(path: Path) -> Iterator[int]:
    """A descriptor of a new file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
