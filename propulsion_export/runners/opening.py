"""Choose the runtime of an artifact, and open the artifact in it."""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Artifact, Runner, Tensors
from propulsion_export.artifacts.file_names import ENCODER_DECODER_FILES
from propulsion_export.artifacts.manifest import Manifest
from propulsion_export.artifacts.tensor_names import IDS_INPUT, PAST
from propulsion_export.base_model.generation_settings import first_decoder_token
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.environment.machine import cuda_devices
from propulsion_export.errors import UnavailableError, UsageError
from propulsion_export.runners.decoding import (
    Candidate,
    CausalModel,
    EncoderDecoder,
    Generator,
    recomputing,
    replaying,
)
from propulsion_export.runners.right_padding import RightPaddedModel
from propulsion_export.runners.table import RUNTIMES, runtimes_of

# The reference evaluator computes in Python: larger graphs and longer inputs take minutes.
_REFERENCE_BYTES = 16 * 2**20
REFERENCE_LENGTH, REFERENCE_LONGEST_ROW = 8, 128


def choose_runner(artifact: Artifact, runner: str) -> str:
    """The requested runtime if it runs this kind of artifact; for `auto`, the best one here.

    Raises:
        UsageError: the requested runtime does not run this kind of artifact.
    """
    manifest = artifact.manifest
    possible = runtimes_of(manifest.kind)
    if manifest.pads_right:  # with operators that onnx's own evaluator lacks
        possible = tuple(name for name in possible if name != "reference")
    if runner != "auto":
        if runner not in possible:
            raise UsageError(
                f"--runner {runner}: cannot run {_shown(manifest)}, expected "
                f"{' or '.join(possible)}"
            )
        return runner
    if manifest.execution_provider == "cuda":
        return "onnxruntime-cuda"
    if manifest.kind != "onnx" or manifest.dtype != "bfloat16" or manifest.pads_right:
        return possible[0]
    if cuda_devices():
        return "onnxruntime-cuda"
    size = sum(file.stat().st_size for file in artifact.directory.glob("*.onnx*"))
    return "reference" if size <= _REFERENCE_BYTES else possible[0]


def _shown(manifest: Manifest) -> str:
    made = " of onnxruntime-genai's builder" if manifest.pads_right else ""
    return f"{manifest.kind} artifacts{made}"


def open_runner(
    artifact: Path | str,
    runner: str = "auto",
    *,
    steps: Literal["once", "stepwise", "recomputed"] = "stepwise",
    in_float: bool = False,
    trust_remote_code: bool = False,
) -> Runner:
    """Open an artifact as a function from arrays to arrays, as `parity` runs it.

    The function takes a padded batch, such as `input_ids` and `attention_mask` int64 [rows,
    length], with the adapter's inputs (`Artifact.feeds`), and returns the outputs by name. A
    generative model returns the logits of every position.

    Args:
        artifact: directory of a merged checkpoint, an ONNX export or an engine.
        runner: the runtime; `auto`: the default for its kind and dtype.
        steps: how a generative model reads a batch: `stepwise`, with its cache, or `recomputed`,
            in one pass. Other models read it at once.
        in_float: let quantised layers compute in floating point where the runtime can.
        trust_remote_code: run code that a checkpoint brings.

    Raises:
        ArtifactError: the artifact is damaged.
        UsageError: the runtime does not run this kind of artifact.
        UnavailableError: this machine cannot run it.
    """
    read = Artifact.read(artifact)
    name = choose_runner(read, runner)
    candidate = open_candidate(
        read,
        name,
        trust_remote_code=trust_remote_code,
        in_float=in_float and opens_in_float(name),
    )
    if callable(candidate):
        return candidate
    return recomputing(candidate) if steps == "recomputed" else replaying(candidate)


def open_candidate(
    artifact: Artifact, name: str, *, trust_remote_code: bool = False, in_float: bool = False
) -> Candidate:
    """The artifact as a callable from tensors to tensors, or as a generator if it generates.

    `in_float`: quantised layers compute in floating point; see `opens_in_float`.

    Raises:
        UnavailableError: this machine cannot run it.
    """
    if artifact.manifest.kind == "merged":
        candidate: Candidate = _module(name).open_checkpoint(
            artifact, trust_remote_code=trust_remote_code
        )
        return candidate
    return candidate_of(artifact, partial(_open, artifact, name, in_float=in_float))


def candidate_of(artifact: Artifact, open_path: Callable[[Path], Runner]) -> Candidate:
    """The graphs or the engine of an artifact as a candidate; `open_path` opens each file."""
    if artifact.manifest.mode == "bank":
        open_path = _opening_with_ids(open_path)
    architecture = TASKS[artifact.manifest.task].architecture
    if architecture == "decoder":
        return _open_decoder(artifact, open_path)
    if architecture == "encoder-decoder":
        encode, first, later = (
            open_path(artifact.directory / file) for file in ENCODER_DECODER_FILES
        )
        start = first_decoder_token(artifact.directory)
        return EncoderDecoder(encode, _by_cache(first, later), start)
    return open_path(artifact.path)


def opens_in_float(name: str) -> bool:
    """Whether a runtime can compute quantised layers in floating point."""
    return hasattr(_module(name), "open_graph_in_float")


def _open_decoder(artifact: Artifact, open_path: Callable[[Path], Runner]) -> Generator:
    """A causal language model, whose rows are padded on the side that its graph needs."""
    manifest = artifact.manifest
    if manifest.pads_right:
        return RightPaddedModel(open_path(artifact.path), manifest.inputs)
    return CausalModel(open_path(artifact.path), manifest.inputs)


def place_for(name: str) -> Callable[[Array], Any]:
    """The function that puts an array where a runtime computes, once for many runs."""
    if RUNTIMES[name].kind == "merged":
        return np.asarray
    return partial(_module(name).place, device=RUNTIMES[name].device)


def _module(name: str) -> Any:
    """The module of a runtime.

    Raises:
        UnavailableError: a package that it needs is not installed.
    """
    try:
        return importlib.import_module(f"{__package__}.{RUNTIMES[name].module}")
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"--runner {name}: needs {error.name}, which is not installed",
            remedy="Run: pip install propulsion-export.",
        ) from error


def _open(artifact: Artifact, name: str, path: Path, *, in_float: bool) -> Runner:
    module = _module(name)
    opener = module.open_graph_in_float if in_float else module.open_graph
    run: Runner = opener(path, artifact, device=RUNTIMES[name].device)
    return run


def _opening_with_ids(open_path: Callable[[Path], Runner]) -> Callable[[Path], Runner]:
    return lambda path: _with_ids(open_path(path))


def _with_ids(run: Runner) -> Runner:
    """Repeat a single adapter id for every row of the batch."""

    def each(feeds: Tensors) -> Tensors:
        rows = len(feeds["input_ids"])
        ids = np.ascontiguousarray(np.broadcast_to(feeds[IDS_INPUT], (rows,)))
        return run({**feeds, IDS_INPUT: ids})

    return each


def _by_cache(first: Runner, later: Runner) -> Runner:
    """The decoder's first step, which fills the cache, or a later one, which reads it."""

    def decode(feeds: Tensors) -> Tensors:
        cached = any(name.startswith(f"{PAST}.") for name in feeds)
        return later(feeds) if cached else first(feeds)

    return decode
