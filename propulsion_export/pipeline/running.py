"""Which runtime runs an artifact, and the artifact as a runner."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from propulsion_export.artifact import Artifact, Runner, Tensors
from propulsion_export.decoding import PAST, CausalModel, EncoderDecoder, Generator
from propulsion_export.errors import UsageError
from propulsion_export.machine import cuda_devices
from propulsion_export.manifest import ENCODER_DECODER_FILES, IDS_INPUT
from propulsion_export.scales import Array

# A generator is not callable: that tells the two apart.
Candidate = Runner | Generator
RunnerName = Literal["auto", "torch", "onnxruntime", "onnxruntime-cuda", "reference", "tensorrt"]
_RUNNERS_OF_KIND = {
    "merged": ("torch",),
    "onnx": ("onnxruntime", "onnxruntime-cuda", "reference"),
    "engine": ("tensorrt",),
}
# The reference evaluator computes in Python: larger graphs and longer inputs take minutes.
_REFERENCE_BYTES = 16 * 2**20
REFERENCE_LENGTH = 8


def open_candidate(artifact: Artifact, name: str, *, trust_remote_code: bool = False) -> Candidate:
    """The artifact as a callable from tensors to tensors, or as a generator if it generates.

    Raises:
        UnavailableError: this machine cannot run it.
    """
    task = artifact.manifest.task
    if name == "torch":
        return torch_candidate(_merged(artifact, trust_remote_code), task)
    if task == "text-generation":
        return CausalModel(_open(artifact, name, artifact.path), artifact.manifest.inputs)
    if task == "text2text-generation":
        encode, first, later = (
            _open(artifact, name, artifact.directory / file) for file in ENCODER_DECODER_FILES
        )
        config = json.loads((artifact.directory / "config.json").read_text(encoding="utf-8"))
        return EncoderDecoder(encode, _by_cache(first, later), config["decoder_start_token_id"])
    return _open(artifact, name, artifact.path)


def torch_candidate(model: Any, task: str) -> Candidate:
    """A torch model as a callable from tensors to tensors, or as a generator if it generates."""
    from propulsion_export.runners import pytorch

    if task == "text-generation":
        return CausalModel(pytorch.torch_decoder_runner(model))
    if task == "text2text-generation":
        return EncoderDecoder(
            pytorch.torch_encoder_runner(model),
            pytorch.torch_cross_decoder_runner(model),
            model.config.decoder_start_token_id,
        )
    return pytorch.torch_runner(model)


def _merged(artifact: Artifact, trust_remote_code: bool) -> Any:
    import torch

    from propulsion_export.base import load_base

    merged = load_base(
        str(artifact.directory),
        task=artifact.manifest.task,
        dtype=getattr(torch, artifact.manifest.dtype),
        trust_remote_code=trust_remote_code,
    )
    merged.check_complete(())
    return merged.model


def _open(artifact: Artifact, name: str, path: Path) -> Runner:
    from propulsion_export.runners import graphs

    if name == "reference":
        run = graphs.reference_runner(path)
    elif name == "tensorrt":
        engine = artifact.manifest.engine
        assert engine is not None
        run = graphs.tensorrt_runner(path, engine.runtime, engine.profiles)
    else:
        provider = "CUDAExecutionProvider" if name.endswith("cuda") else "CPUExecutionProvider"
        run = graphs.onnxruntime_runner(path, provider)
    return _with_ids(run) if artifact.manifest.mode == "bank" else run


def _with_ids(run: Runner) -> Runner:
    """Give every row of a batch the one adapter id that is fed, if it is one."""

    def each(feeds: Tensors) -> Tensors:
        rows = len(feeds["input_ids"])
        ids = np.ascontiguousarray(np.broadcast_to(feeds[IDS_INPUT], (rows,)))
        return run({**feeds, IDS_INPUT: ids})

    return each


def place_for(name: str) -> Callable[[Array], Any]:
    """How to put an array where this runner computes, once for many runs that are fed it."""
    from propulsion_export.runners import graphs

    places: dict[str, Callable[[Array], Any]] = {
        "onnxruntime": partial(graphs.place_in_onnxruntime, device="cpu"),
        "onnxruntime-cuda": partial(graphs.place_in_onnxruntime, device="cuda"),
        "tensorrt": graphs.place_for_tensorrt,
    }
    return places.get(name, np.asarray)


def _by_cache(first: Runner, later: Runner) -> Runner:
    """The decoder's first step, which fills the cache, or a later one, which reads it."""

    def decode(feeds: Tensors) -> Tensors:
        cached = any(name.startswith(f"{PAST}.") for name in feeds)
        return later(feeds) if cached else first(feeds)

    return decode


def choose_runner(artifact: Artifact, runner: RunnerName) -> str:
    """The one asked for, if it can run that kind; else what fits the kind and the dtype."""
    possible = _RUNNERS_OF_KIND[artifact.manifest.kind]
    if runner != "auto":
        if runner not in possible:
            raise UsageError(
                f"--runner {runner}: cannot run a {artifact.manifest.kind} artifact, expected "
                f"{' or '.join(possible)}"
            )
        return runner
    if artifact.manifest.kind != "onnx" or artifact.manifest.dtype != "bfloat16":
        return possible[0]
    size = sum(file.stat().st_size for file in artifact.directory.glob("*.onnx*"))
    if cuda_devices():
        return "onnxruntime-cuda"
    return "reference" if size <= _REFERENCE_BYTES else "onnxruntime"
