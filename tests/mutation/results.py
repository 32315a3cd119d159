"""The results of all runs, on disk as they come, and by which sources they were made."""

import fcntl
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mutation.stamps import results_stamp
from mutation.toys import Toy
from propulsion_export.environment.machine import tool_versions

CLEAN = "clean"
_ROOT = Path(__file__).parents[2]
_ABOUT = "about.json"


@dataclass(frozen=True)
class Run:
    """One planted mistake, or a clean artifact, and what parity says of it.

    Attributes:
        toy: the name of the artifact.
        architecture: of its model.
        precision: the dtype of its weights, or the integers that they are quantised to.
        shape: see `Toy.shape`.
        kind: of the mistake; `clean` for none.
        place: where it is planted; for a clean artifact, the seed of the inputs.
        outcome: of `judging`; `unchanged` where nothing was changed, `unplantable` where the
            mistake does not fit.
        cases: that failed.
        detail: the words of the verdict.
        moved: see `visible.Moved`.
        scale: see `visible.Moved`.
        where: see `visible.Moved`.
        size: of the mistake, where it has one.
        seconds: of one core, that the verdict took.
        all_seconds: with planting the mistake, and measuring what it moves.
    """

    toy: str
    architecture: str
    precision: str
    shape: str
    kind: str
    place: str
    outcome: str
    cases: tuple[str, ...] = ()
    detail: str = ""
    moved: float = 0.0
    scale: float = 0.0
    where: str = ""
    size: float | None = None
    seconds: float = 0.0
    all_seconds: float = 0.0

    @classmethod
    def of(cls, toy: Toy, kind: str, place: str, outcome: str, **fields: Any) -> "Run":
        """A run in an artifact."""
        about = toy.name, toy.architecture, toy.precision, toy.shape
        return cls(*about, kind, place, outcome, **fields)

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from all other runs."""
        return self.toy, self.kind, self.place

    @property
    def counts(self) -> bool:
        """Whether there was something to judge."""
        return self.outcome not in ("unchanged", "unplantable")


class Results:
    """The runs in a directory.

    Attributes:
        runs: all of them, by `Run.key`.
        about: the commit and the packages that they were made with.
    """

    def __init__(self, root: Path) -> None:
        """Read what there is, whatever it was made by; see `forget_stale_`."""
        self.directory = root / "results"
        self.about: dict[str, Any] = _read_json(self.directory / _ABOUT)
        self.runs = {run.key: run for run in self._read()}

    @property
    def is_current(self) -> bool:
        """Whether all of it was made by the sources as they are now."""
        return bool(self.about.get("stamp") == results_stamp())

    def forget_stale_(self) -> None:
        """Remove what was made by other sources than those of now."""
        if self.is_current:
            return
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        self.runs = {}
        self.about = {"stamp": results_stamp(), "commit": _commit(), "tools": tool_versions()}
        (self.directory / _ABOUT).write_text(json.dumps(self.about, indent=1) + "\n")

    def add(self, run: Run) -> None:
        """Keep a run."""
        self.runs[run.key] = run
        with (self.directory / f"{run.toy}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(run)) + "\n")

    def _read(self) -> Iterator[Run]:
        for file in sorted(self.directory.glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                values = json.loads(line)
                yield Run(**{**values, "cases": tuple(values["cases"])})


@contextmanager
def one_at_a_time(root: Path) -> Iterator[None]:
    """Let no other run use the directory.

    Raises:
        RuntimeError: one does.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"{root}: another run uses it; wait, or give --build DIR") from error
        yield


def _commit() -> str:
    """The commit that is checked out, and whether files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=_ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "propulsion_export", "tests")
    return f"{git('rev-parse', '--short=12', 'HEAD')}{', changed' if changed else ''}"


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}
