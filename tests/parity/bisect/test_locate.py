"""A planted mistake is found at its module; a right artifact has none."""

import shutil
from dataclasses import replace

import pytest
from planted_modules import (
    SCALES,
    Judged,
    all_wrong,
    one_channel,
    parameters_in,
    plant_in_graph,
    row_wrong,
    with_scale,
)

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.parity.reports.report import NotRun
from propulsion_export.pipeline.parity import check_parity

QUERY = "bert.encoder.layer.1.attention.self.query"
INNER = "bert.encoder.layer.0.intermediate.dense"


@pytest.fixture(scope="module")
def judged(export_world):
    made = {}

    def make(mode):
        if mode not in made:
            made[mode] = Judged(export_world(mode))
        return made[mode]

    return make


@pytest.mark.parametrize("mode", ["folded", "switchable", "bank"])
def test_in_a_right_artifact_no_module_is_wrong(mode, judged):
    found = judged(mode).locate()

    assert isinstance(found, NotRun)
    assert "every module" in found.reason


def test_a_module_that_a_bank_scales_further_on_is_not_wrong(exported):
    """MPNet's relative positions: the embedding's own output is in no bank."""
    found = Judged(exported("mpnet", "bank", task="text-classification")).locate()

    assert isinstance(found, NotRun)


@pytest.mark.parametrize("mode", ["switchable", "bank"])
@pytest.mark.parametrize("change", SCALES, ids=lambda change: change.__name__)
def test_a_mistaken_scale_is_found_at_its_module(change, mode, judged):
    one = judged(mode)

    found = one.locate(feeds=one.feeds_with(with_scale(one.adapter, QUERY, change)))

    assert (found.path, found.reads, found.multiply) == (QUERY, "itself", "wrong")


def test_the_wrong_channel_of_a_scale_is_named(judged):
    one = judged("switchable")

    found = one.locate(feeds=one.feeds_with(with_scale(one.adapter, QUERY, one_channel)))

    assert (found.channels, found.channels_off, found.worst_channel) == (32, 1, 5)
    assert found.factor == pytest.approx(1.01, rel=1e-4)


@pytest.mark.parametrize("mode", ["folded", "switchable", "bank"])
@pytest.mark.parametrize("change", [row_wrong, all_wrong], ids=lambda change: change.__name__)
def test_a_wrong_weight_is_found_at_its_module(change, mode, judged, tmp_path):
    one = judged(mode)
    name = next(name for name, path, kind in parameters_in(one.directory) if path == INNER)

    found = one.locate(plant_in_graph(one.directory, tmp_path / "planted", name, change))

    assert (found.path, found.reads) == (INNER, "itself")
    assert found.multiply == ("folded" if mode == "folded" else "right")


# The keys of the attention to the encoder read what the encoder has returned; positions are given
# values of which they read only the shape.
OF_BART = {
    "model.decoder.layers.0.encoder_attn.k_proj": "decoder_model.onnx",
    "model.encoder.embed_positions": "encoder_model.onnx",
}


@pytest.mark.parametrize("module", OF_BART)
def test_a_wrong_weight_of_an_encoder_decoder_is_found_at_its_module(module, exported, tmp_path):
    one, file = Judged(exported("bart", "folded")), OF_BART[module]
    parameters = parameters_in(one.directory, file)
    name = next(name for name, path, kind in parameters if (path, kind) == (module, "weight"))

    found = one.locate(
        plant_in_graph(one.directory, tmp_path / "planted", name, all_wrong, file=file)
    )

    assert (found.path, found.reads) == (module, "itself")


def test_a_failure_that_is_no_module_s_is_told(folded, tmp_path):
    directory = shutil.copytree(folded, tmp_path / "copy")
    artifact = Artifact.read(directory)
    ((name, entry),) = artifact.manifest.adapters.items()
    reversed_labels = {name: replace(entry, labels=entry.labels[::-1])}
    artifact.with_manifest(replace(artifact.manifest, adapters=reversed_labels))

    report = check_parity(directory, effort="quick", bisect=True)

    assert {check.case for check in report.checks if not check.passed} == {"labels"}
    (told,) = [one for one in report.not_run if one.what.startswith("bisect")]
    assert told.what == f"bisect of labels of {name}"
