"""The packed inputs of an adapter are loaded by its name."""

import subprocess
import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from written_artifacts import SWITCHABLE, TOPIC, change, refused

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.file_names import BASE_FEEDS
from propulsion_export.artifacts.tensor_names import SCALES_INPUT
from propulsion_export.errors import ArtifactError, UnknownAdapterError


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [("topic", [1.5, -2, 0.5]), ("base", [1, 1, 1]), (None, [1, 1, 1])],
)
def test_feeds_in_bfloat16_are_loaded_by_name(switchable, adapter, expected):
    feeds = Artifact.read(switchable).feeds(adapter)

    assert set(feeds) == {SCALES_INPUT}
    assert feeds[SCALES_INPUT].dtype == ml_dtypes.bfloat16
    assert feeds[SCALES_INPUT].astype(float).tolist() == expected


def test_a_fresh_interpreter_loads_bfloat16_feeds(switchable):
    """Nobody else has told numpy of bfloat16 there."""
    script = (
        "import sys; from propulsion_export.artifacts.artifact import Artifact; "
        "print(Artifact.read(sys.argv[1]).feeds('topic')['propulsion_scales'].dtype)"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, switchable], capture_output=True, text=True
    )

    assert (done.stdout, done.stderr) == ("bfloat16\n", "")


@pytest.mark.parametrize("name", ["tpoic", "", "../topic", "BASE"])
def test_an_unknown_adapter_is_refused_with_those_known(switchable, name):
    with pytest.raises(
        UnknownAdapterError, match=f"has no adapter '{name}', expected one of base, topic"
    ):
        Artifact.read(switchable).feeds(name)


def test_a_folded_artifact_needs_no_feeds_and_has_no_other_adapter(folded):
    artifact = Artifact.read(folded)

    assert artifact.feeds(None) == {}
    assert artifact.feeds("topic") == {}
    for other in ("base", "pos", ""):
        with pytest.raises(UnknownAdapterError, match="has the adapter 'topic' folded in"):
            artifact.feeds(other)


def test_an_adapter_without_a_file_to_feed_is_refused(switchable):
    change(switchable, "adapters", "topic", "file", to=None)

    refused(switchable, "the adapter 'topic' has no file, expected one with its packed inputs")


def test_feeds_of_the_base_model_that_are_not_recorded_are_refused(switchable):
    change(switchable, "files", BASE_FEEDS, drop=True)
    refused(switchable, "base.safetensors: has no digest in the manifest")

    artifact = Artifact(switchable, replace(SWITCHABLE, files={}))
    with pytest.raises(ArtifactError, match="expected the packed inputs of 'base'"):
        artifact.feeds(None)


def test_feeds_that_are_no_tensors_are_refused(switchable):
    (switchable / TOPIC).write_bytes(b"not safetensors")
    artifact = Artifact.write(switchable, SWITCHABLE)

    with pytest.raises(ArtifactError, match="the packed inputs cannot be read"):
        artifact.feeds("topic")


@pytest.mark.parametrize("name", ["base", "topic"])
def test_a_file_that_is_replaced_after_reading_is_not_loaded(switchable, name):
    artifact = Artifact.read(switchable)
    feeds = {SCALES_INPUT: np.array([2, 2, 2], ml_dtypes.bfloat16)}
    save_file(feeds, switchable / "adapters" / f"{name}.safetensors")

    with pytest.raises(ArtifactError, match=rf"{name}\.safetensors: its content is not what the"):
        artifact.feeds(name)
