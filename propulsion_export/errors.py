"""The exceptions that a caller may catch, each with the exit code of the command line.

    PropulsionExportError
    ├── UsageError              2   the call asks for something impossible
    │   └── UnknownAdapterError     the artifact has no adapter of that name
    ├── VerificationError       1   what was written is not what was computed
    ├── UnavailableError        3   this machine cannot do it: shown as *not run*, never as passed
    └── InvalidInputError       4   an input is invalid, damaged or of another base model
        ├── AdapterError            an adapter directory
        ├── ArtifactError           an artifact directory or its manifest
        ├── BaseModelError          a base model, or one that is not the adapter's
        ├── DataError               training or evaluation data
        └── ToolError               an exporter, parser or builder refused the input

Results that differ are not an error but a report with `passed == False`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_SHOWN = 4  # findings in a message
_NAMED = 8  # adapters that a message lists


class PropulsionExportError(Exception):
    """An error that the user can act on, with a message of one line.

    Args:
        findings: `where: what was found, what was expected`, one text for each offender.
        remedy: a sentence with the likeliest remedy.
    """

    exit_code: int = 4

    def __init__(self, *findings: str, remedy: str = "") -> None:
        self.findings = findings
        self.remedy = remedy
        super().__init__(*findings)

    def __reduce__(self) -> tuple[Any, ...]:
        # Unpickling rebuilds an exception from its positional arguments, which would lose the
        # remedy when it crosses a process boundary (data loaders, launchers).
        return _rebuild, (type(self), self.findings, self.remedy)

    def __str__(self) -> str:
        shown = "; ".join(self.findings[:_SHOWN])
        if len(self.findings) > _SHOWN:
            shown += f"; and {len(self.findings) - _SHOWN} more"
        ending = "" if not shown or shown.endswith((".", "?")) or not self.remedy else "."
        return " ".join(f"{shown}{ending} {self.remedy}".split())


def _rebuild(
    kind: type[PropulsionExportError], findings: tuple[str, ...], remedy: str
) -> PropulsionExportError:
    return kind(*findings, remedy=remedy)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its class when it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class UsageError(PropulsionExportError):
    """The call asks for something impossible."""

    exit_code = 2


class UnknownAdapterError(UsageError):
    """An artifact has no adapter of a name."""


def unknown_adapters(
    directory: Path, unknown: Iterable[str], known: Sequence[str], *, remedy: str = ""
) -> UnknownAdapterError:
    """The error that lists the names an artifact has no adapter of, and some that it has."""
    more = f" and {len(known) - _NAMED} more" if len(known) > _NAMED else ""
    expected = f"expected one of {', '.join(known[:_NAMED])}{more}" if known else "it has none"
    return UnknownAdapterError(
        *(f"{directory}: has no adapter {name!r}, {expected}" for name in unknown), remedy=remedy
    )


class VerificationError(PropulsionExportError):
    """What was written is not what was computed, or cannot be read again."""

    exit_code = 1


class UnavailableError(PropulsionExportError):
    """This machine cannot do it: a package is missing or too old, or there is no GPU."""

    exit_code = 3


class InvalidInputError(PropulsionExportError):
    """An input is invalid or damaged, or two inputs do not belong together."""


class AdapterError(InvalidInputError):
    """An adapter directory cannot be used."""


class ArtifactError(InvalidInputError):
    """An artifact directory or its manifest cannot be used."""


class BaseModelError(InvalidInputError):
    """A base model cannot be used, or is not the one the adapter was trained on."""


class DataError(InvalidInputError):
    """Training or evaluation data cannot be used."""


class ToolError(InvalidInputError):
    """An exporter, parser or builder refused the input; the finding quotes its first message."""
