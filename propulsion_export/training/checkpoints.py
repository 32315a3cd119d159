"""The checkpoints of a run, in a hidden directory beside the output, to resume it from."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from propulsion_export.errors import AdapterError, BaseModelError, UsageError
from propulsion_export.training.checkpoint_digests import DIGESTS, damage, in_order
from propulsion_export.training.model import TrainableBase
from propulsion_export.training.options import TrainOptions

_RUN_FILE = "run.json"
# Options that do not change the training, so that a resumed run may have others.
_FREE_OPTIONS = (
    *("validation", "head_only", "resume", "force", "trust_remote_code"),
    "chat_template",  # part of the base model's digest
)

RunDescription = Mapping[str, Any]


def describe_run(
    base: TrainableBase,
    training: Sequence[object],
    validation: Sequence[object],
    options: TrainOptions,
) -> RunDescription:
    """What must be the same to resume a checkpoint: base, data, settings; as JSON values."""
    free = {name: asdict(options)[name] for name in _FREE_OPTIONS}
    digest = hashlib.sha256()
    for item in (*training, None, *validation):
        digest.update(repr(item).encode())
    described = {name: value for name, value in asdict(options).items() if name not in free}
    return {"model": base.name, "base": _digest(base), "data": digest.hexdigest()} | described


def _digest(base: TrainableBase) -> str:
    """A digest of all that is frozen: weights, settings and the tokenizer.

    The tokenizer is represented by its vocabulary, its chat template and, if it is a fast one, by
    its rules.
    """
    digest = hashlib.sha256(base.model.config.to_json_string().encode())
    rules = getattr(base.tokenizer, "backend_tokenizer", None)
    digest.update((rules.to_str() if rules else repr(sorted(base.tokenizer.get_vocab()))).encode())
    digest.update(repr(getattr(base.tokenizer, "chat_template", None)).encode())
    trained = tuple(f"{path}." for path in (*base.heads, *base.absent))
    for name, weight in base.model.state_dict().items():
        if not name.startswith(trained):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            flat = weight.detach().cpu().contiguous().view(-1)
            digest.update(flat.view(torch.uint8).numpy())
    return f"sha256:{digest.hexdigest()}"


@dataclass(frozen=True)
class Checkpoints:
    """Where a run keeps its checkpoints.

    Attributes:
        directory: where new ones are written.
        latest: the one to continue; None for a fresh start.
        note: a sentence about checkpoints that were passed over, or an empty text.
    """

    directory: Path
    latest: Path | None = None
    note: str = ""


@contextmanager
def checkpoints(
    output: Path, run: RunDescription, *, resume: bool, is_main: bool
) -> Iterator[Checkpoints]:
    """Yield the directory for checkpoints and the checkpoint to resume.

    The directory is removed on success; after an interruption it stays if it holds a whole
    checkpoint.

    Raises:
        UsageError: the checkpoint to resume belongs to another run.
        AdapterError: all checkpoints are damaged; they stay as they are.
        BaseModelError: the base model has changed since the run began.
    """
    directory = output.with_name(f".{output.name}.checkpoints")
    found = _to_continue(directory) if resume else Checkpoints(directory)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # every process has looked before the first one changes them
    if found.latest:
        _check_same_run(directory, run)
        if is_main:
            _remove_passed_over(directory, found.latest)
    elif is_main:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        (directory / _RUN_FILE).write_text(json.dumps(run), encoding="utf-8")
    finished = False
    try:
        yield found
        finished = True
    finally:
        if is_main and (finished or all(map(damage, in_order(directory)))):
            shutil.rmtree(directory, ignore_errors=True)


def _to_continue(directory: Path) -> Checkpoints:
    """The latest whole checkpoint.

    Raises:
        AdapterError: there is none, but at least one was whole once.
    """
    there = in_order(directory)
    problems: list[str] = []
    for path in there:
        if not (problem := damage(path)):
            note = f"{'; '.join(problems)}: continued from {path.name}." if problems else ""
            return Checkpoints(directory, path, note)
        problems.append(problem)
    if any((path / DIGESTS).exists() for path in there):
        raise AdapterError(
            *(f"{directory}: {problem}" for problem in problems),
            remedy="Restore one from a copy, or train without --resume.",
        )
    return Checkpoints(directory)


def _remove_passed_over(directory: Path, latest: Path) -> None:
    """Remove damaged checkpoints that the continued run writes again."""
    there = in_order(directory)
    for path in there[: there.index(latest)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_same_run(directory: Path, run: RunDescription) -> None:
    try:
        left = json.loads((directory / _RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{directory / _RUN_FILE}: is damaged, so the checkpoint cannot be continued",
            remedy="Train without --resume.",
        ) from error
    if left.get("base") != run["base"] and left.get("model") == run["model"]:
        raise BaseModelError(
            f"{run['model']}: its weights, settings or tokenizer are not those that the "
            f"interrupted run in {directory} began with",
            remedy="Restore the base model, or train without --resume.",
        )
    different = [
        f"{directory}: was left by a run with {name} {left.get(name)!r}, expected {value!r}"
        for name, value in run.items()
        if left.get(name) != value
    ]
    if different:
        raise UsageError(
            *different, remedy="Use the options of the interrupted run, or train without --resume."
        )
