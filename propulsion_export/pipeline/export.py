"""`export`: from adapters to ONNX, an engine and parity reports."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from propulsion_export.adapters.provenance import find_base
from propulsion_export.adapters.specification import read_adapters, source_of
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.file_names import MANIFEST_FILE
from propulsion_export.artifacts.manifest import Mode
from propulsion_export.artifacts.staging import Marker, check_replaceable
from propulsion_export.engine import BuildOptions
from propulsion_export.environment.progress import Progress, silent
from propulsion_export.errors import UnavailableError
from propulsion_export.parity.reports.report import ParityReport
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import REPORT_FILE, check_parity
from propulsion_export.pipeline.trt import build_engine


@dataclass(frozen=True)
class ExportResult:
    """The results: the graph, the engine or the reason why there is none, and the verdicts."""

    onnx: Artifact
    engine: Artifact | None
    engine_missing: str | None
    reports: dict[str, ParityReport]


def export(
    adapter: Sequence[str | Path],
    output: Path,
    *,
    model: str | None = None,
    mode: Mode = "folded",
    task: str = "auto",
    dtype: str = "keep",
    engine: BuildOptions | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> ExportResult:
    """Adapters in; `onnx/`, `engine/` and a parity report of each out, below `output`.

    Each of them appears whole or not at all. `engine` says how to build; None builds none. An
    engine that this machine cannot build is explained in `engine_missing`.

    Raises:
        PropulsionExportError: as the stages say.
    """
    parts = {name: output / name for name in ("onnx", "engine", "parity-onnx", "parity-engine")}
    inputs = (*map(source_of, adapter), find_base(model, read_adapters(adapter)))
    for name, part in parts.items():
        marker: Marker = REPORT_FILE if name.startswith("parity") else MANIFEST_FILE
        kind = None if name.startswith("parity") else name
        check_replaceable(part, marker=marker, kind=kind, force=force, inputs=inputs)
    exported = export_onnx(
        adapter,
        parts["onnx"],
        model=model,
        mode=mode,
        task=task,
        dtype=dtype,
        exporter="auto" if engine is None else "transformers",
        force=force,
        trust_remote_code=trust_remote_code,
        progress=lambda share, message: progress(share * 0.4, message),
    )
    built, missing = _built(parts["onnx"], parts["engine"], engine, force=force)
    reports = {}
    for name in ("onnx", "engine") if built else ("onnx",):
        progress(0.7, f"comparing {name} with PyTorch")
        reports[name] = check_parity(
            parts[name],
            against=[parts["onnx"]] if name == "engine" else [],
            report=parts[f"parity-{name}"],
            force=force,
            trust_remote_code=trust_remote_code,
        )
    progress(1.0, f"wrote {output}")
    return ExportResult(exported, built, missing, reports)


def _built(
    onnx: Path, output: Path, options: BuildOptions | None, *, force: bool
) -> tuple[Artifact | None, str | None]:
    """The engine, or the reason why this machine cannot build it; neither if none is asked for."""
    if options is None:
        return None, None
    try:
        return build_engine(onnx, output, options, force=force), None
    except UnavailableError as error:
        return None, str(error)
