"""onnx's own evaluator gets short rows, and one that is long: a mistake far from a row's start."""

import numpy as np
import pytest

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.loading import load_base
from propulsion_export.parity.probes import Limits, make_probes
from propulsion_export.pipeline.parity import check_parity
from propulsion_export.runners import reference


def failed(report):
    return {check.case for check in report.checks if not check.passed}


def reading(most, open_runner):
    """A runner that reads the tokens of a row as padding from `most` on."""

    def opened(path):
        run = open_runner(path)

        def run_short(inputs):
            ids = inputs["input_ids"]
            return run({**inputs, "input_ids": np.where(np.arange(ids.shape[1]) < most, ids, 0)})

        return run_short

    return opened


def test_tokens_that_are_not_read_from_the_32nd_on_fail(folded, monkeypatch):
    short = reading(31, reference.reference_runner)
    monkeypatch.setattr(reference, "reference_runner", short)

    assert "inputs" in failed(check_parity(folded, runner="reference"))


def test_a_right_artifact_passes(folded):
    assert check_parity(folded, runner="reference").passed


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_only_a_row_that_is_alone_is_long(kind, tiny_checkpoint):
    task = "text-generation" if kind == "gpt2" else "text2text-generation"
    base = load_base(str(tiny_checkpoint(kind)), task=task)

    probes, _ = make_probes(base, 0, "standard", Limits(tokens=8, single=128))

    lengths = {probe.length for probe in probes if len(probe.batch["input_ids"]) > 1}
    alone = [probe.length for probe in probes if len(probe.batch["input_ids"]) == 1]
    assert max(lengths) == 8
    assert max(alone) == 128


def test_a_graph_has_the_limits_of_its_runner(folded):
    assert Limits.of(Artifact.read(folded).manifest, 8, 128) == Limits(None, 8, 128)
    assert Limits.of(Artifact.read(folded).manifest) == Limits(None, None, None)
