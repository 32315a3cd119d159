"""`trt`: an ONNX artifact becomes an engine artifact."""

from pathlib import Path

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.file_names import MANIFEST_FILE
from propulsion_export.artifacts.staging import check_replaceable, staged_directory
from propulsion_export.engine import BuildOptions, write_engine
from propulsion_export.environment.progress import Progress, silent
from propulsion_export.errors import ArtifactError
from propulsion_export.graph.signature import check_signature


def build_engine(
    artifact: Path,
    output: Path,
    options: BuildOptions,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> Artifact:
    """Build a TensorRT or TensorRT-RTX engine from an ONNX artifact.

    Args:
        artifact: directory that `export_onnx` wrote.
        output: directory to write `model.engine` to, with everything that serving needs.
        options: runtime, targets, shapes and more.
        force: replace an earlier output.
        progress: called with the share done and what is being done.

    Raises:
        PropulsionExportError: as its subclasses say; nothing is left at `output` then.
    """
    check_replaceable(output, marker=MANIFEST_FILE, kind="engine", force=force, inputs=[artifact])
    read = Artifact.read(artifact)
    if read.manifest.kind != "onnx":
        raise ArtifactError(
            f"{artifact}: is a {read.manifest.kind} artifact, expected an ONNX export",
            remedy="`propulsion-export onnx` makes one.",
        )
    check_signature(read)
    with staged_directory(output, marker=MANIFEST_FILE, kind="engine", force=force) as directory:
        manifest = write_engine(read, directory, options, lambda m: progress(0.5, m))
        written = Artifact.write(directory, manifest)
    progress(1.0, f"wrote {output}")
    return written.at(output)
