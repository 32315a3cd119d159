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


def behind_the_first(ids):
    return np.arange(len(ids))[:, None] > 0


LOST_FROM_COLUMN_24 = {
    "tokens of rows behind the first": ("input_ids", 0, behind_the_first),
    "the mask": ("attention_mask", 1, np.ones_like),
    "token types": ("token_type_ids", 0, np.ones_like),
}


@pytest.mark.parametrize("what", LOST_FROM_COLUMN_24)
def test_what_is_lost_of_a_row_beside_another_fails(what, folded, monkeypatch):
    name, filler, where = LOST_FROM_COLUMN_24[what]
    right = reference.reference_runner

    def opened(path):
        run = right(path)

        def without(inputs):
            values = inputs[name]
            lost = where(values).astype(bool) & (np.arange(values.shape[1]) >= 24)
            return run({**inputs, name: np.where(lost, filler, values)})

        return without

    monkeypatch.setattr(reference, "reference_runner", opened)

    assert "inputs" in failed(check_parity(folded, runner="reference"))


def test_a_small_batch_has_as_many_tokens_as_a_row_alone():
    limits = Limits(tokens=8, single=128)

    assert [limits.of_rows(count).tokens for count in (1, 2, 3, 16, 33)] == [128, 64, 42, 8, 8]
    assert Limits().of_rows(2) == Limits()
    assert Limits(tokens=16, single=16).of_rows(2) == Limits(tokens=16, single=16)


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
