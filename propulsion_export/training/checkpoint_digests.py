"""Whether a checkpoint is as it was written: the digest of each of its files, and what is kept."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from propulsion_export.artifacts.artifact import digest_of
from propulsion_export.artifacts.staging import replace_file
from propulsion_export.errors import AdapterError

DIGESTS = "digests.json"
STATE = "trainer_state.json"
_KEPT = 2  # the latest ones; if the last is damaged, the one before is continued


class DigestEach(transformers.TrainerCallback):  # type: ignore[misc]
    """Records the digests of each checkpoint once all processes have written it.

    The last two checkpoints stay, and the best ones that either of them names.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.best_model_checkpoint:  # recorded as a path, which may have been moved since
            best = Path(args.output_dir) / Path(state.best_model_checkpoint).name
            state.best_model_checkpoint = str(best)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if args.should_save:
            directory = Path(args.output_dir)
            record_digests(directory / f"checkpoint-{state.global_step}")
            _remove_older(directory)


def record_digests(checkpoint: Path) -> None:
    """Write the digest of each file of a checkpoint, the last file of a whole checkpoint."""
    digests = {
        path.relative_to(checkpoint).as_posix(): digest_of(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != DIGESTS
    }
    replace_file(checkpoint / DIGESTS, json.dumps(digests, indent=2).encode())


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, or with the best one that it names; empty if nothing is."""
    found = _damage(checkpoint)
    best = "" if found else _best_of(checkpoint)
    if best and best != checkpoint.name and (of_best := _damage(checkpoint.with_name(best))):
        return f"{checkpoint.name} needs the best epoch's checkpoint, and {of_best}"
    return found


def check_best(checkpoint: Path) -> None:
    """Check the checkpoint that the adapter is taken from.

    Raises:
        AdapterError: it was changed or removed after it was written.
    """
    if found := _damage(checkpoint):
        raise AdapterError(
            f"{checkpoint}: the adapter of the best epoch was to be read here, but {found}",
            remedy="Train again.",
        )


def in_order(directory: Path) -> list[Path]:
    """The checkpoints of a directory, whole or not, the latest first."""
    numbered = [
        path for path in directory.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()
    ]
    return sorted(numbered, key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _damage(checkpoint: Path) -> str:
    name = checkpoint.name
    try:
        digests = json.loads((checkpoint / DIGESTS).read_text(encoding="utf-8"))
        wrong = [file for file, digest in digests.items() if not _holds(checkpoint / file, digest)]
    except FileNotFoundError:
        return f"{name} has no {DIGESTS}, so it was not finished"
    except (OSError, ValueError, AttributeError):
        return f"{name} has a damaged {DIGESTS}"
    if STATE not in digests:
        return f"{name} has no {STATE}"
    return f"{name} is damaged or incomplete ({', '.join(wrong)})" if wrong else ""


def _holds(file: Path, digest: str) -> bool:
    return file.is_file() and digest_of(file) == digest


def _best_of(checkpoint: Path) -> str:
    """The name of the best checkpoint so far, as this one records it; empty if it names none."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return Path(state.get("best_model_checkpoint") or "").name


def _remove_older(directory: Path) -> None:
    latest = in_order(directory)[:_KEPT]
    kept = {path.name for path in latest} | set(_bests(latest))
    for path in in_order(directory):
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _bests(checkpoints: Iterable[Path]) -> list[str]:
    return [best for path in checkpoints if (best := _best_of(path))]
