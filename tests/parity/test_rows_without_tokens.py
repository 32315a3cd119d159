"""A row of a batch without any token must not change the others, in a decoder too."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from propulsion_export.parity.alone import grouped, in_batches, rows_of, ungrouped
from propulsion_export.pipeline.parity import check_parity

PURPOSE = "a row that the mask hides, beside others"


def spoiled_by_hidden_row(run, feeds):
    found = run(feeds)
    hidden = (feeds["attention_mask"] == 0).all(1).any() and feeds["attention_mask"].shape[1] > 8
    return {**found, "logits": found["logits"] * np.float32(1.01 if hidden else 1)}


@pytest.mark.parametrize("mode", ["folded", "switchable", "bank"])
def test_a_decoder_in_which_it_changes_others_fails(mode, exported, monkeypatch):
    from propulsion_export.pipeline import parity

    right = parity.open_candidate

    def opened(*arguments, **options):
        generator = right(*arguments, **options)
        return replace(generator, run=partial(spoiled_by_hidden_row, generator.run))

    monkeypatch.setattr(parity, "open_candidate", opened)

    report = check_parity(exported("llama", mode))

    wrong = [check for check in report.checks if not check.passed]
    assert {check.case for check in wrong} == {"inputs"}
    assert all(PURPOSE in check.detail for check in wrong)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_a_right_decoder_passes_with_such_a_row(kind, exported):
    report = check_parity(exported(kind, "folded"))

    assert report.passed
    assert PURPOSE in {one.what for one in report.coverage if one.covered}


def test_a_graph_of_the_builder_takes_none(genai_artifact):
    report = check_parity(genai_artifact("llama", "folded"))

    assert report.passed
    (told,) = [one for one in report.coverage if one.what == PURPOSE]
    assert not told.covered
    assert "takes no row without tokens" in told.detail


@pytest.mark.parametrize("arrange", [grouped, ungrouped])
def test_it_does_not_run_alone(arrange):
    tokens = np.arange(1, 13).reshape(3, 4)
    mask = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1]])
    batch = {"input_ids": tokens, "attention_mask": mask}
    rows = arrange(rows_of([batch]))
    ran = [forward.pieces[0]["input_ids"] for forward in rows.forwards]
    logits = rows.logits([{"logits": np.eye(13)[each]} for each in ran])

    (found,) = in_batches(logits, [batch])

    assert all(each.size for each in ran)
    np.testing.assert_array_equal(found["logits"], np.eye(13)[tokens] * mask[..., None])
