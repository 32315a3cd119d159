"""The checkpoints of a run, in a hidden directory beside the output, to resume it from."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from propulsion_export.errors import UsageError
from propulsion_export.training.options import TrainOptions

_RUN_FILE = "run.json"
# transformers writes this file last, so a checkpoint that has it is complete.
_STATE_FILE = "trainer_state.json"
# Options that do not change the training, so that a resumed run may have others.
_FREE_OPTIONS = ("validation", "head_only", "resume", "force", "trust_remote_code")

RunDescription = Mapping[str, Any]


def describe_run(
    model: str, training: Sequence[object], validation: Sequence[object], options: TrainOptions
) -> RunDescription:
    """The settings and data that must be the same to resume a checkpoint, as JSON values."""
    free = {name: asdict(options)[name] for name in _FREE_OPTIONS}
    digest = hashlib.sha256()
    for item in (*training, None, *validation):
        digest.update(repr(item).encode())
    described = {name: value for name, value in asdict(options).items() if name not in free}
    return {"model": model, "data": digest.hexdigest()} | described


@contextmanager
def checkpoints(
    output: Path, run: RunDescription, *, resume: bool, is_main: bool
) -> Iterator[tuple[Path, Path | None]]:
    """Yield the directory for checkpoints and the checkpoint to resume, None for a fresh start.

    The directory is removed on success; after an interruption it stays if it holds a complete
    checkpoint.

    Raises:
        UsageError: the checkpoint to resume belongs to another run.
    """
    directory = output.with_name(f".{output.name}.checkpoints")
    latest = _latest(directory) if resume else None
    if latest:
        _check_same_run(directory, run)
    elif is_main:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        (directory / _RUN_FILE).write_text(json.dumps(run), encoding="utf-8")
    finished = False
    try:
        yield directory, latest
        finished = True
    finally:
        if is_main and (finished or not _latest(directory)):
            shutil.rmtree(directory, ignore_errors=True)


def _latest(directory: Path) -> Path | None:
    whole = [path for path in directory.glob("checkpoint-*") if _is_whole(path)]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _check_same_run(directory: Path, run: RunDescription) -> None:
    try:
        left = json.loads((directory / _RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{directory / _RUN_FILE}: is damaged, so the checkpoint cannot be continued",
            remedy="Train without --resume.",
        ) from error
    different = [
        f"{directory}: was left by a run with {name} {left.get(name)!r}, expected {value!r}"
        for name, value in run.items()
        if left.get(name) != value
    ]
    if different:
        raise UsageError(
            *different, remedy="Use the options of the interrupted run, or train without --resume."
        )
