"""`propulsion-export onnx --from`: adapters folded into an artifact's graphs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click
from click.core import ParameterSource

from propulsion_export.errors import UsageError

from .console import Console, human_size, size_of
from .options import DIRECTORY
from .verdict import exit_code

if TYPE_CHECKING:
    from propulsion_export.artifacts.artifact import Artifact
    from propulsion_export.parity.reports.report import ParityReport
    from propulsion_export.pipeline.fold_onnx import Runtime

P = ParamSpec("P")
R = TypeVar("R")

# What is said with --from; an artifact settles everything else.
_TAKEN = {
    "from_artifact",
    "adapter",
    "output",
    "mode",
    "share",
    "for_runtime",
    "verify",
    "untie",
    "force",
    "no_parity",
    "trust_remote_code",
    "as_json",
    "quiet",
    "verbose",
}
_NOT_COMPARED = "Parity: not compared"


@dataclass(frozen=True)
class FoldRequest:
    """What to fold: the arguments of `fold_onnx`."""

    from_artifact: Path
    adapter: tuple[str, ...]
    output: Path
    share: bool
    untie: bool
    for_runtime: "Runtime"
    verify: bool
    force: bool
    trust_remote_code: bool


def from_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add `--from` and what goes with it."""
    options = (
        click.option(
            "--from",
            "from_artifact",
            type=DIRECTORY,
            help="Fold -a into copies of this ONNX artifact's graphs, without a trace. It is "
            "switchable, or folded without an adapter.",
        ),
        click.option(
            "--share",
            is_flag=True,
            help="With --from: share the file of weights that do not change, cloned or "
            "hard-linked; onnx.load refuses the latter.",
        ),
        click.option(
            "--for",
            "for_runtime",
            type=click.Choice(["any", "tensorrt"]),
            default="any",
            show_default=True,
            help="With --from. tensorrt: signs of scales go into quantised integers.",
        ),
        click.option(
            "--verify",
            is_flag=True,
            help="With --from: read the output again: every digest, weight and node as folded.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def check_from(
    from_artifact: Path | None,
    mode: Sequence[str],
    *,
    share: bool,
    for_runtime: str,
    verify: bool,
) -> None:
    """Refuse options that do nothing with `--from`, or without it.

    Raises:
        UsageError: naming each of them.
    """
    if from_artifact is None:
        idle = {"--share": share, "--for": for_runtime != "any", "--verify": verify}
        if found := [f"{name}: does nothing without --from" for name, is_ in idle.items() if is_]:
            raise UsageError(*found, remedy="Leave it out.")
        return
    context = click.get_current_context()
    given = [
        max(option.opts, key=len)
        for option in context.command.params
        if option.name not in _TAKEN
        and context.get_parameter_source(str(option.name)) == ParameterSource.COMMANDLINE
    ]
    if set(mode) != {"folded"}:
        given.append(f"--mode {' and '.join(mode)}")
    if given:
        raise UsageError(
            *(f"{option}: found with --from, whose artifact settles it" for option in given),
            remedy="Leave it out, or leave --from out to export from the base model.",
        )


def fold(console: Console, request: FoldRequest, *, parity: bool) -> int:
    """Fold, compare each result with PyTorch unless `parity` is off, and print them."""
    from propulsion_export.pipeline.fold_onnx import fold_onnx

    with console.stages():
        with console.progress() as progress:
            artifacts = fold_onnx(
                request.adapter,
                request.output,
                from_artifact=request.from_artifact,
                share=request.share,
                untie=request.untie,
                for_runtime=request.for_runtime,
                verify=request.verify,
                force=request.force,
                trust_remote_code=request.trust_remote_code,
                progress=progress,
            )
        reports: dict[str, ParityReport | None] = dict.fromkeys(artifacts)
        for name, specification in zip(artifacts if parity else (), request.adapter, strict=False):
            trusted = request.trust_remote_code
            reports[name] = _compare(
                console, artifacts[name], specification, trust_remote_code=trusted
            )
    _print(console, request, artifacts, reports)
    compared = [report for report in reports.values() if report and report.verdict != "not run"]
    return max(map(exit_code, compared), default=0)


def _compare(
    console: Console, artifact: "Artifact", adapter: str, *, trust_remote_code: bool
) -> "ParityReport":
    from propulsion_export.pipeline.parity import check_parity

    with console.progress() as progress:
        return check_parity(
            artifact.directory,
            adapter=[adapter],
            trust_remote_code=trust_remote_code,
            progress=progress,
        )


def _print(
    console: Console,
    request: FoldRequest,
    artifacts: "dict[str, Artifact]",
    reports: "dict[str, ParityReport | None]",
) -> None:
    from propulsion_export.parity.reports.line import verdict_line

    values: dict[str, dict[str, Any]] = {}
    lines = []
    for name, artifact in artifacts.items():
        report, new = reports[name], _new_bytes(artifact.directory)
        values[name] = {
            "artifact": str(artifact.directory),
            "bytes": size_of(artifact.directory),
            "new_bytes": new,
            "from": str(request.from_artifact),
            "dtype": artifact.manifest.dtype,
            "adapters": [name],
            "parity": report and report.verdict,
        }
        line = f"{artifact.directory}: {name} folded into {request.from_artifact}, "
        line += f"{artifact.manifest.dtype}, {human_size(new)} on disk"
        lines.append(f"{line}\n{verdict_line(report)}" if report else f"{line}. {_NOT_COMPARED}")
    several = {"output": str(request.output), "adapters": values}
    console.result(several if len(values) > 1 else next(iter(values.values())), "\n".join(lines))


def _new_bytes(directory: Path) -> int:
    """The size of the files that no other directory shares."""
    files = (path.stat() for path in directory.rglob("*") if path.is_file())
    return sum(file.st_size for file in files if file.st_nlink == 1)
