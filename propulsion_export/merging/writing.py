"""Write merged checkpoints: every byte of the base model is read once, every other written once.

Two threads take pieces in turn; each reads one, multiplies it, writes it and adds it to the file's
digest while it is in the cache. Memory does not grow with the checkpoint.
"""

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from propulsion_export.artifacts.artifact import digest_of
from propulsion_export.base_model.tensor_files import Array, StoredTensor, shortened
from propulsion_export.environment.progress import Progress, silent
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.merging.files import WeightFile, index_of, total_size
from propulsion_export.merging.pieces import Piece, Pieces
from propulsion_export.merging.plan import Plan
from propulsion_export.merging.sharing import clone, link
from propulsion_export.merging.turns import Digest, Stopped, Turns

_THREADS = 2
_EVERY = 1.0  # seconds between two reports of the progress


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
    meter = _Meter(sum(total_size(each.files) for each in work), progress)
    for together in _groups(work):
        _Files(together, meter).write()
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


class _Meter:
    """Count bytes over all threads, and report how many there are and how fast they come."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total, self._progress = total, progress
        self._lock, self._done, self._start = threading.Lock(), 0, time.monotonic()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count

    def report(self) -> None:
        done, seconds = self._done, max(time.monotonic() - self._start, 1e-9)
        share = done / max(self._total, 1)
        self._progress(
            0.1 + 0.85 * share,
            f"folding: {done / 1e9:.1f} of {self._total / 1e9:.1f} GB, "
            f"{done / seconds / 1e6:.0f} MB/s",
        )


class _Files:
    """Write one file of each of several outputs."""

    def __init__(self, files: Sequence[tuple[_Work, WeightFile]], meter: _Meter) -> None:
        self._files, self._meter = files, meter
        self._turns, self._lock = Turns(), threading.Lock()
        self._digests = [Digest(self._turns) for _ in files]
        self._pieces = Pieces([file for _, file in files])
        self._waiting: Iterator[Piece] = iter(self._pieces)
        self._sources: dict[Path, int] = {}
        self._out: list[int] = []

    def write(self) -> None:
        """Write them all, and tell each output's work their digests and changes."""
        with ExitStack() as stack:
            stack.callback(self._close)
            for work, file in self._files:
                path = work.output.directory / file.name
                self._out.append(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            self._run()
        for (work, file), digest, products in zip(
            self._files, self._digests, self._pieces.products, strict=True
        ):
            work.digests[file.name] = digest.value
            work.changed |= any(product.changed for product in products.values())

    def _run(self) -> None:
        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                threads = [pool.submit(self._work) for _ in range(_THREADS)]
                while wait(threads, timeout=_EVERY).not_done:
                    self._meter.report()
            finally:  # an interrupt ends the threads too
                self._turns.stop()
        _raise_first(threads)

    def _work(self) -> None:
        """Write pieces until there is none left, in a thread of its own."""
        buffer = np.empty(1 << 20, np.uint8)
        try:
            while (piece := self._take()) is not None:
                self._write(piece, self._read(piece, buffer))
        except BaseException:
            self._turns.stop()
            raise

    def _take(self) -> Piece | None:
        self._turns.check()
        with self._lock:
            return next(self._waiting, None)

    def _read(self, piece: Piece, buffer: Array) -> memoryview:
        if isinstance(piece.source, memoryview):
            return piece.source[piece.first : piece.first + piece.count]
        view = buffer.data[: piece.count]
        _read_into(view, self._source(piece.source.file), piece.source, piece.first)
        return view

    def _source(self, file: Path) -> int:
        with self._lock:
            if file not in self._sources:
                self._sources[file] = os.open(file, os.O_RDONLY)
            return self._sources[file]

    def _write(self, piece: Piece, data: memoryview) -> None:
        for target in piece.targets:
            written: Any = data
            if target.products is not None:
                try:
                    written = target.products.block(data, piece.element)
                except AdapterError as error:
                    named = (f"{piece.name}: {finding}" for finding in error.findings)
                    raise AdapterError(*named, remedy=error.remedy) from error
            _write_all(self._out[target.output], memoryview(written), target.offset)
            self._digests[target.output].add(target.number, written)
            self._meter.add(len(written))

    def _close(self) -> None:
        for descriptor in (*self._sources.values(), *self._out):
            os.close(descriptor)


def _raise_first(threads: Sequence[Future[None]]) -> None:
    """Raise the error of the thread that failed, if one did."""
    for thread in threads:
        with suppress(Stopped):
            thread.result()


def _read_into(view: memoryview, descriptor: int, stored: StoredTensor, first: int) -> None:
    """Fill `view` with a tensor's bytes from byte `first` on."""
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], stored.offset + first + done)
        except OSError as error:
            raise BaseModelError(
                f"{stored.file}: cannot be read ({error.strerror})", remedy="Copy it again."
            ) from error
        if count == 0:
            raise shortened(stored.file)
        done += count


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
