"""`package`: an ONNX export becomes a directory that a server loads."""

import json
import shutil
from pathlib import Path
from typing import Literal

from propulsion_export.artifact import Artifact
from propulsion_export.errors import UsageError
from propulsion_export.manifest import ADAPTERS, MANIFEST_FILE
from propulsion_export.output import check_replaceable, staged_directory
from propulsion_export.packaging.genai import (
    ADAPTER_SUFFIX,
    CONFIG_FILE,
    genai_config,
    write_onnx_adapter,
)
from propulsion_export.pipeline.agreeing import check_signature
from propulsion_export.pipeline.inputs import Progress, silent
from propulsion_export.special_tokens import SpecialTokens

Layout = Literal["genai"]
# Where a model has no positions to run out of (ALiBi), onnxruntime-genai still wants a limit.
_UNLIMITED = 32768


def package(
    artifact: Path,
    output: Path,
    *,
    layout: Layout,
    force: bool = False,
    progress: Progress = silent,
) -> Artifact:
    """Write what a server loads; `output` is a copy of the artifact, with the server's files.

    `genai`, for onnxruntime-genai: `genai_config.json` beside the graph, and of a switchable
    artifact `adapters/NAME.onnx_adapter` for each adapter.

    Args:
        artifact: directory of an ONNX export of a causal language model.
        output: directory to write.
        layout: whose files.
        force: replace an earlier output.
        progress: told how far it is.

    Raises:
        UsageError: the server cannot run such an artifact.
        UnavailableError: a package is missing.
    """
    check_replaceable(output, marker=MANIFEST_FILE, force=force, inputs=(artifact,))
    read = Artifact.read(artifact)
    _check_fits(read)
    check_signature(read)
    progress(0.1, f"copying {artifact}")
    with staged_directory(
        output, marker=MANIFEST_FILE, force=force, inputs=(artifact,)
    ) as directory:
        for name in read.manifest.files:
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(read.directory / name, directory / name)
        progress(0.9, f"writing {CONFIG_FILE}")
        _write_genai(read, directory)
        Artifact.write(directory, read.manifest)
    progress(1.0, f"wrote {output}")
    return Artifact.read(output)


def _check_fits(artifact: Artifact) -> None:
    manifest = artifact.manifest
    if manifest.kind != "onnx":
        found = f"is of kind {manifest.kind}, expected an ONNX export"
        remedy = "Give the directory that `propulsion-export onnx` wrote."
    elif manifest.task != "text-generation":
        found = f"is for {manifest.task}, expected text-generation: onnxruntime-genai runs that"
        if manifest.task == "text2text-generation":
            found += ", and of encoder-decoders those of speech and Marian alone"
        remedy = "Serve it with ONNX Runtime itself."
    elif manifest.dtype == "bfloat16":
        found = "is in bfloat16, for which ONNX Runtime's CPU provider has no kernels"
        remedy = "Export with --dtype float32 or float16."
    else:
        return
    raise UsageError(f"{artifact.directory}: {found}", remedy=remedy)


def _write_genai(artifact: Artifact, directory: Path) -> None:
    from propulsion_export.base import read_config

    manifest = artifact.manifest
    config = read_config(str(directory))
    longest = getattr(config, "max_position_embeddings", None) or _UNLIMITED
    content = genai_config(manifest.inputs, config, SpecialTokens.read(directory), longest=longest)
    text = json.dumps(content, indent=2) + "\n"
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
    base = json.dumps(manifest.base.fingerprint.to_json(), sort_keys=True)
    for name, entry in manifest.adapters.items():
        if entry.file is not None:
            file = directory / ADAPTERS / f"{name}{ADAPTER_SUFFIX}"
            write_onnx_adapter(file, artifact.feeds(name), adapter=entry.digest, base=base)
