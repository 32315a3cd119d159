"""`propulsion-export onnx`: export to ONNX, and compare with PyTorch."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import click

from .console import Console, console_options, human_size, size_of
from .folding import FoldRequest, check_from, fold, from_options
from .options import (
    dtype_option,
    model_option,
    modes_option,
    output_options,
    quantisation_options,
    task_option,
    trust_option,
    untie_option,
)
from .verdict import exit_code

if TYPE_CHECKING:
    from collections.abc import Mapping

    from propulsion_export.artifacts.artifact import Artifact
    from propulsion_export.artifacts.manifest import ExecutionProvider, Exporter, Mode
    from propulsion_export.parity.reports.report import ParityReport
    from propulsion_export.pipeline.fold_onnx import Runtime
    from propulsion_export.pipeline.producing import ExporterChoice
    from propulsion_export.pipeline.quantisation_options import QuantizationForm, QuantizedType


_NOT_COMPARED = "Parity: not compared"


class ExportArguments(TypedDict):
    """The options that go to `OnnxOptions` as they are."""

    model: str | None
    task: str
    dtype: str
    opset: int
    exporter: "ExporterChoice"
    execution_provider: "ExecutionProvider"
    quantize: "QuantizedType | None"
    quantization_form: "QuantizationForm | None"
    block_size: int | None
    accuracy_level: int | None
    quantize_activations: bool
    calibration: Path | None
    untie: bool
    allow_range: bool
    placement: str | None
    max_labels: int | None
    train_bias: bool
    force: bool
    trust_remote_code: bool


@click.command(
    epilog="\b\nExample: propulsion-export onnx -a topic=adapters/topic -a pos=adapters/pos "
    "--mode switchable -o onnx/switchable"
)
@model_option
@click.option(
    "-a",
    "--adapter",
    multiple=True,
    metavar="[NAME=]DIR",
    help="Adapter directory; repeatable. Without any, the base model of -m is exported: folded by "
    "itself, otherwise with slots for adapters that are added later.",
)
@modes_option
@task_option
@dtype_option
@click.option(
    "--opset", type=click.IntRange(18, 23), default=20, show_default=True, help="ONNX version."
)
@click.option(
    "--exporter",
    type=click.Choice(["auto", "transformers", "genai"]),
    default="auto",
    show_default=True,
    help="What makes the graph. transformers: any architecture, also for TensorRT; genai: "
    "onnxruntime-genai's builder, fused attention for ONNX Runtime; auto: genai where it can.",
)
@click.option(
    "--execution-provider",
    type=click.Choice(["cpu", "cuda", "dml", "webgpu"]),
    default="cpu",
    show_default=True,
    help="Execution provider of ONNX Runtime that a graph of genai is for.",
)
@quantisation_options
@untie_option
@click.option("--allow-range", is_flag=True, help="Accept scales that the dtype rounds badly.")
@click.option(
    "--placement",
    help="Without -a: which modules get slots: attention, all, or a regex of module paths.  "
    "[default: all]",
)
@click.option(
    "--max-labels",
    type=click.IntRange(min=1),
    help="Without -a: most labels that a head may have.  [default: 16, or the base model's]",
)
@click.option("--train-bias", is_flag=True, help="Without -a: slots for trained biases too.")
@from_options
@click.option("--no-parity", is_flag=True, help="Do not compare with PyTorch afterwards.")
@output_options
@trust_option
@console_options
def command(
    console: Console,
    *,
    adapter: tuple[str, ...],
    output: Path,
    mode: tuple["Mode", ...],
    no_parity: bool,
    from_artifact: Path | None,
    share: bool,
    for_runtime: "Runtime",
    verify: bool,
    **options: Unpack[ExportArguments],
) -> int:
    """Export to ONNX: an adapter folded in, several to switch between, or one in every row.

    Writes model.onnx with its weights beside it, config.json, the tokenizer and the adapters: one
    small file each if switchable, one row each in a bank. `adapter add` adds more later. Then
    compares with PyTorch, unless --no-parity is given. Several modes become DIR/folded,
    DIR/switchable and DIR/bank. -v shows where the time went.

    With --from, adapters are folded into an artifact's graphs without a trace: one into DIR,
    several into DIR/NAME each.
    """
    check_from(from_artifact, mode, share=share, for_runtime=for_runtime, verify=verify)
    if from_artifact is not None:
        request = FoldRequest(
            from_artifact,
            adapter,
            output,
            share,
            options["untie"],
            for_runtime,
            verify,
            options["force"],
            options["trust_remote_code"],
        )
        return fold(console, request, parity=not no_parity)
    from propulsion_export.pipeline.onnx import export_modes
    from propulsion_export.pipeline.onnx_options import OnnxOptions

    made: dict[Mode, tuple[Exporter, str]] = {}
    with console.stages():
        with console.progress() as progress:
            artifacts = export_modes(
                adapter,
                output,
                mode,
                OnnxOptions(**options),
                progress=progress,
                chosen=lambda mode, *why: made.update({mode: why}),
            )
        reports: dict[Mode, ParityReport | None] = dict.fromkeys(artifacts)
        if not no_parity:
            trusted = options["trust_remote_code"]
            for name, artifact in artifacts.items():
                reports[name] = _compare(console, artifact, adapter, trust_remote_code=trusted)
    summaries = {mode: _summary(each, *made[mode]) for mode, each in artifacts.items()}
    _print_results(console, output, summaries, reports)
    # The export is done; where this machine cannot compare, the line says so and it is no failure.
    compared = [report for report in reports.values() if report and report.verdict != "not run"]
    return max(map(exit_code, compared), default=0)


def _compare(
    console: Console, artifact: "Artifact", adapter: tuple[str, ...], *, trust_remote_code: bool
) -> "ParityReport":
    from propulsion_export.environment.stages import stage
    from propulsion_export.pipeline.parity import check_parity

    with console.progress() as progress, stage(f"parity {artifact.manifest.mode}"):
        return check_parity(
            artifact.directory,
            adapter=adapter,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )


def _print_results(
    console: Console,
    output: Path,
    summaries: "Mapping[Mode, tuple[dict[str, Any], str]]",
    reports: "Mapping[Mode, ParityReport | None]",
) -> None:
    """Print each artifact and its verdict; the JSON of one mode is that of its artifact alone."""
    from propulsion_export.parity.reports.line import verdict_line

    values: dict[str, dict[str, Any]] = {}
    lines = []
    for mode, (value, line) in summaries.items():
        report = reports[mode]
        values[mode] = {**value, "parity": report and report.verdict}
        lines.append(f"{line}\n{verdict_line(report)}" if report else f"{line}. {_NOT_COMPARED}")
    several = {"output": str(output), "modes": values}
    console.result(several if len(values) > 1 else next(iter(values.values())), "\n".join(lines))


def _summary(artifact: "Artifact", exporter: "Exporter", reason: str) -> tuple[dict[str, Any], str]:
    """The artifact as JSON and as one line."""
    manifest, names = artifact.manifest, sorted(artifact.list_adapters())
    size = size_of(artifact.directory)
    quantised = manifest.quantization
    value = {
        "artifact": str(artifact.directory),
        "bytes": size,
        "mode": manifest.mode,
        "dtype": manifest.dtype,
        "exporter": exporter,
        "exporter_reason": reason,
        "execution_provider": manifest.execution_provider,
        "quantization": asdict(quantised) if quantised else None,
        "adapters": names,
    }
    adapters = ", ".join(names) or "no adapters"
    kind = f"int{quantised.bits} ({quantised.form}), " if quantised else ""
    line = f"{artifact.directory}: {manifest.mode}, {kind}{manifest.dtype}, {human_size(size)}"
    return value, f"{line}, {adapters}. Exporter: {exporter} ({reason})"
