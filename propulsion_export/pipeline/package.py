"""`package`: an artifact becomes a directory that a server loads."""

import importlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from propulsion_export import packaging
from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.file_names import MANIFEST_FILE
from propulsion_export.artifacts.staging import check_replaceable, staged_directory
from propulsion_export.environment.paths import user_path
from propulsion_export.environment.progress import Progress, silent
from propulsion_export.errors import UsageError
from propulsion_export.graph.signature import check_signature
from propulsion_export.packaging.layouts import LAYOUTS, PackageOptions, WritePackage


@dataclass(frozen=True)
class Package:
    """What a server loads.

    Attributes:
        adapters: their names, sorted, without the base model.
        model_name: the name that Triton's clients use; None for other servers.
        next_command: what to type to use it.
    """

    directory: Path
    layout: str
    adapters: tuple[str, ...]
    model_name: str | None = None
    next_command: str = ""


def package(
    artifact: Path,
    output: Path,
    *,
    layout: str,
    model_name: str | None = None,
    max_batch_size: int | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Package:
    """Write what a server loads; the package does not need the artifact any more.

    `genai`, for onnxruntime-genai, and `onnx-adapter`, for ONNX Runtime's LoraAdapter: a copy of
    the artifact, and an artifact itself, with `genai_config.json` (genai) and, of a switchable one,
    `adapters/NAME.onnx_adapter` for each adapter. `triton`: a model repository for Triton Inference
    Server; a bank's current adapters are inside it.

    Args:
        artifact: directory of an ONNX export or, for Triton, of an engine too.
        output: directory to write.
        layout: one of `LAYOUTS`.
        model_name: the name that Triton's clients use; default: the name of `output`.
        max_batch_size: the most rows that Triton puts into one batch; default: 32, or the engine's.
        force: replace an earlier output.
        progress: called with the share done and what is being done.

    Raises:
        UsageError: the server cannot run such an artifact; an option of another layout.
        ArtifactError: the artifact is damaged, or its manifest describes another graph.
        UnavailableError: a package is missing.
    """
    options = _options_for(layout, PackageOptions(model_name, max_batch_size), output)
    kind = LAYOUTS[layout].kind
    check_replaceable(output, marker=MANIFEST_FILE, kind=kind, force=force, inputs=(artifact,))
    read = Artifact.read(artifact)
    module = importlib.import_module(f"{packaging.__name__}.{LAYOUTS[layout].module}")
    write: WritePackage = module.plan(read, options)
    check_signature(read)
    progress(0.1, f"copying {artifact}")
    with staged_directory(
        output, marker=MANIFEST_FILE, kind=kind, force=force, inputs=(artifact,)
    ) as directory:
        adapters = sorted(set(write(directory)) - {BASE_NAME})
    progress(1.0, f"wrote {output}")
    return Package(
        output,
        layout,
        tuple(adapters),
        options.model_name,
        module.next_command(output, adapters),
    )


def _options_for(layout: str, given: PackageOptions, output: Path) -> PackageOptions:
    """The options of a layout, the model's name filled in.

    Raises:
        UsageError: there is no such layout, or an option is given that it does not take.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"--layout {layout!r}: is unknown, expected one of {', '.join(LAYOUTS)}")
    taken = LAYOUTS[layout].options
    for name, value in asdict(given).items():
        if value is not None and name not in taken:
            takers = " or ".join(key for key, entry in LAYOUTS.items() if name in entry.options)
            raise UsageError(
                f"--{name.replace('_', '-')}: for --layout {takers}, found {layout}",
                remedy="Leave it out.",
            )
    if "model_name" in taken and given.model_name is None:
        return replace(given, model_name=user_path(output).resolve().name)
    return given
