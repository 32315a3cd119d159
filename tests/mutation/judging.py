"""The verdict on one copy of an artifact."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mutation.remembering import Memory, remembered
from propulsion_export import check_parity
from propulsion_export.errors import ArtifactError, PropulsionExportError, UnavailableError

# `caught` by a case, `refused` before there is a verdict, `not run` by this machine, `crashed`
# with an exception that is none of ours, or `passed`.
Outcome = Literal["caught", "refused", "not run", "crashed", "passed"]


@dataclass(frozen=True)
class Judged:
    """What parity says of a copy.

    Attributes:
        outcome: see `Outcome`.
        cases: the cases that failed.
        detail: what it says in words.
    """

    outcome: Outcome
    cases: tuple[str, ...] = ()
    detail: str = ""


def judge(directory: Path, memory: Memory | None = None, *, seed: int = 0) -> Judged:
    """Let `check_parity` judge an artifact at its default effort; without a memory as it is."""
    try:
        with remembered(memory) if memory else nullcontext():
            report = check_parity(directory, seed=seed)
    except (ArtifactError, UnavailableError) as error:
        return Judged("refused", (type(error).__name__,), str(error)[:300])
    except PropulsionExportError as error:
        return Judged("refused", (type(error).__name__,), str(error)[:300])
    except Exception as error:  # a bug, which is told as such and is not a verdict
        return Judged("crashed", (type(error).__name__,), str(error)[:300])
    failed = [check for check in report.checks if not check.passed]
    if failed:
        cases = tuple(dict.fromkeys(check.case for check in failed))
        return Judged("caught", cases, failed[0].detail[:300])
    if not report.passed:
        return Judged("not run", (), "; ".join(each.reason for each in report.not_run)[:300])
    return Judged("passed")
