"""Mixed rows are judged each by its own adapter, so that no mix-up passes."""

import numpy as np
import pytest

from propulsion_export.artifacts.tensor_names import BANK_INPUT, IDS_INPUT
from propulsion_export.parity.mixing import mixed_rows
from propulsion_export.parity.subject import Subject

BANK = np.array([[1.0, 1.0], [2.0, -1.0], [0.5, 3.0]])
NAMES = ("base", "one", "two")
ALLOWED = {name: {"y": 1e-6} for name in NAMES}


def batch(rows, seed):
    chooser = np.random.default_rng(seed)
    return {
        "input_ids": chooser.integers(0, 9, (rows, 3)),
        "attention_mask": np.array([[1, 1, 0]] * rows),
    }


INPUTS = [batch(4, 0), batch(4, 1)]


def compute(feeds):
    """y [batch, 3, 2]: every token times the row's two scales."""
    ids = np.broadcast_to(feeds[IDS_INPUT], len(feeds["input_ids"]))
    return {"y": feeds["input_ids"][..., None] * feeds[BANK_INPUT][ids][:, None]}


def subjects():
    made = []
    for number, name in enumerate(NAMES):
        feeds = {BANK_INPUT: BANK, IDS_INPUT: np.array([number])}
        oracle = tuple(compute({**each, **feeds}) for each in INPUTS)
        made.append(Subject(name, oracle, oracle, None, feeds))
    return made


def judged(candidate, inputs=INPUTS, allowed=ALLOWED):
    return mixed_rows(subjects(), inputs, candidate, allowed)


def test_the_right_rows_pass_and_are_bit_for_bit():
    check = judged(compute)

    assert check.passed
    assert "0.0% of the allowed error; bit for bit" in check.detail


def first_for_all(feeds):
    return compute({**feeds, IDS_INPUT: feeds[IDS_INPUT][:1]})


def neighbours(feeds):
    return compute({**feeds, IDS_INPUT: np.roll(feeds[IDS_INPUT], 1)})


def nan_in_mixed_batches(feeds):
    found = compute(feeds)
    if len(set(feeds[IDS_INPUT].tolist())) > 1:
        found["y"][-1, 0, 0] = np.nan
    return found


@pytest.mark.parametrize("mistaken", [first_for_all, neighbours, nan_in_mixed_batches])
def test_a_mix_up_fails(mistaken):
    assert not judged(mistaken).passed


def test_another_rounding_among_others_passes_and_is_told():
    def rounded(feeds):
        found = compute(feeds)
        return {"y": found["y"] + (5e-7 if len(feeds[IDS_INPUT]) > 1 else 0)}

    check = judged(rounded)

    assert check.passed
    assert "50.0% of the allowed error; not bit for bit" in check.detail


def test_what_the_mask_hides_does_not_count():
    def noisy(feeds):
        found = compute(feeds)
        found["y"][:, 2] += len(feeds[IDS_INPUT]) - 1
        return found

    assert judged(noisy).passed


def test_every_adapter_has_a_row_even_when_there_are_more_than_rows():
    seen = set()

    def watched(feeds):
        if len(feeds[IDS_INPUT]) > 1:
            seen.update(feeds[IDS_INPUT].tolist())
        return compute(feeds)

    few = [batch(2, 0)]
    three = [
        Subject(s.name, (compute({**few[0], **s.feeds}),), (), None, s.feeds) for s in subjects()
    ]

    assert mixed_rows(three, few, watched, ALLOWED).passed
    assert seen == {0, 1, 2}


def test_an_adapter_that_returned_nothing_to_judge_is_left_out():
    check = judged(compute, allowed={name: ALLOWED[name] for name in ("base", "two")})

    assert check.passed
