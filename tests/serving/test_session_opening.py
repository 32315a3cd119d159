"""What a session can be opened from, in which process, and what it says of the rest."""

import os
import pickle
from dataclasses import replace

import pytest
from forks import forking
from session_inputs import KINDS, ROWS, TEXTS, random_inputs

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.manifest import EngineEntry
from propulsion_export.errors import ArtifactError, UnavailableError, UsageError
from propulsion_export.runners import tensorrt as engines
from propulsion_export.serving.session import Session


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("inputs", {"dtype": "int32"}, r"the graph has the input 'input_ids' \(int64 .* \(int32"),
        ("inputs", {"name": "ids"}, "the manifest has the input 'ids', the graph no such one"),
        ("outputs", {"dtype": "float16"}, r"the output 'logits' \(float32 .* \(float16"),
    ],
    ids=["input-type", "input-name", "output-type"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_that_differs_from_its_graph_is_refused(kind, field, change, message, copied):
    artifact = Artifact.read(copied(kind))
    first, *others = getattr(artifact.manifest, field)
    changed = replace(artifact.manifest, **{field: (replace(first, **change), *others)})

    with pytest.raises(ArtifactError, match=message):
        Session(artifact.with_manifest(changed).directory)


def test_an_artifact_without_a_tokenizer_takes_tensors_alone(copied):
    directory = copied("banked")
    manifest = Artifact.read(directory).manifest
    for file in directory.glob("tokenizer*"):
        file.unlink()
    Artifact.write(directory, manifest)
    session = Session(directory)

    assert len(session(random_inputs(), "five")) == ROWS
    with pytest.raises(UsageError, match="has no tokenizer"):
        session("ba")


def test_without_a_gpu_what_needs_one_is_unavailable(banked, copied, monkeypatch):
    monkeypatch.setattr(engines, "cuda_devices", lambda: ())
    monkeypatch.setattr(engines, "cuda_reason", lambda: "there is no CUDA driver")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UnavailableError, match="has no CUDAExecutionProvider"):
        Session(banked, runner="onnxruntime-cuda")

    directory = copied("banked")
    manifest = Artifact.read(directory).manifest
    (directory / "model.onnx").rename(directory / "model.engine")
    engine = EngineEntry("tensorrt-rtx", "1.7", ("sm_90",), (), {}, "sha256:0")
    Artifact.write(directory, replace(manifest, kind="engine", engine=engine))
    with pytest.raises(UnavailableError, match="an engine runs on a GPU only, and there is no"):
        Session(directory)


def test_a_session_is_pickled_as_its_artifact(opened):
    session = opened("banked")

    again = pickle.loads(pickle.dumps(session))

    assert [r.prediction for r in again(TEXTS, "five")] == [
        r.prediction for r in session(TEXTS, "five")
    ]
    assert repr(again) == repr(session)
    assert repr(session).endswith("bank: text-classification, onnxruntime, 2 adapters>")


@forking
def test_a_fork_is_told_to_open_its_own(opened):
    session = opened("banked")
    session("ba")

    child = os.fork()
    if child == 0:
        try:
            session("ba")
        except UsageError as error:
            os._exit(7 if "Open a session in each process" in str(error) else 1)
        os._exit(2)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
