"""`propulsion-export parity`: the verdict on an artifact."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from propulsion_export.environment.waiting import let_threads_sleep

from .console import Console, console_options
from .github import summary_file, tell_github
from .options import DIRECTORY, FILE, runner_option, trust_option
from .streams import print_result
from .verdict import exit_code

_SHOWN = 3  # kinds that were not covered

if TYPE_CHECKING:
    from propulsion_export.parity.probes import Effort
    from propulsion_export.parity.reports.report import ParityReport


def _print_schema(context: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if asked:
        from propulsion_export.parity.reports.schema import SCHEMA_FILE

        print_result(SCHEMA_FILE.read_text(encoding="utf-8").rstrip("\n"))
        context.exit()


@click.command(
    epilog="\b\nExample: propulsion-export parity onnx/switchable --report parity/switchable "
    "--junit parity.xml"
)
@click.argument("artifact", metavar="DIR", type=DIRECTORY)
@click.option(
    "-m", "--model", help="Base model: path, GGUF file or name.  [default: where it was at export]"
)
@click.option(
    "-a",
    "--adapter",
    multiple=True,
    metavar="NAME=DIR",
    help="Directory of an adapter; repeatable.  [default: where it was at export]",
)
@click.option(
    "--against",
    type=DIRECTORY,
    multiple=True,
    metavar="DIR",
    help="Another artifact of the same base model to compare with, for each adapter that both "
    "have; repeatable.",
)
@runner_option
@click.option(
    "--inputs",
    type=FILE,
    help="File of texts to compare on, as for `run`.  [default: random tokens]",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    help="Seed for the generated inputs, and for the adapters if chosen at random.  [default: 0]",
)
@click.option(
    "--report",
    type=DIRECTORY,
    help="Directory for parity.json and parity.html; of a failure also the inputs, failing/.",
)
@click.option("--junit", type=FILE, help="JUnit XML for a CI.")
@click.option(
    "--summary",
    type=FILE,
    help="File that the verdict is appended to as Markdown.  [default: in GitHub Actions, the "
    "step's summary; elsewhere none]",
)
@click.option("--force", is_flag=True, help="Replace an earlier --report.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where PyTorch computes; auto: a GPU with room for the model if there is one.",
)
@click.option(
    "--low-memory",
    is_flag=True,
    help="Let PyTorch compute layer by layer, for a model that memory does not hold in float64.",
)
@click.option(
    "--max-kl",
    type=click.FloatRange(min=0),
    metavar="NATS",
    help="Most that quantised weights may cost: mean KL divergence from the unquantised model, "
    "in nats.  [default: any; it is only told]",
)
@click.option(
    "--quick",
    "effort",
    flag_value="quick",
    help="Compare on 16 random rows only; the report lists what is left out.",
)
@click.option(
    "--thorough",
    "effort",
    flag_value="thorough",
    help="Compare also rows of every length at which the model may change, and the longest ones.",
)
@click.option(
    "--bisect",
    is_flag=True,
    help="On failure, find the first module that is wrong, and its channels.",
)
@click.option(
    "--schema",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_schema,
    help="Print the JSON schema of parity.json and of --json, and exit.",
)
@trust_option
@console_options
def command(
    console: Console,
    *,
    artifact: Path,
    model: str | None,
    adapter: tuple[str, ...],
    against: tuple[Path, ...],
    runner: str,
    inputs: Path | None,
    seed: int | None,
    report: Path | None,
    junit: Path | None,
    summary: Path | None,
    force: bool,
    device: str,
    low_memory: bool,
    max_kl: float | None,
    effort: "Effort | None",
    bisect: bool,
    trust_remote_code: bool,
) -> int:
    """Compare an artifact with PyTorch: does it compute the same?

    The reference is the base model with the adapter in float64; an artifact's error may be at most
    4 times that of PyTorch at the same precision. If weights are quantised, the reference has the
    same quantised weights, and the distance from the unquantised model is told beside the verdict.
    Exit 0: passed; 1: failed; 3: nothing could be run.
    """
    let_threads_sleep()  # before torch is loaded
    from propulsion_export.artifacts.staging import check_replaceable_file, replace_file
    from propulsion_export.parity.reports.junit import to_junit
    from propulsion_export.pipeline.parity import check_parity

    if junit is not None:
        check_replaceable_file(junit, holds=b"<testsuite")
    summary = summary_file(summary)
    with console.progress() as progress:
        verdict = check_parity(
            artifact,
            model=model,
            adapter=adapter,
            against=against,
            runner=runner,
            inputs=inputs,
            seed=seed,
            report=report,
            force=force,
            device=device,
            low_memory=low_memory,
            max_kl=max_kl,
            effort=effort or "standard",
            bisect=bisect,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if junit is not None:
        replace_file(junit, to_junit(verdict).encode())
    tell_github(verdict, summary)
    console.result(json.loads(verdict.to_json()), _text(console, verdict))
    return exit_code(verdict)


def _covered(verdict: "ParityReport") -> str:
    if not verdict.coverage:
        return ""
    left = [one.what for one in verdict.coverage if not one.covered]
    told = f"; not {', not '.join(left[:_SHOWN])}" if left else ""
    more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    count = len(verdict.coverage)
    return f"covered: {count - len(left)} of {count} kinds of inputs and tables{told}{more}\n"


def _text(console: Console, verdict: "ParityReport") -> str:
    from propulsion_export.parity.reports.line import verdict_line

    rows = [
        (check.case, check.adapter, "passed" if check.passed else "FAILED", check.detail)
        for check in verdict.checks
    ]
    table = console.table(("case", "adapter", "verdict", "detail"), rows) + "\n" if rows else ""
    told = [(one.adapter, one.output, str(one)) for one in verdict.price]
    price = (
        console.table(("price for", "output", "quantisation costs"), told) + "\n" if told else ""
    )
    rounding = "".join(f"rounded activations: {one}\n" for one in verdict.rounding)
    located = "".join(f"bisect: {line}\n" for one in verdict.located for line in one.lines())
    missed = "".join(
        f"not run: {one.what}: {one.reason}\n"
        for one in verdict.not_run
        if one.what.startswith("bisect")
    )
    return table + price + rounding + located + missed + _covered(verdict) + verdict_line(verdict)
